"""Operations of a compression against a count by hand, and what a run is said to take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_bench import seq2seq
from test_cli import llama_directory, text  # noqa: F401

from fips.app.fitting import examples_of
from fips.app.forecast import Forecast
from fips.calibration.moments import moment_bytes
from fips.cli import main
from fips.config import CompressionConfig, DataConfig
from fips.estimate import Operations, Speed, calibration_memory, operations
from fips.estimate.time import timed_dtype
from fips.models.transformers import build_empty
from fips.plan.plan import plan_compression
from fips.solve.oneshot import SAMPLE

CPU = torch.device("cpu")
LENGTH = 16


def examples(count: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.empty(count, LENGTH, dtype=torch.int64, device="meta")}


def counted(count: int = 8, **settings: Any) -> tuple[Operations | None, Any]:
    model = tiny_model("llama")
    config = CompressionConfig(**{"bits": 6.0, "layers": "mlp", **settings})
    plan = plan_compression(model, config)
    found = operations(build_empty(model.config), plan, config, examples, count=count, device=CPU)
    return found, (model, config, plan)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_are_told(family: str) -> None:
    model = seq2seq(family)
    model.config.architectures = [type(model).__name__]
    config = CompressionConfig(bits=6.0, layers="mlp")
    plan, empty = plan_compression(model, config), build_empty(model.config)
    made = examples_of(empty, DataConfig(source="", sequence_length=LENGTH))
    found = operations(empty, plan, config, made, count=8, device=CPU)
    assert found is not None
    assert found.products > 0
    need = calibration_memory(empty, plan, config, made, device=CPU)
    assert need is not None
    assert need.total(8) > need.total(1)


def test_judging_a_basis_takes_the_moments_of_half_the_data_too() -> None:
    model = build_empty(tiny_model("llama").config)
    needs = []
    for sharing in ("never", "auto"):
        config = CompressionConfig(bits=6.0, effort="max", sharing=sharing, layers="mlp")
        plan = plan_compression(model, config)
        need = calibration_memory(model, plan, config, examples, device=CPU)
        assert need is not None
        needs.append(need.total(8))
    sites = [site for group in plan.groups for site in group.group.sites]
    assert needs[1] - needs[0] == 2 * moment_bytes(sites)


def forward_by_hand(model: Any) -> float:
    """Of the linear layers of blocks and of attention, for one example; the head sees the last token."""
    config = model.config
    head = config.vocab_size * config.hidden_size
    linear = sum(2 * module.weight.numel() * LENGTH for module in model.modules() if type(module) is torch.nn.Linear)
    heads, width = config.num_attention_heads, config.head_dim
    scores = config.num_hidden_layers * heads * 2 * (2 * LENGTH * LENGTH * width)
    return linear - 2 * head * (LENGTH - 1) + scores


def test_gptq_by_hand() -> None:
    found, (model, _, plan) = counted(method="gptq")
    assert found is not None
    sites = [site for group in plan.groups for site in group.group.sites]
    distinct = {site.name.replace("gate", "up"): site for site in sites}.values()  # gate and up read the same
    moments = sum(2 * site.inputs**2 * LENGTH for site in distinct)
    assert found.products == pytest.approx(8 * (forward_by_hand(model) + moments), rel=0.05)
    assert found.roots == pytest.approx(sum(4 / 3 * site.inputs**3 for site in sites))
    assert found.rounding == pytest.approx(sum(3 * site.outputs * site.inputs**2 for site in sites))
    assert found.total == found.products + found.roots + found.rounding


@pytest.mark.slow
def test_the_default_tries_on_a_sample_and_asks_for_gradients() -> None:
    plain, _ = counted(method="gptq")
    found, (_, config, plan) = counted()
    assert plain is not None
    assert found is not None
    sites = [site for group in plan.groups for site in group.group.sites]
    tried = sum(3 * SAMPLE * len(config.whole_choices) * site.inputs**2 for site in sites)
    assert found.rounding == pytest.approx(plain.rounding + tried)
    assert found.roots == pytest.approx(2 * plain.roots)
    assert found.products > 2 * plain.products, "a backward pass of each of the examples beside the forward pass"


@pytest.mark.slow
def test_little_memory_takes_a_second_pass() -> None:
    once, _ = counted(count=1000)
    twice, _ = counted(count=1000, metric={"memory": 1})
    assert once is not None
    assert twice is not None
    influence, _ = counted(count=0, metric={"memory": 1})
    assert influence is not None
    assert twice.products / once.products > 1.5


def test_methods_that_train_are_not_told() -> None:
    assert counted(distill={"steps": 5})[0] is None


def test_a_speed_is_that_of_this_machine() -> None:
    speed = Speed.measured(CPU)
    assert min(speed.products, speed.roots, speed.rounding) > 1e8
    work = Operations(speed.products, 2 * speed.roots, 3 * speed.rounding)
    assert speed.seconds(work) == pytest.approx(6)
    assert timed_dtype(CompressionConfig(bits=6.0, precision="bfloat16"), tiny_model("vit"), CPU) is torch.bfloat16


def test_a_line_says_what_is_known() -> None:
    whole = Forecast(
        device="cpu", examples=128, operations=2e13, seconds=600, memory_bytes=2 * 10**9, program_bytes=10**9,
        available_bytes=8 * 10**9, free_disk_bytes=10**10,
    )  # fmt: skip
    assert whole.line() == (
        "estimate for 128 examples on cpu: about 10 min (2.0e+13 operations); "
        "tensors in memory 2.00 GB of 8.00 GB free beside 1.00 GB of the program itself; 10.0 GB free on the disk"
    )
    assert Forecast(device="cpu", examples=1).line() == "estimate for 1 examples on cpu: time not known beforehand"
    short = Forecast(device="cpu", examples=1, operations=1e9, seconds=2)
    assert short.line() == "estimate for 1 examples on cpu: a minute or less (1.0e+09 operations)"


@pytest.mark.slow
def test_a_run_begins_with_what_it_will_take(
    llama_directory: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["compress", str(llama_directory), "--data", str(text), "--bits", "6", "--method", "gptq"]
    command += ["--num-samples", "8", "--sequence-length", "16"]
    assert main([*command, "--dry-run", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)["estimate"]
    assert estimate["examples"] == 8
    assert 0 < estimate["seconds"] < 60
    assert estimate["memory_bytes"] < estimate["available_bytes"]
    assert estimate["program_bytes"] > 10**8  # torch alone
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.startswith("estimate for 8 examples on cpu: a minute or less ")
