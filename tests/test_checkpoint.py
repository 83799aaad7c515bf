"""Directories are complete or absent, and every damage is refused with the name of what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batches_for, quick_settings, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fips
from fips.errors import ConfigError
from fips.files.manifest import MANIFEST, complete_directory
from fips.layers.linear import factored_layers
from fips.models.transformers import load_dense
from fips.storage import checkpoint
from fips.storage.weights import StoredWeights

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), quick_settings())
    path = tmp_path_factory.mktemp("saved") / "model"
    fips.save(model, path, recipe="compression: {budget: 0.5}\n")
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("device", ["xyz", "meta", "cuda:99", "hpu", "", None, 3.5])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(device: Any, saved: Path) -> None:
    for place in (saved, saved / "nowhere"):
        with pytest.raises(ConfigError, match=r"^device `.*` (is not available|holds no numbers).*; there is `cpu`"):
            fips.load(place, device=device)


def test_the_directory_holds_what_a_user_needs(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert names == {
        "config.json", "generation_config.json", WEIGHTS, "fips_report.json", "fips_recipe.yaml", MANIFEST,
        "README.md", "fips_remote.py",
    }  # fmt: skip
    tensors = load_file(saved / WEIGHTS)
    assert [name for name in tensors if name.endswith("fips_bases.g0.weight")] == ["model.fips_bases.g0.weight"]
    placeholders = [t for name, t in tensors.items() if name.endswith("_proj.weight") and ".mlp." in name]
    assert [t.numel() for t in placeholders] == [0] * 9
    assert tensors["model.layers.0.mlp.up_proj.pattern"].dtype == torch.uint8
    assert "lm_head.weight" not in tensors  # tied


def test_no_file_is_a_pickle(saved: Path) -> None:
    for path in saved.iterdir():
        assert path.suffix in {".safetensors", ".json", ".yaml", ".md", ".py"}
        assert not path.read_bytes().startswith((b"\x80", b"PK"))


def test_shards_load_exactly(saved: Path, tmp_path: Path) -> None:
    model = fips.load(saved)
    fips.save(model, tmp_path / "shards", max_shard_size=30_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    again = fips.load(tmp_path / "shards")
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


def test_types_survive(tmp_path: Path) -> None:
    tiny_model("gemma3_text").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = load_dense(str(tmp_path / "dense"))
    assert model.dtype == torch.bfloat16
    reconstruction = {"steps": 2}
    batches = batches_for(model)
    fips.compress(
        model,
        batches,
        fips.CompressionConfig(method="fips-paper", budget=0.5, reconstruction=reconstruction, precision="float32"),
    )
    fips.save(model, tmp_path / "out")
    loaded = fips.load(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(loaded(**batches[0]).logits, model(**batches[0]).logits)


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file_is_refused(copy: Path, verify: bool) -> None:
    path = copy / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(fips.FipsError, match=rf"{WEIGHTS}.*(bytes, written were|cut short)"):
        fips.load(copy, verify=verify)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "fips_report.json"])
def test_one_altered_byte_is_refused(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[-20] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(fips.FipsError, match=rf"{name}.*(altered|not valid JSON)"):
        fips.load(copy)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "fips_report.json", "fips_remote.py"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(fips.FipsError, match=rf"{name}` is missing"):
        fips.load(copy)


def test_the_model_card_may_be_edited(copy: Path) -> None:
    (copy / "README.md").write_text("# Mine")
    fips.load(copy)


def test_without_a_manifest_nothing_is_verified_but_tensors_still_are(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    edit_json(copy / "config.json", lambda config: config.update(note="edited"))
    fips.load(copy)
    edit_tensors(copy / WEIGHTS, lambda t: t.pop("model.layers.1.mlp.up_proj.values"))
    with pytest.raises(fips.FipsError, match="lacks tensor"):
        fips.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format_version=5), r"format_version 5, this fips reads 1 to 4"),
        (lambda q: q.update(quant_method="gptq"), r"no `quantization_config` of fips"),
        (lambda q: q["bases"]["g0"].update(rank=-1), r"`quantization_config\.bases\.g0\.rank`"),
        (lambda q: q.update(extra=1), r"`quantization_config\.extra`"),
        (lambda q: q["bases"]["g0"].update(rank=50), r"tensor `.*` has shape .*, wanted "),
        (lambda q: q["layers"]["model.layers.0.mlp.up_proj"].update(basis="g7"), r"names basis `g7`; known: g0"),
        (lambda q: q["layers"]["model.layers.0.mlp.up_proj"].update(format="csr"), r"unknown packed format"),
        (
            lambda q: q["layers"].update({"model.layers.9.mlp.x": q["layers"]["model.layers.0.mlp.up_proj"]}),
            r"layer `model\.layers\.9\.mlp\.x`",
        ),
    ],
)  # fmt: skip
def test_a_wrong_layout_is_refused(copy: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit_json(copy / "config.json", lambda config: change(config["quantization_config"]))
    with pytest.raises(fips.FipsError, match=message):
        fips.load(copy, verify=False)


@pytest.mark.slow
def test_rounded_inputs_travel_with_the_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), fips.CompressionConfig(bits=6.4, activation_bits=8))
    fips.save(model, tmp_path / "model")
    layers = factored_layers(fips.load(tmp_path / "model"))
    stored = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]["layers"]
    assert len(layers) == 21
    for name, layer in layers.items():
        assert layer.bits is not None
        assert layer.runtime.activation_bits == 8
        assert stored[name]["activation_bits"] == 8


def test_exact_inputs_are_not_mentioned(saved: Path) -> None:
    layers = json.loads((saved / "config.json").read_text())["quantization_config"]["layers"]
    assert layers
    assert not any("activation_bits" in layer for layer in layers.values())
    assert all(layer.runtime.activation_bits is None for layer in factored_layers(fips.load(saved)).values())


def test_an_unknown_manifest_version_is_refused(copy: Path) -> None:
    edit_json(copy / MANIFEST, lambda manifest: manifest.update(format_version=9))
    with pytest.raises(fips.FipsError, match=rf"{MANIFEST}.*format_version 9, this fips reads 1"):
        fips.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.values"),
            r"lacks tensor `model\.layers\.1\.mlp\.up_proj\.values`",
        ),
        (lambda t: t.update(surprise=torch.zeros(1)), r"has a tensor `surprise`"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.values": torch.zeros(3)}),
            r"tensor `model\.layers\.1\.mlp\.up_proj\.values` has shape \(3,\), wanted",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int32)}),
            r"tensor `model\.norm\.weight` has type torch\.int32",
        ),
        (
            lambda t: t["model.layers.1.mlp.up_proj.pattern"].fill_(255),
            r"layer `model\.layers\.1\.mlp\.up_proj`: its pattern keeps",
        ),
    ],
)
def test_wrong_tensors_are_named(copy: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str) -> None:
    edit_tensors(copy / WEIGHTS, change)
    with pytest.raises(fips.FipsError, match=message):
        fips.load(copy, verify=False)


def test_a_plain_directory_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(fips.FipsError, match="is not a directory"):
        fips.load(tmp_path / "nowhere")
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(fips.FipsError, match="no `quantization_config` of fips"):
        fips.load(tmp_path / "dense")


def test_save_needs_a_compressed_transformers_model_and_an_empty_place(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(fips.FipsError, match="no factored layer to save"):
        fips.save(tiny_model("llama"), tmp_path / "out")
    model = fips.load(saved)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep.txt").write_text("mine")
    with pytest.raises(fips.FipsError, match=r"full` is not empty"):
        fips.save(model, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["keep.txt"]


def test_an_interrupted_save_leaves_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_write_config", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fips.save(fips.load(saved), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_may_be_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with complete_directory(tmp_path / "out") as scratch:
        (scratch / "a").write_text("x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def mapped_bytes() -> int:
    """Of files, in the memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


