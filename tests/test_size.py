"""A size of the whole file becomes bits per weight, is met, and is refused where it cannot be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batches_for, tiny_model
from test_cli import llama_directory, text  # noqa: F401 - fixtures
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel

import fips
from fips.app.outline import outline_of_plan
from fips.app.tables import smallest_line
from fips.cli import main
from fips.config import size_bytes
from fips.errors import BudgetError, ConfigError
from fips.layers.linear import factored_layers
from fips.plan.footprint import bytes_enough, itemsize, state_bytes
from fips.plan.kinds import layer_bytes, sizes_by_kind
from fips.plan.plan import plan_compression, settle_size
from fips.plan.rest import rest_sizes
from fips.plan.size import sizes_of


def wide_model() -> nn.Module:
    return tiny_model("llama", hidden_size=128, intermediate_size=384)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("400MB", 400e6),
        ("1.5 GiB", 1.5 * 2**30),
        ("123456", 123456.0),
        ("8.04 kB", 8040.0),
        ("25%", 250.0),
        ("4x", 250.0),
        ("2.5x", 400.0),
    ],
)
def test_sizes_are_bytes_shares_and_factors(size: str, expected: float) -> None:
    assert size_bytes(size, 1000) == pytest.approx(expected)


@pytest.mark.parametrize("size", ["", "small", "0%", "120%", "0.5x", "0x", "-3x", "%"])
def test_what_is_no_size_is_refused_with_examples(size: str) -> None:
    with pytest.raises(ConfigError, match=r"wants bytes \(`400MB`\), a share \(`25%`\) or how much smaller \(`4x`\)"):
        fips.CompressionConfig(size=size)


def test_a_share_without_its_sign_is_no_number_of_bytes() -> None:
    with pytest.raises(ConfigError, match="got '40'; a share is written `40%`"):
        fips.CompressionConfig(size="40")


@pytest.mark.slow
@pytest.mark.parametrize(("size", "layers"), [("20%", "blocks"), ("5.5x", "blocks"), ("35%", "mlp"), ("950kB", "mlp")])
def test_the_size_is_met_to_one_percent(size: str, layers: str) -> None:
    model = wide_model()
    wanted = size_bytes(size, state_bytes(model))
    report = fips.compress(model, batches_for(model), fips.CompressionConfig(size=size, layers=layers))
    assert 0.99 * wanted <= state_bytes(model) <= wanted
    assert report.plan["compressed_model"]["bytes"] == state_bytes(model)
    assert report.config.bits is not None
    assert re.search(rf"bits a weight, so that all tensors take {re.escape(size)}", " ".join(report.notes))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"method": "gptq"}, {"values": "auto"}, {"activation_bits": 8}])
def test_a_size_goes_with_whatever_bits_go_with(settings: dict[str, Any]) -> None:
    model = wide_model()
    wanted = size_bytes("20%", state_bytes(model))
    fips.compress(model, batches_for(model), fips.CompressionConfig(size="20%", layers="blocks", **settings))
    least = 0.85 if "method" in settings else 0.99  # gptq has whole bits only
    assert least * wanted <= state_bytes(model) <= wanted


def test_what_is_left_dense_counts_among_the_rest() -> None:
    model = wide_model()
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight.zero_()  # nothing reaches gate and up
    wanted = size_bytes("55%", state_bytes(model))
    fips.compress(model, batches_for(model), fips.CompressionConfig(size="55%", layers="mlp"))
    assert "model.layers.1.mlp.up_proj" not in factored_layers(model)
    assert 0.985 * wanted <= state_bytes(model) <= wanted


def test_an_impossible_size_is_refused_with_the_smallest_one() -> None:
    model = wide_model()
    with pytest.raises(BudgetError) as refused:
        plan_compression(model, fips.CompressionConfig(size="12%", layers="mlp"))
    remedy = re.search(r"(with|even with) `([^`]+)` it is ([\d,]+)$", str(refused.value))
    assert remedy is not None
    options = re.findall(r"--(\S+) (\S+)", remedy[2])
    changes = {name.replace("-", "_"): value for name, value in options}
    reached = int(remedy[3].replace(",", ""))
    assert (reached <= size_bytes("12%", state_bytes(model))) is (remedy[1] == "with")
    other = fips.CompressionConfig(size=str(reached), **{"layers": "mlp", **changes})
    assert plan_compression(model, other).groups
    found = re.search(r"the smallest size with the MLPs compressed is ([\d,]+) bytes", str(refused.value))
    assert found is not None
    least = int(found[1].replace(",", ""))
    enough = fips.CompressionConfig(size=str(least), layers="mlp")
    plan = plan_compression(model, enough)
    assert settle_size(plan, model, enough).bits is not None
    with pytest.raises(BudgetError, match="the smallest size"):
        settle_size(plan, model, fips.CompressionConfig(size=str(least - 1), layers="mlp"))


def test_a_size_above_that_of_the_model_is_refused() -> None:
    model = wide_model()
    before = state_bytes(model)
    with pytest.raises(BudgetError, match=f"more than the {before:,} of the model as it is; ask for less"):
        plan_compression(model, fips.CompressionConfig(size=str(before + 1)))
    assert plan_compression(model, fips.CompressionConfig(size=str(before))).groups


@pytest.mark.parametrize("settings", [{}, {"layers": "mlp"}, {"layers": "all"}, {"method": "gptq"}, {"values": "nl4"}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "swin"])
def test_the_smallest_size_of_a_plan_can_be_asked_for_as_it_is_printed(family: str, settings: dict[str, Any]) -> None:
    if family == "swin" and settings.get("layers") == "all":
        pytest.skip("has no vocabulary")
    model = tiny_model(family)
    config = fips.CompressionConfig(bits=14, **settings)
    outline = outline_of_plan(model, plan_compression(model, config), config)
    said = re.fullmatch(r"smallest size: --bits (\S+), (\S+ \S+) for the whole file", smallest_line(outline))
    assert said is not None
    for asked in ({"bits": float(said[1])}, {"size": said[2]}, {"size": said[2].replace(" ", "")},
                  {"size": str(outline.smallest["bytes"])}):  # fmt: skip
        again = fips.CompressionConfig(**asked, **settings)
        assert settle_size(plan_compression(model, again), model, again).bits is not None
    with pytest.raises(BudgetError):
        plan_compression(model, fips.CompressionConfig(size=str(int(outline.smallest["bytes"]) - 1), **settings))


@pytest.mark.parametrize(
    "count", [101, 999, 1_000, 1_001, 8_040, 9_996, 22_323, 99_951, 999_501, 1_234_567, 10**12 + 1]
)
def test_printed_sizes_are_rounded_up(count: int) -> None:
    assert count <= size_bytes(bytes_enough(count), 1) < 1.01 * count


@pytest.mark.slow
def test_a_size_that_is_not_used_up_is_said() -> None:
    model = wide_model()
    report = fips.compress(model, batches_for(model), fips.CompressionConfig(size="60%", layers="blocks"))
    assert state_bytes(model) < size_bytes("30%", report.plan["model"]["bytes"])
    assert "bits a weight; the most that layers take is 8" in " ".join(report.notes)


@pytest.mark.slow
def test_bits_that_are_not_reached_are_said_and_so_is_what_effort_fast_leaves_out() -> None:
    model = wide_model()
    settings = fips.CompressionConfig(bits=4.2, pattern="4:16", values="int4", effort="fast")
    report = fips.compress(model, batches_for(model), settings)
    notes = " ".join(report.notes)
    assert "asked for 4.2 bits a weight; the most that layers take is 1." in notes
    assert "`effort: fast` measures no errors on data held out" in notes
    assert repr(report) == report.summary()


def test_one_of_bits_size_and_budget_is_given() -> None:
    with pytest.raises(ConfigError, match="got bits and size"):
        fips.CompressionConfig(bits=4.0, size="4x")
    with pytest.raises(ConfigError, match="got none"):
        fips.CompressionConfig()


@pytest.mark.slow
def test_the_command_writes_a_file_of_the_size_asked_for(
    llama_directory: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    options = ["--layers", "blocks", "--size", "28%", "--sequence-length", "32", "--num-samples", "8"]
    command = ["compress", str(llama_directory), "--data", str(text), "--output", str(tmp_path / "out"), *options]
    before = state_bytes(fips.models.transformers.load_dense(llama_directory, dtype="auto", device=torch.device("cpu")))
    assert main([*command, "--dry-run"]) == 0
    assert main(command) == 0
    after = state_bytes(fips.load(tmp_path / "out"))
    assert 0.95 * 0.28 * before <= after <= 0.28 * before
    assert "so that all tensors take 28%" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- what is not compressed


def of_bert(**changes: Any) -> tuple[PreTrainedModel, fips.CompressionConfig, list[dict[str, Tensor]]]:
    model = tiny_model("bert")
    return model, fips.CompressionConfig(**{"method": "gptq", "layers": "all", **changes}), batches_for(model, count=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_rest_is_written_in_the_type_asked_for_and_counted(dtype: str, tmp_path: Path) -> None:
    model, config, batches = of_bert(bits=5.0, rest_dtype=dtype)
    plan = fips.plan_compression(model, config)
    packed = [site.name for group in plan.groups for site in group.group.sites]
    kinds = sizes_by_kind(model, layer_bytes(plan), rest_sizes(model, packed, config))
    report = fips.compress(model, batches, config)
    wanted = getattr(torch, dtype)
    assert {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} == {wanted}
    size = fips.save(model, tmp_path / "packed")
    assert size == report.plan["compressed_model"]["bytes"]
    (rest,) = [kind for kind in kinds if kind.kind == "all else"]
    assert rest.bytes_before == 4 * rest.weights
    assert rest.bytes_after == itemsize(wanted) * rest.weights
    with torch.no_grad():
        expected = model(**batches[0]).logits
        assert expected.dtype == wanted
        for loaded in (fips.load(tmp_path / "packed"), AutoModelForMaskedLM.from_pretrained(tmp_path / "packed")):
            assert torch.equal(loaded(**batches[0]).logits, expected)


def test_by_default_the_rest_keeps_its_type() -> None:
    model, config, batches = of_bert(bits=5.0)
    fips.compress(model, batches, config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_the_size_of_the_file_is_met_with_the_rest_in_16_bits(tmp_path: Path) -> None:
    """Half of what the rest takes in 32 bits is there to spend on the matrices."""
    bits = {}
    for dtype in (None, "bfloat16"):
        model, config, batches = of_bert(size="50%", **({} if dtype is None else {"rest_dtype": dtype}))
        before = state_bytes(model)
        report = fips.compress(model, batches, config)
        bits[dtype] = report.config.bits
        assert fips.save(model, tmp_path / str(dtype)) <= 0.5 * before
    assert bits[None] is not None
    assert bits["bfloat16"] is not None
    assert bits["bfloat16"] > bits[None] + 0.5


def test_what_a_class_keeps_in_float32_stays_so() -> None:
    fields = {"d_model": 32, "d_ff": 80, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **fields)).eval()
    ids = torch.arange(12).view(2, 6)
    config = fips.CompressionConfig(method="gptq", bits=5.0, targets=["wi"], rest_dtype="float16")
    report = fips.compress(model, [{"input_ids": ids, "decoder_input_ids": ids}], config)
    types = {name.rpartition(".")[0].rpartition(".")[2]: one.dtype for name, one in model.named_parameters()}
    assert types["wo"] == torch.float32
    assert types["q"] == torch.float16
    assert report.plan["compressed_model"]["bytes"] == state_bytes(model)


@pytest.mark.parametrize("pattern", ["4:16", "2:4"])
def test_the_smallest_size_of_a_fixed_pattern_is_the_one_it_has(pattern: str) -> None:
    """Layers differ in what their scales take, and it was the largest of them."""
    model = tiny_model("llama", hidden_size=128, intermediate_size=384)
    config = fips.CompressionConfig(bits=8, pattern=pattern, values="int4", layers="blocks")
    plan = plan_compression(model, config)
    taken = 8 * plan.factored.bytes / plan.dense.parameters
    groups = [group.group for group in plan.groups]
    least = sizes_of(model, groups, config).least_bits
    assert least == pytest.approx(taken, rel=1e-3)
    again = plan_compression(model, config.replace(bits=least))
    assert again.factored.bytes == plan.factored.bytes
