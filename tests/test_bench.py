"""``fips bench``: original beside compressed, as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import batches_for, tiny_model
from safetensors import safe_open
from test_cli import vit_directory  # noqa: F401

import fips
from fips.app.bench import _cases, bench, runtime_report
from fips.cli import main
from fips.cli.printing import print_bench
from fips.errors import ConfigError, ModelError
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


@pytest.mark.parametrize(
    ("speedup", "dense_bytes", "said"),
    [
        (0.7, 10**6, True),
        ({"dense": 1.2, "other": 0.9}, 10**6, True),
        (0.98, 10**6, False),  # noise
        (0.7, 10**9, False),  # not for being small
    ],
)
def test_what_is_slower_for_being_small_is_told(
    capsys: pytest.CaptureFixture[str], speedup: Any, dense_bytes: int, said: bool
) -> None:
    sides = list(speedup) if isinstance(speedup, dict) else ["dense"]
    timed = {"median_s": 1e-3, "quartiles_s": [1e-3, 1e-3], "per_second": 1000}
    sizes = dict.fromkeys([*sides, "compressed"], 1000)
    print_bench(
        {
            "cases": {"prompt of 1": {**dict.fromkeys(sizes, timed), "speedup": speedup}},
            "file_bytes": sizes, "peak_memory_bytes": sizes, "first_answer": {},
            "runtime": {"stored_bytes": 100, "extra_bytes": 0, "dense_bytes": dense_bytes},
        }
    )  # fmt: skip
    assert ("slower than dense" in capsys.readouterr().out) is said


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": (1, 0)}, "`batches` wants numbers from 1 to .*got 0"),
        ({"batches": ()}, "`batches` wants .*at least one, got none"),
        ({"batches": (10**12,)}, "`batches` wants .*got 1000000000000"),
        ({"prompts": (-3,)}, "`prompts` wants .*got -3"),
        ({"repeats": 0}, "`repeats` wants at least 1, got 0"),
        ({"seed": 2**64}, "`seed` wants a number from 0"),
        ({"policy": "fast"}, "unknown runtime policy 'fast'"),
    ],
)
def test_numbers_that_nothing_can_be_timed_with_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(str(TEXT), **options)


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


def seq2seq(family: str) -> transformers.PreTrainedModel:
    fields = {
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 80, "num_layers": 2, "num_heads": 4},
        "bart": {
            "d_model": 32, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
        },
    }[family]  # fmt: skip
    config = transformers.AutoConfig.for_model(family, vocab_size=64, decoder_start_token_id=0, **fields)
    return transformers.AutoModelForSeq2SeqLM.from_config(config).eval()


GENERATED = ["prompt of 4", "next token, batch 1", "next token, batch 2"]
TEXTS = ["4 tokens, batch 1", "4 tokens, batch 2"]
IMAGES = ["images, batch 1", "images, batch 2"]


@pytest.mark.parametrize(
    ("family", "cases"),
    [("t5", GENERATED), ("bart", GENERATED), ("bert", TEXTS), ("swin", IMAGES)],
)  # fmt: skip
def test_every_kind_of_model_is_timed(family: str, cases: list[str], tmp_path: Path) -> None:
    model = seq2seq(family) if family in ("t5", "bart") else tiny_model(family)
    batches = batches_for(model)
    if family in ("t5", "bart"):
        batches = [{**batch, "decoder_input_ids": batch["input_ids"][:, :6]} for batch in batches]
    fips.compress(model, batches, fips.CompressionConfig(bits=6, method="gptq"))
    fips.save(model, tmp_path / "small")
    found = bench(str(tmp_path / "small"), batches=(1, 2), prompts=(4,), repeats=1, memory=False)["cases"]
    assert list(found) == cases
    assert found[cases[-1]]["compressed"]["per_second"] > 0
