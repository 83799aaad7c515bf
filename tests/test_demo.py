"""The embedded model and its corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import fips
from fips.app.evaluating import evaluable_source
from fips.cli import main
from fips.config import DataConfig
from fips.demo import MODEL_DIRECTORY
from fips.demo import run as demo_module
from fips.demo.corpus import calibration_files, copy_files, held_out_files, held_out_names
from fips.models.transformers import load_dense, load_processor


def test_the_embedded_model_is_small_bf16_and_between_2_and_4_million_parameters() -> None:
    assert (MODEL_DIRECTORY / "model.safetensors").stat().st_size <= 8_000_000
    model = load_dense(str(MODEL_DIRECTORY))
    assert model.dtype == torch.bfloat16
    assert 2_000_000 <= sum(p.numel() for p in model.parameters()) <= 4_000_000


def test_the_tokenizer_is_the_identity_on_bytes() -> None:
    tokenizer = load_processor(str(MODEL_DIRECTORY), "text")
    text = "def naïve(x):\n\treturn '\u20ac'  # \r\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == [256, *text.encode("utf-8")]
    assert tokenizer.decode(ids[1:]) == text


def test_held_out_modules_never_calibrate() -> None:
    names = set(held_out_names())
    files = calibration_files(seed=0)
    assert len(files) > 50
    assert not {path.stem for path in files} & names
    assert {path.stem for path in held_out_files()} <= names | {"__init__"}
    assert calibration_files(seed=0) == files
    assert calibration_files(seed=1) != files


@pytest.mark.slow
def test_the_embedded_model_has_learned_python(tmp_path: Path) -> None:
    """Its training record holds bits per byte on the same modules of the interpreter it was trained with."""
    record = json.loads((MODEL_DIRECTORY / "training.json").read_text())
    source = copy_files(held_out_files(), tmp_path / "held-out")
    data = DataConfig(source=str(source), sequence_length=512, num_samples=40, batch_size=8)
    result = evaluable_source(str(MODEL_DIRECTORY), data).evaluate()
    assert result.to_dict()["bits_per_byte"] == pytest.approx(record["held_out_bits_per_byte"], rel=0.2)
    assert record["held_out_bits_per_byte"] < 1.5


@pytest.mark.slow
def test_the_demo_compresses_saves_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two of the blocks of the model and few data: the whole demo takes a minute or two."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIRECTORY, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "small")
    load_processor(str(MODEL_DIRECTORY), "text").save_pretrained(tmp_path / "small")
    monkeypatch.setattr(demo_module, "MODEL_DIRECTORY", tmp_path / "small")
    monkeypatch.setattr(demo_module, "EVALUATION_WINDOWS", 4)
    recipe = demo_module.demo_recipe(bits=8.0)
    assert recipe.data is not None
    short = recipe.model_copy(update={"data": recipe.data.replace(num_samples=16)})
    monkeypatch.setattr(demo_module, "demo_recipe", lambda **_: short)
    console = Console(record=True, width=100)
    result = demo_module.run_demo(tmp_path / "out", bits=8.0, console=console)
    text = console.export_text()
    for word in ("model.layers.0.mlp", "Sizes", "bits_per_byte", "model.safetensors:", "fips.load("):
        assert word in text
    assert result["file_bytes"]["after"] < 0.75 * result["file_bytes"]["before"]
    before, after = (result["bits_per_byte"][key]["bits_per_byte"] for key in ("before", "after"))
    assert abs(after - before) < 0.1
    assert sum(t.numel() for t in fips.load(tmp_path / "out").state_dict().values()) > 500_000


def test_a_full_output_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["demo", "--output", str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().err
