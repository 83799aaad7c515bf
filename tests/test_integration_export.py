"""Exports that need nothing of fips: a plain checkpoint, and an ONNX file whose constants stay packed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import batches_for, quick_settings, tiny_model
from fresh import python
from PIL import Image
from test_gguf import model_of, packed_of
from test_nn import mixed_llama
from torch import Tensor, nn
from transformers import ViTImageProcessor

import fips
from fips.cli import main
from fips.formats.patterns import pattern_named
from fips.formats.rotation import rotate
from fips.integrations.matmul_nbits import block_bits
from fips.layers.linear import factored_layers, replace_everywhere

IDS = torch.randint(3, 64, (3, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("export")
    for family in ("llama", "vit"):
        model = tiny_model(family)
        fips.compress(model, batches_for(model), quick_settings(share_blocks=2))
        processor = ViTImageProcessor(size={"height": 32, "width": 32}) if family == "vit" else None
        fips.save(model, root / family, processor=processor)
    mixed, _ = mixed_llama()
    fips.save(mixed, root / "mixed")
    return {name: root / name for name in ("llama", "vit", "mixed")}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for index in range(4):
        (root / f"class{index % 2}").mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 255, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"class{index % 2}" / f"{index}.png")
    return root


def outputs_of(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.slow
@pytest.mark.parametrize("command", ["export", "merge"])
def test_dense_export_loads_without_fips(command: str, directories: dict[str, Path], tmp_path: Path) -> None:
    assert main([command, str(directories["vit"]), "--output", str(tmp_path / "dense")]) == 0
    code = (
        "import sys, torch; from transformers import AutoModelForImageClassification as M, AutoImageProcessor as P;"
        "m, i = M.from_pretrained(sys.argv[1], output_loading_info=True); assert not any(i.values()), i;"
        "P.from_pretrained(sys.argv[1]); assert 'fips' not in sys.modules;"
        "torch.save(m(torch.ones(1, 3, 32, 32)).logits.detach(), sys.argv[2])"
    )
    done = python(code, tmp_path / "dense", tmp_path / "logits.pt")
    assert done.returncode == 0, done.stderr
    expected = outputs_of(fips.load(directories["vit"]), pixel_values=torch.ones(1, 3, 32, 32))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--format", "pdf"], 2, "must be dense, onnx or gguf"),
        pytest.param(
            ["--format", "gguf"],
            1,
            "cannot be written as GGUF",
            marks=pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason="the extra gguf is not installed"),
        ),
        (["--format", "onnx", "--output", "."], 1, "is not empty"),
        (["--format", "dense", "--activation-bits", "8"], 2, "goes with `--format onnx`"),
        (["--format", "onnx", "--activation-bits", "4"], 2, "must be 8, or 16 for inputs as they are, got 4"),
    ],
)
def test_wrong_use_is_one_line(
    directories: dict[str, Path], tmp_path: Path, arguments: list[str], code: int, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["export", str(directories["vit"]), "--output", str(tmp_path / "new"), *arguments]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


FLOAT = 1
"""Of the types that ONNX has, float32."""


class TestOnnx:
    """Against torch, in ONNX Runtime."""

    pytestmark: ClassVar = [
        pytest.mark.slow,
        pytest.mark.skipif(
            not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")),
            reason="the extra onnx is not installed",
        ),
    ]

    @pytest.fixture(autouse=True)
    def _import(self) -> None:
        self.onnx, self.runtime = (importlib.import_module(name) for name in ("onnx", "onnxruntime"))

    def run(self, path: Path, **inputs: Tensor) -> Tensor:
        session = self.runtime.InferenceSession(str(path))
        (output,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return torch.from_numpy(output)

    @pytest.fixture(scope="class")
    def exported(
        self, directories: dict[str, Path], images: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Callable[[str], Path]:
        """Each model is exported when the first test of a process asks for it: that takes seconds."""
        root = tmp_path_factory.mktemp("onnx")

        @functools.cache
        def export(name: str) -> Path:
            command = ["export", str(directories[name]), "--format", "onnx", "--output", str(root / name), "--json"]
            assert main([*command, *(["--data", str(images)] if name == "vit" else [])]) == 0
            return root / name / "model.onnx"

        return export

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["llama", "mixed"])
    def test_text_with_other_lengths_and_padding(
        self, exported: Callable[[str], Path], directories: dict[str, Path], name: str
    ) -> None:
        mask = torch.ones_like(IDS)
        mask[1, 7:] = 0
        expected = outputs_of(fips.load(directories[name]), input_ids=IDS, attention_mask=mask)
        actual = self.run(exported(name), input_ids=IDS, attention_mask=mask)
        scored = mask.bool()
        assert (actual - expected)[scored].norm() / expected[scored].norm() < 1e-5

    @pytest.mark.slow
    def test_real_images(self, exported: Callable[[str], Path], directories: dict[str, Path], images: Path) -> None:
        processor = ViTImageProcessor.from_pretrained(directories["vit"])
        pictures = [Image.open(path) for path in sorted(images.rglob("*.png"))]
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
        expected = outputs_of(fips.load(directories["vit"]), pixel_values=pixels)
        assert (self.run(exported("vit"), pixel_values=pixels) - expected).norm() / expected.norm() < 1e-5
        assert {path.name for path in exported("vit").parent.iterdir()} >= {"config.json", "preprocessor_config.json"}
        assert "fips" not in (exported("vit").parent / "config.json").read_text()

    @pytest.mark.parametrize("name", ["llama", "vit", "mixed"])
    def test_every_basis_is_stored_once_and_factors_stay_packed(
        self, exported: Callable[[str], Path], directories: dict[str, Path], name: str
    ) -> None:
        graph = self.onnx.load(exported(name)).graph
        model = fips.load(directories[name])
        constants = [(tuple(c.dims), c.name) for c in graph.initializer]
        bases = [tuple(p.shape) for n, p in model.named_parameters() if "fips_bases" in n]
        assert [shape for shape, n in constants if "fips_bases" in n] == bases
        for shape in bases:
            assert sum(dims in (shape, shape[::-1]) for dims, _ in constants) == bases.count(shape)
        for layer in factored_layers(model).values():
            size = layer.factor_shape[0] * layer.factor_shape[1]
            if layer.values.numel() < size:
                shapes = (layer.factor_shape, layer.factor_shape[::-1])
                assert not [c.name for c in graph.initializer if c.data_type == FLOAT and tuple(c.dims) in shapes]
            if layer.fmt != "full":
                assert (pattern_named("bitmask").nbytes(size),) in [dims for dims, _ in constants]

    def test_the_runtime_decodes_once_when_it_loads(self, exported: Callable[[str], Path], tmp_path: Path) -> None:
        options = self.runtime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        self.runtime.InferenceSession(str(exported("vit")), options)
        before = {node.op_type for node in self.onnx.load(exported("vit")).graph.node}
        after = {node.op_type for node in self.onnx.load(tmp_path / "optimized.onnx").graph.node}
        assert "CumSum" in before
        assert "CumSum" not in after

    @pytest.mark.slow
    def test_a_wrong_file_is_not_written(
        self, directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        import fips.integrations.onnx as module

        monkeypatch.setattr(module, "_run", lambda path, inputs: torch.ones(2, 10))
        command = ["export", str(directories["vit"]), "--format", "onnx", "--output", str(tmp_path / "bad")]
        assert main(command) == 1
        assert "differs from torch" in capsys.readouterr().err
        assert not (tmp_path / "bad").exists()

    @pytest.mark.slow
    def test_the_command_reports_size_and_error(
        self, directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["export", str(directories["vit"]), "--format", "onnx", "--output", str(tmp_path / "vit"), "--json"]
        assert main(command) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["relative_error"] < 1e-5
        assert result["file_bytes"] == sum(path.stat().st_size for path in (tmp_path / "vit").iterdir())

    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A Llama whose layers keep all entries, one value format each."""
        model = model_of("llama", hidden_size=72, num_hidden_layers=1)
        model.base_model.fips_bases = nn.ModuleDict()
        linears = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        for (name, layer), (values, rotation) in zip(linears[:-1], WHOLE, strict=True):
            replace_everywhere(model, name, packed_of(layer, name, values, rotation=rotation))
        directory = tmp_path_factory.mktemp("whole") / "model"
        fips.save(model, directory)
        return directory

    @pytest.mark.slow
    @pytest.mark.parametrize(("bits", "error", "blocked"), [(16, 1e-5, 3), (8, 0.05, 6)])
    def test_whole_layers_are_blocks_of_few_bits(
        self, whole: Path, tmp_path: Path, bits: int, error: float, blocked: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["export", str(whole), "--format", "onnx", "--activation-bits", str(bits), "--json"]
        assert main([*command, "--output", str(tmp_path / "out")]) == 0
        assert f"{blocked} packed layers run as blocks" in json.loads(capsys.readouterr().out)["notes"][0]
        graph = self.onnx.load(tmp_path / "out" / "model.onnx").graph
        nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
        assert len(nodes) == blocked
        attributes = [{one.name: one.i for one in node.attribute} for node in nodes]
        assert {one["accuracy_level"] for one in attributes} == {1 if bits == 16 else 4}
        assert {one["bits"] for one in attributes} == ({4} if bits == 16 else {4, 8})
        constants = {one.name: one for one in graph.initializer}
        model = fips.load(whole)
        layers = [layer for layer in factored_layers(model).values() if block_bits(layer, rounded=bits == 8)]
        for node, one, layer in zip(nodes, attributes, layers, strict=True):  # what the file holds, read by numpy alone
            codes = self.onnx.numpy_helper.to_array(constants[node.input[1]])
            steps = self.onnx.numpy_helper.to_array(constants[node.input[2]])
            if one["bits"] == 4:
                codes = np.stack([codes % 16, codes // 16], 3).reshape(*codes.shape[:2], -1)
            matrix = ((codes - 2.0 ** (one["bits"] - 1)) * steps[..., None]).reshape(one["N"], -1)[:, : one["K"]]
            turned = rotate(layer.dense_weight(), layer.rotation)
            torch.testing.assert_close(torch.from_numpy(matrix).float(), turned, rtol=1e-5, atol=1e-6)
        expected = outputs_of(model, input_ids=IDS)
        found = self.run(tmp_path / "out" / "model.onnx", input_ids=IDS, attention_mask=torch.ones_like(IDS))
        assert (found - expected).norm() / expected.norm() < error
        held = sum(constant.ByteSize() for constant in constants.values())
        rest = sum(tensor.numel() * 4 for tensor in (*model.parameters(), model.model.embed_tokens.weight[:0]))
        packed = sum(layer.out_features * layer.in_features for layer in factored_layers(model).values())
        assert held - rest < 1.25 * packed  # a byte or half of one for every number, and scales


WHOLE = [("int4g32", 4), ("int2", 1), ("int8", 1), ("nl4g64", 4), ("tc4", 4), ("int4", 1), ("float", 1)]
"""Values and rotation of the layers of a block, in their order."""