on_linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="says what is mapped on Linux only")


@on_linux
def test_copying_out_of_a_file_takes_the_memory_of_one_copy(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    generator = torch.Generator().manual_seed(0)
    wanted = {f"t{index}": torch.randn(1 << 20, generator=generator) for index in range(16)}
    save_file({"odd": torch.ones(3), **wanted}, path)
    before, most = mapped_bytes(), 0
    found = {}
    for name, tensor in StoredWeights.of([path]).read("cpu"):
        found[name] = tensor
        most = max(most, mapped_bytes() - before)
    assert most < 16 << 20 < 64 << 20
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@on_linux
@pytest.mark.parametrize("read", [fips.load, AutoModelForCausalLM.from_pretrained])
def test_a_loaded_model_lets_go_of_its_files(read: Callable[[Path], torch.nn.Module], copy: Path) -> None:
    model = read(copy)
    assert str(copy) not in Path("/proc/self/maps").read_text()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (copy / WEIGHTS).write_bytes(b"")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_was_altered_is_said_rather_than_what_it_led_to(copy: Path) -> None:
    """Files are compared with the manifest while the model is built, which may fail on the same damage."""
    edit_json(copy / "config.json", lambda fields: fields.update(hidden_size=17))
    with pytest.raises(fips.errors.CheckpointError, match=r"config\.json` was altered|config\.json` has \d+ bytes"):
        fips.load(copy)
    with pytest.raises(fips.errors.CheckpointError, match="describes no"):
        fips.load(copy, verify=False)
