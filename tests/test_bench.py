"""``fips bench``: original beside compressed, as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_cli import vit_directory  # noqa: F401

from fips.app.bench import _cases, bench, runtime_report
from fips.cli import main
from fips.errors import ModelError
from fips.storage.checkpoint import load

TEXT = Path(__file__).parent / "fixtures" / "format-1-mixed"


@pytest.mark.slow
def test_a_language_model_is_timed_on_prompts_and_single_tokens() -> None:
    result = bench(str(TEXT), batches=(1, 3), prompts=(1, 8), repeats=3)
    assert list(result["cases"]) == ["prompt of 1", "prompt of 8", "next token, batch 1", "next token, batch 3"]
    for case in result["cases"].values():
        for side in ("dense", "compressed"):
            assert len(case[side]["runs_s"]) == 3
            low, high = case[side]["quartiles_s"]
            assert 0 < low <= case[side]["median_s"] <= high
        assert case["speedup"] == pytest.approx(case["dense"]["median_s"] / case["compressed"]["median_s"])
    assert result["peak_memory_bytes"]["compressed"] > 10**7
    first = result["first_answer"]
    assert first["dense"] is None
    assert first["compressed"].keys() == {"case", "load_s", "first_s"}
    assert first["compressed"]["case"] == "prompt of 8"
    assert result["file_bytes"]["compressed"] == (TEXT / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_the_table_and_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = [
        "bench",
        str(TEXT),
        "--repeats",
        "3",
        *["--batch", "1", "--batch", "8", "--prompt", "1", "--prompt", "16"],
    ]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["policy"] == "auto"
    first = {"case": "prompt of 16", "load_s": 1.0, "first_s": 0.5, "peak_bytes": 10**8}  # measured above
    monkeypatch.setattr("fips.app.bench._first_answer", lambda *_: dict(first))
    assert main([*command, "--policy", "decode"]) == 0
    out = capsys.readouterr().out
    assert "next token, batch 8" in out
    assert "peak memory" in out


def test_prompts_ask_for_the_last_logits_and_several_models_stand_by_their_names() -> None:
    seen: list[tuple[int, int]] = []
    other = str(TEXT.parent / "format-1-mixed" / ".." / "format-1-mixed")
    result = bench(
        str(TEXT), against=[str(TEXT), other], batches=(1,), prompts=(1, 8), repeats=1, memory=False,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert result["against"] == [str(TEXT), other]
    for case in result["cases"].values():
        assert case.keys() == {str(TEXT), other, "compressed", "speedup"}
        assert case["speedup"].keys() == {str(TEXT), other}
    assert result["file_bytes"].keys() == {str(TEXT), other, "compressed"}
    model = load(TEXT)
    (_, run, _), *_ = _cases(model, (1,), (8,), torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert run(model).logits.shape[1] == 1


def test_only_compressed_directories(vit_directory: Path) -> None:  # noqa: F811
    with pytest.raises(ModelError, match="not a compressed directory"):
        bench(str(vit_directory))


def test_loading_holds_the_packed_bytes_only() -> None:
    report = runtime_report(load(TEXT))
    assert report["extra_bytes"] == 0
    kinds = ("values", "pattern", "scales")
    with safe_open(TEXT / "model.safetensors", "pt") as file:
        packed = [name for name in file.keys() if name.endswith(kinds) or "fips_bases" in name]  # noqa: SIM118
        tensors = [file.get_tensor(name) for name in packed]
    assert report["stored_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
