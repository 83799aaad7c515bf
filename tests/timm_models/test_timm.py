"""timm models through compress, save, load, merge and the command line, alone and inside transformers' wrapper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision_stub  # noqa: F401
from PIL import Image
from torch import Tensor, nn

import fips
from fips.cli import main
from fips.layers.linear import factored_layers
from fips.models.timm import TimmProcessor, build_timm

timm = pytest.importorskip("timm", reason="timm is tested in an environment of its own, see .ci/run")

SIZES = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 4, "num_classes": 10}
SWIN = {"img_size": 32, "window_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", SIZES, 6),
    "deit": ("deit_tiny_patch16_224", SIZES, 6),
    "deit3 with layer scale": ("deit3_small_patch16_224", SIZES, 6),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 8),
    "eva, fused SwiGLU": ("eva02_tiny_patch14_224", SIZES, 6),
    "eva, SwiGLU with norm": ("eva02_base_patch14_224", SIZES, 9),
    "dinov2, packed SwiGLU": ("vit_giant_patch14_reg4_dinov2", {**SIZES, "mlp_ratio": 4.0}, 6),
}


def tiny(name: str) -> nn.Module:
    architecture, arguments, _ = MODELS[name]
    torch.manual_seed(0)
    return timm.create_model(architecture, **arguments).eval()


def pixels(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def settings(**changes: Any) -> fips.CompressionConfig:
    return fips.CompressionConfig(
        **{"method": "fips-paper", "budget": 0.5, "reconstruction": {"steps": 2}, "precision": "float32", **changes}
    )


def outputs_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result = model(x)
        return getattr(result, "logits", result)


@pytest.mark.parametrize("name", MODELS)
def test_compress_save_load_merge(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    report = fips.compress(model, [pixels(1), pixels(2)], settings())
    assert len(factored_layers(model)) == MODELS[name][2]
    expected = outputs_of(model, pixels())

    assert fips.save(model, tmp_path / "out") == report.plan["compressed_model"]["bytes"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == MODELS[name][0].partition(".")[0]
    assert "quantization_config" in config
    assert "fips.load" in (tmp_path / "out" / "README.md").read_text()

    loaded = fips.load(tmp_path / "out")
    assert type(loaded) is type(model)
    assert torch.equal(outputs_of(loaded, pixels()), expected)
    assert loaded.fips_report.to_dict() == report.to_dict()

    merged = fips.merge(loaded)
    assert {key: tuple(tensor.shape) for key, tensor in merged.state_dict().items()} == shapes
    torch.testing.assert_close(outputs_of(merged, pixels()), expected, atol=2e-5, rtol=2e-5)


def test_timm_alone_refuses_packed_weights(tmp_path: Path) -> None:
    model = tiny("vit")
    fips.compress(model, [pixels(1)], settings())
    fips.save(model, tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"fc1\.weight|Error\(s\) in loading"):
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)


def test_half_precision_survives(tmp_path: Path) -> None:
    model = tiny("vit").to(torch.bfloat16)
    fips.compress(model, [pixels(1).bfloat16()], settings())
    fips.save(model, tmp_path / "out")
    loaded = fips.load(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(outputs_of(loaded, pixels().bfloat16()), outputs_of(model, pixels().bfloat16()))


def test_an_empty_model_has_no_weights() -> None:
    model = build_timm("timm/deit_base_patch16_224")
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for index in range(20):
        folder = root / f"class{index % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(index).integers(0, 255, (48, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    return root


def write_dense(model: nn.Module, path: Path) -> Path:
    from timm.models._hub import save_for_hf

    save_for_hf(model, path, safe_serialization=True)
    return path


def test_the_command_line_takes_a_timm_directory(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = write_dense(tiny("vit"), tmp_path / "dense")
    assert main(["inspect", str(dense)]) == 0
    options = ["--data", str(images), "--method", "fips-paper", "--budget", "0.5", "--steps", "2", "--batch-size", "10"]
    assert main(["compress", str(dense), *options, "--output", str(tmp_path / "out")]) == 0
    for source in (dense, tmp_path / "out"):
        capsys.readouterr()
        assert main(["evaluate", str(source), "--data", str(images), "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["num_images"] == 20
        assert result["data"]["size"] == [3, 32, 32]


def test_timm_names_are_planned_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "timm/deit_base_patch16_224", "--budget", "0.5", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["model"]["parameters"] == 86_567_656
    assert [len(group["blocks"]) for group in plan["groups"]] == [4, 4, 4]


def test_an_unknown_timm_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "timm/no_such_model"]) == 1
    error = capsys.readouterr().err
    assert "timm cannot make `timm/no_such_model`" in error
    assert error.count("\n") == 1


def test_the_processor_follows_the_config_of_timm() -> None:
    """Against a computation by hand: a gray image stays gray, the shorter side becomes floor(32 / crop_pct)."""
    model = tiny("vit")
    processor = TimmProcessor.of(model)
    cfg = model.pretrained_cfg
    assert (processor.height, processor.width, processor.crop_pct) == (32, 32, cfg["crop_pct"])
    gray = Image.new("RGB", (50, 40), (128, 128, 128))
    expected = [(128 / 255 - mean) / std for mean, std in zip(cfg["mean"], cfg["std"], strict=True)]
    result = processor([gray])["pixel_values"]
    assert result.shape == (1, 3, 32, 32)
    for channel, value in enumerate(expected):
        torch.testing.assert_close(result[0, channel], torch.full((32, 32), value))
    size = int(32 / processor.crop_pct)
    ramp = np.zeros((40, 40, 3), dtype=np.uint8)
    ramp[:, :20] = 255
    half = processor([Image.fromarray(ramp).resize((size, size), Image.Resampling.NEAREST)])["pixel_values"]
    assert half[0, 0, 16, 2] > half[0, 0, 16, 29]


def test_transformers_wrapper(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperForImageClassification

    dense = tiny("vit")
    arguments = {key: value for key, value in SIZES.items() if key != "num_classes"}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=arguments, num_labels=10)
    model = TimmWrapperForImageClassification(config).eval()
    model.timm_model.load_state_dict(dense.state_dict())
    assert torch.equal(outputs_of(model, pixels()), outputs_of(dense, pixels()))
    fips.compress(model, [{"pixel_values": pixels(1)}], settings())
    expected = outputs_of(model, pixels())
    fips.save(model, tmp_path / "out")
    assert torch.equal(outputs_of(fips.load(tmp_path / "out"), pixels()), expected)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(outputs_of(again, pixels()), expected)
    again.save_pretrained(tmp_path / "again")
    twice = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(outputs_of(twice, pixels()), expected)


def test_a_changed_timm_model_is_refused_before_work() -> None:
    model = tiny("vit")
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].attn.qkv)
    with pytest.raises(fips.FipsError, match="remove_parametrizations"):
        fips.compress(model, [pixels(1)], settings())
    model = tiny("vit")
    model.blocks = model.blocks[:2]
    with pytest.raises(fips.FipsError, match=r"`blocks\.2` is missing"):
        fips.compress(model, [pixels(1)], settings())


@pytest.mark.parametrize("name", ["local-dir:/etc", "hf-hub:someone/model", "no_such_model", 3])
def test_an_architecture_that_is_no_model_of_timm_is_refused(name: Any, tmp_path: Path) -> None:
    model = tiny("vit")
    fips.compress(model, [pixels(1)], settings())
    fips.save(model, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architecture": name}))
    with pytest.raises(fips.FipsError) as caught:
        fips.load(tmp_path / "out", verify=False)
    assert "\n" not in str(caught.value)
