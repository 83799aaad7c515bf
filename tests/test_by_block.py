"""Compression block by block: passes in steps, one-pass solving, work that is kept, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from conftest import batches_for, tiny_model
from safetensors.torch import load_file
from test_cli import llama_directory, text  # noqa: F401 - fixtures
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

import fips
from fips.calibration.influence import collect_influence
from fips.calibration.inputs import CalibrationData, few_examples, numbered
from fips.calibration.moments import LayerMoments
from fips.calibration.record import ActivationSpool
from fips.calibration.relay import NotAChain, Relay
from fips.calibration.sweep import Sweep
from fips.data import Batches
from fips.errors import ConfigError, FipsError, OutputError
from fips.formats.values import values_named
from fips.layers.linear import factored_layers
from fips.methods.sweep import bytes_beside, steps_of
from fips.methods.workbench import ProgressEvent
from fips.models import locate_layers
from fips.solve.feedback import Rounding, inverse_root, with_feedback
from fips.solve.oneshot import OneShot
from fips.solve.structures import Choice, Pricing
from fips.storage.work import WorkDirectory, kept_work


def run(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(**batch)


def blocks_of(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(sublayer.block for sublayer in locate_layers(model).sublayers))


# Passes in steps


@pytest.fixture
def spool() -> Iterator[ActivationSpool]:
    with ActivationSpool(1 << 20) as found:
        yield found


def t5() -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    """Every block of the decoder reads the output of the encoder: what is handed on is not enough."""
    config = AutoConfig.for_model(
        "t5", d_model=32, d_kv=8, d_ff=80, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=64
    )
    torch.manual_seed(0)
    ids = torch.randint(2, 64, (4, 10))
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :6]}
    return AutoModel.from_config(config).eval(), [batch, {key: value.flip(0) for key, value in batch.items()}]


def albert() -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    """One block that runs three times."""
    config = AutoConfig.for_model(
        "albert", hidden_size=32, embedding_size=16, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval(), [{"input_ids": torch.randint(2, 64, (4, 10))} for _ in range(2)]


def made(family: str) -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    if family in ("t5", "albert"):
        return t5() if family == "t5" else albert()
    model = tiny_model(family)
    return model, batches_for(model, count=3)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "bert", "vit", "swin", "t5", "albert"])
@pytest.mark.parametrize("steps", [1, 2])
def test_moments_do_not_depend_on_the_steps(family: str, steps: int, spool: ActivationSpool) -> None:
    """Bit for bit, whether blocks hand on what they return or, where they are no chain, the pass starts anew."""
    model, batches = made(family)
    located, blocks = locate_layers(model).sublayers, blocks_of(model)
    sites = [site for sublayer in located for site in sublayer.sites]
    with Sweep(model, blocks, numbered(batches), len(batches), run, spool, torch.device("cpu")) as sweep:
        whole = sweep.step(len(blocks), sites).moments
    with Sweep(model, blocks, numbered(batches), len(batches), run, spool, torch.device("cpu")) as sweep:
        found = {}
        for start in range(0, len(blocks), steps):
            names = blocks[start : start + steps]
            own = [site for sublayer in located if sublayer.block in names for site in sublayer.sites]
            found |= sweep.step(len(names), own).moments
    assert found.keys() == whole.keys() == {site.name for site in sites}
    for name, one in whole.items():
        assert torch.equal(found[name].inputs_II, one.inputs_II), name
        assert torch.equal(found[name].mean_I, one.mean_I)


def test_a_moment_is_the_mean_of_the_products(spool: ActivationSpool) -> None:
    """And gate and up, which read the same, share one."""
    model, batches = made("llama")
    (mlp, *_) = locate_layers(model).sublayers
    seen: list[Tensor] = []
    handle = model.get_submodule(mlp.sites[0].name).register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with Sweep(model, blocks_of(model), numbered(batches), len(batches), run, spool, torch.device("cpu")) as sweep:
        found = sweep.step(3, mlp.sites).moments
    handle.remove()
    x_TI = torch.cat([one.flatten(0, 1) for one in seen[1:]])  # the first is that of the example that shows the order
    torch.testing.assert_close(found[mlp.sites[0].name].inputs_II, x_TI.T @ x_TI / len(x_TI))
    assert found[mlp.sites[0].name] is found[mlp.sites[1].name]
    assert found[mlp.sites[2].name] is not found[mlp.sites[0].name]


@pytest.mark.parametrize("size", [512, 700, 1200])
def test_a_large_moment_is_summed_in_strips(size: int) -> None:
    """Only what stands below the diagonal is multiplied; the moment is symmetric to the last bit all the same."""
    x = torch.randn(40, size, generator=torch.Generator().manual_seed(0))
    found = LayerMoments(torch.zeros(size, size), torch.zeros(size), torch.zeros(0, 0))
    for part in x.split(16):
        found.add_inputs(part, None)
    found.note_part()
    assert torch.equal(found.inputs_II, found.inputs_II.T)
    assert torch.allclose(found.inputs_II, x.T @ x, rtol=1e-5, atol=1e-4)
    exact = x.double().T @ x.double()
    assert found.squares == pytest.approx(float((exact / 40).square().sum()) * 40, rel=1e-5)


def test_what_is_held_out_and_how_much_of_a_moment_is_noise() -> None:
    """Held-out and fitted moments, about the mean of all, add up; the noise is what more data would take away."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.2, 2, 24)

    def moments(tokens: int) -> tuple[LayerMoments, Tensor]:
        x = torch.randn(8, tokens, 24, generator=generator) * spread + 3
        whole: LayerMoments | None = None
        for part in x:
            own = LayerMoments(torch.zeros(24, 24), torch.zeros(24), torch.zeros(0, 0))
            own.add_inputs(part, None)
            own.note_part()
            if whole is None:
                whole = own
            else:
                whole.absorb(own, hold=whole.parts % 2 == 1)
        assert whole is not None
        whole.finish(centered=True, examples=1)
        return whole, x

    found, x = moments(40)
    assert found.held is not None
    assert found.noise is not None
    apart = x.flatten(0, 1) - x.mean((0, 1))
    halves = apart.view(8, 40, 24)
    for moment, part in ((found.held.inputs_II, halves[1::2]), (found.fitted_II, halves[::2])):
        flat = part.flatten(0, 1)
        assert torch.allclose(moment, flat.T @ flat / 160, atol=1e-4)
    truth = torch.diag(spread.square())
    identity = truth.diagonal().mean() * torch.eye(24)
    wanted = float((found.inputs_II - truth).square().sum() / (found.inputs_II - identity).square().sum())
    assert found.noise == pytest.approx(wanted, rel=0.35)
    assert found.fitted_noise == pytest.approx(2 * found.noise)
    much, _ = moments(4000)
    assert much.noise is not None
    assert much.noise < 0.03 * found.noise


def test_each_block_of_a_chain_runs_once_per_batch(spool: ActivationSpool) -> None:
    model, batches = made("llama")
    blocks, calls = blocks_of(model), dict.fromkeys(blocks_of(model), 0)
    for name in blocks:
        inner = model.get_submodule(f"{name}.self_attn")  # a block that is done answers without computing
        inner.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    with Sweep(model, blocks, numbered(batches), len(batches), run, spool, torch.device("cpu")) as sweep:
        for sublayer in locate_layers(model).sublayers:
            sweep.step(1, sublayer.sites)
    assert set(calls.values()) == {1 + len(batches)}


def test_a_relay_refuses_blocks_that_are_no_chain(spool: ActivationSpool) -> None:
    model, batches = albert()
    with pytest.raises(NotAChain):
        Relay(model, blocks_of(model), run, spool, torch.device("cpu")).probe(batches[0])
    model, batches = t5()
    relay = Relay(model, blocks_of(model), run, spool, torch.device("cpu"))
    with torch.no_grad():
        relay.advance(3, batches)  # the encoder and the first block of the decoder
        with pytest.raises(NotAChain):
            relay.advance(1, batches)


def test_what_is_given_up_makes_room() -> None:
    with ActivationSpool(100) as spool:
        in_memory = spool.put(torch.ones(25))
        first = spool.put(torch.full((50,), 2.0))
        spool.forget(first)
        again = spool.put(torch.full((50,), 3.0))
        assert spool.file_bytes == 200
        assert torch.equal(spool.get(again), torch.full((50,), 3.0))
        spool.forget(in_memory)
        assert spool.put(torch.ones(25)).ram is not None


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"effort": "fast"}, {"method": "gptq"}, {"method": "sparsegpt"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_little_memory_gives_the_same_layers(family: str, settings: dict[str, Any]) -> None:
    states = []
    for memory in (1 << 30, 1):
        model = tiny_model(family)
        config = fips.CompressionConfig(bits=6.0, metric={"memory": memory}, activation_memory=memory, **settings)
        report = fips.compress(model, batches_for(model), config)
        assert all(group["relative_error_final"] > 0 for group in report.groups)
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_several_steps_that_keep_their_moments_give_the_same_layers(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all moments fit, they are measured once, in steps; what is held out is given up after the trials."""
    states, measured = [], []
    step = Sweep.step
    monkeypatch.setattr(Sweep, "step", lambda *args: measured.extend([1] * bool(args[2])) or step(*args))
    for size in (1 << 29, 1):
        monkeypatch.setattr("fips.methods.sweep.STEP_MEMORY", size)
        measured.clear()
        model = tiny_model(family)
        count = len(blocks_of(model))
        fips.compress(model, batches_for(model), fips.CompressionConfig(bits=6.0))
        states.append(model.state_dict())
        assert len(measured) == (1 if size > 1 else count)
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


# Influence


def test_influence_is_the_mean_square_of_gradients_and_inputs() -> None:
    model = tiny_model("vit").requires_grad_(False)
    batches = batches_for(model, count=2)
    sites = locate_layers(model).sublayers[1].sites
    kept: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_: Any, args: Any, output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            output.retain_grad()
            kept[name].append(output)
            return output

        return hook

    found = collect_influence(model, sites, blocks_of(model), batches, run, examples=8, temperature=2.0, seed=3)
    handles = [model.get_submodule(site.name).register_forward_hook(keep(site.name)) for site in sites]
    with torch.enable_grad():  # the same random directions, without recomputation
        again = collect_influence(model, sites, (), batches, run, examples=8, temperature=2.0, seed=3)
    for handle in handles:
        handle.remove()
    for site in sites:
        gradients_TO = torch.cat([one.grad.flatten(0, 1) for one in kept[site.name] if one.grad is not None])
        examples = sum(len(batch["pixel_values"]) for batch in batches)
        torch.testing.assert_close(found[site.name].outputs_O, gradients_TO.square().sum(0) / examples)
        torch.testing.assert_close(found[site.name].outputs_O, again[site.name].outputs_O)
        assert torch.equal(found[site.name].inputs_I, again[site.name].inputs_I)


def test_padding_has_no_influence() -> None:
    model = tiny_model("bert").requires_grad_(False)
    ids = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    padded = nn.functional.pad(ids, (0, 5))
    mask = torch.cat([torch.ones(2, 7, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)], 1)
    sites, found = locate_layers(model).sublayers[0].sites, []
    for batch in ({"input_ids": ids, "attention_mask": mask[:, :7]}, {"input_ids": padded, "attention_mask": mask}):
        found.append(collect_influence(model, sites, (), [batch], run, examples=2, temperature=1.0, seed=0))
    for site in sites:
        torch.testing.assert_close(found[0][site.name].inputs_I, found[1][site.name].inputs_I)
        torch.testing.assert_close(found[0][site.name].outputs_O, found[1][site.name].outputs_O, rtol=1e-4, atol=1e-9)


def test_a_few_examples_are_cut_out_of_batches() -> None:
    ids = torch.arange(10 * 600).view(10, 600)
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    first, second, rest, batch = few_examples([full, full], 6)
    assert torch.equal(first["input_ids"], ids[:4, :128])
    assert torch.equal(second["attention_mask"], torch.ones(2, 128, dtype=torch.long))
    assert torch.equal(rest["input_ids"], ids[6:])
    assert batch is full
    hidden = {**full, "attention_mask": torch.cat([torch.zeros(10, 1), torch.ones(10, 599)], 1)}
    assert next(few_examples([hidden], 1))["input_ids"].shape == (1, 600)
    assert [len(part) for part in few_examples([torch.rand(20, 3, 4, 4)], 12)] == [8, 4, 8]
    odd = {"input_ids": ids, "other": torch.tensor(1)}
    assert list(few_examples([odd], 3)) == [odd]


# One pass of pruning and rounding


def problem(rows: int = 12, columns: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.T @ x / 200


class ToWhole(Rounding):
    def nearest(self, columns: Tensor) -> Tensor:
        return columns.round()


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("columns", [20, 150])
def test_feedback_is_that_of_single_columns_in_double_precision(pruned: bool, columns: int) -> None:
    """The textbook's loop: after each column all behind it answer, by the inverse of what is left of the moment."""
    matrix_NK, moment_KK = problem(columns=columns)
    moment_KK = moment_KK + 0.1 * moment_KK.diagonal().mean() * torch.eye(columns)
    mask_JN = torch.rand(columns, len(matrix_NK), generator=torch.Generator().manual_seed(1)) < 0.5
    choose = (lambda costs_JN, start: mask_JN[start : start + len(costs_JN)]) if pruned else None
    found_NK, mask_NK = with_feedback(matrix_NK, inverse_root(moment_KK, 0.0), ToWhole(), choose)
    rest, left = matrix_NK.double().clone(), moment_KK.double()
    expected = torch.empty_like(rest)
    for column in range(columns):
        inverse = torch.linalg.inv(left[column:, column:])
        expected[:, column] = rest[:, column].round() * (mask_JN[column] if pruned else 1)
        error = (rest[:, column] - expected[:, column]) / inverse[0, 0]
        rest[:, column:] -= torch.outer(error, inverse[0])
    assert (found_NK.double() - expected).abs().max() < 1e-3
    assert mask_NK is None if not pruned else torch.equal(mask_NK, mask_JN.T)  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [1, 2, 127, 128, 129, 300])
def test_the_inverse_root_is_upper_and_its_square_the_inverse(columns: int) -> None:
    _, moment_KK = problem(columns=columns)
    damped_KK = moment_KK.double() + 0.01 * moment_KK.diagonal().mean() * torch.eye(columns)
    upper_KK = inverse_root(moment_KK, 0.01)
    assert torch.equal(upper_KK, upper_KK.triu())
    assert (upper_KK.diagonal() > 0).all()
    assert (upper_KK.double().T @ upper_KK.double() @ damped_KK - torch.eye(columns)).abs().max() < 1e-3


@pytest.mark.parametrize("worst", [-3.0, -500.0])
def test_a_moment_of_rounding_errors_is_damped_until_it_is_one(worst: float) -> None:
    """Negative directions far beyond the mean: what comes out has no correlations worth the name, and no error."""
    generator = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(48, 48, generator=generator))
    values = torch.ones(48)
    values[0], values[1] = worst, 2 - worst
    upper_KK = inverse_root(turn @ torch.diag(values) @ turn.T, 0.01)
    assert upper_KK.isfinite().all()
    assert (upper_KK.diagonal() > 0).all()
    spread = upper_KK.triu(1).norm(dim=1) / upper_KK.diagonal()
    assert spread.max() < 0.5
    with pytest.raises(torch.linalg.LinAlgError, match="not finite"):  # type: ignore[attr-defined]
        inverse_root(torch.full((4, 4), torch.nan), 0.01)


def test_feedback_beats_rounding_to_the_nearest_and_a_diagonal_has_none() -> None:
    matrix_NK, moment_KK = problem()
    choice, pricing = Choice(False, "unstructured", "int4"), Pricing(value=2.0, basis_entry=2.0, row_scale=2.0)
    ones_N = torch.ones(len(matrix_NK))
    solved = OneShot(matrix_NK, moment_KK, ones_N, 1, pricing)
    plain = OneShot(matrix_NK, moment_KK.diagonal().clone(), ones_N, 1, pricing)
    size = solved.dense_bytes(choice)
    found, nearest = solved.solve(choice, size), plain.solve(choice, size)
    assert nearest.grids is not None
    (grid,) = nearest.grids
    values = values_named("int4")
    assert torch.equal(grid.codes_RF, values.quantize(matrix_NK, grid.steps_N))
    assert solved.loss(found.factors_RF[0]) < 0.7 * solved.loss(nearest.factors_RF[0])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("values", ["nl4", "nl4g16", "int4"])
def test_turned_columns_hold_large_weights_better(values: str, axis: Literal[0, 1]) -> None:
    """A twentieth of the columns is ten times as large; errors count in the metric as it was given."""
    generator = torch.Generator().manual_seed(4)
    matrix_NK = torch.randn(48, 128, generator=generator)
    matrix_NK[:, torch.randperm(128, generator=generator)[:6]] *= 10
    x = torch.randn(512, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    moment_KK, ones_N = x.T @ x / 512, torch.ones(48)
    weight_DF = matrix_NK.T.contiguous() if axis == 0 else matrix_NK
    choice, pricing = Choice(False, "unstructured", values), Pricing(value=2.0, basis_entry=2.0, row_scale=2.0)
    losses = {}
    for rotation in (1, 64):
        layer = OneShot(weight_DF, moment_KK, ones_N, axis, pricing, rotation=rotation)
        found = layer.solve(choice, layer.dense_bytes(choice))
        assert found.grids is not None
        assert torch.allclose(found.grids[0].factor(), found.factors_RF[0], atol=1e-4)
        error_NK = matrix_NK - (found.factors_RF[0].T if axis == 0 else found.factors_RF[0])
        losses[rotation] = float((error_NK @ moment_KK * error_NK).sum())
        assert found.losses[-1] == pytest.approx(losses[rotation], rel=1e-3)
    assert losses[64] < 0.7 * losses[1]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block4"])
@pytest.mark.parametrize("values", ["float", "int3", "int3g16"])
def test_a_structure_keeps_to_its_bytes_and_its_pattern(axis: Any, pattern: str, values: str) -> None:
    generator = torch.Generator().manual_seed(2)
    weight_DF = torch.randn(32, 48, generator=generator)
    inputs = weight_DF.shape[axis]
    x = torch.randn(300, inputs, generator=generator)
    outputs = torch.rand(weight_DF.shape[1 - axis], generator=generator)
    layer = OneShot(weight_DF, x.T @ x / 300, outputs, axis, Pricing(2.0, 2.0, row_scale=2.0))
    choice = Choice(False, pattern, values)
    size = layer.fixed_bytes(choice) or 0.6 * layer.dense_bytes(choice) + 0.4 * layer.least_bytes(choice)
    found = layer.solve(choice, size)
    (mask_RF,) = found.masks_RF
    entry = layer.pricing.entry(choice.numbers)
    assert layer.overhead(choice) + mask_RF.sum() * entry + layer._pattern_bytes(choice) <= size * (1 + 1e-6)
    assert bool((found.factors_RF[0][~mask_RF] == 0).all())
    if pattern == "2:4":
        groups = (mask_RF.T if axis == 0 else mask_RF).reshape(-1, 4)
        assert bool((groups.sum(1) == 2).all())
    if pattern == "block4":
        groups = mask_RF.reshape(32, -1, 4)
        assert bool((groups.all(-1) | ~groups.any(-1)).all())


# Work that is kept


def fingerprints(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "run.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"effort": "fast"}, {"method": "gptq"}], ids=str)
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_run_that_was_ended_goes_on_to_the_same_bytes(settings: dict[str, Any], at: int, tmp_path: Path) -> None:
    config = fips.CompressionConfig(bits=6.0, metric={"memory": 1}, **settings)
    expected = tiny_model("llama")
    fips.compress(expected, batches_for(expected), config)
    made: list[str] = []

    def end(event: ProgressEvent) -> None:
        if event.stage in ("try", "solve"):
            made.append(f"{event.stage} {event.group}")
            if len(made) > at:
                raise KeyboardInterrupt

    model = tiny_model("llama")
    with suppress(KeyboardInterrupt):
        fips.compress(model, batches_for(model), config, progress=end, work=tmp_path / "work")
    before, model, at = made.copy(), tiny_model("llama"), 100
    report = fips.compress(model, batches_for(model), config, progress=end, work=tmp_path / "work")
    lines = [line.split()[2:] for line in (tmp_path / "work" / "log.txt").read_text().splitlines()]
    assert {line[0] for line in lines} == {f"{name}:" for name in blocks_of(tiny_model("llama"))}
    sizes = {line[0]: float(line[1]) for line in lines}
    layers = report.plan["layers"]
    whole = 8 * layers["factored"]["bytes"] / layers["dense"]["parameters"]
    assert sum(sizes.values()) / len(sizes) == pytest.approx(whole, abs=1e-3)
    assert len(before) == len(set(made[: len(before)]))
    assert len(made) - len(set(made)) <= 1  # of the block whose error was not measured
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())


@pytest.mark.slow
def test_moments_that_another_method_left_do_not_change_what_is_chosen() -> None:
    """They do not say what was held out, so the default measures again."""
    alone, after = tiny_model("llama"), tiny_model("llama")
    batches, kept = batches_for(alone), {}
    fips.compress(tiny_model("llama"), batches, fips.CompressionConfig(bits=6.0, method="gptq"), moments=kept)
    (left,) = kept.values()
    assert all(one.held is None for one in left.values())
    fips.compress(alone, batches, fips.CompressionConfig(bits=6.0))
    fips.compress(after, batches, fips.CompressionConfig(bits=6.0), moments=kept)
    (found,) = kept.values()
    assert all(one.held is not None for one in found.values())
    expected = alone.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.state_dict().items())


def test_finished_blocks_are_not_made_again(tmp_path: Path) -> None:
    config = fips.CompressionConfig(bits=6.0, method="gptq")
    reports = []
    for number in range(2):
        model, events = tiny_model("llama"), []
        reports.append(fips.compress(model, batches_for(model), config, progress=events.append, work=tmp_path / "work"))
        assert ("solve" in {event.stage for event in events}) == (number == 0)
        assert "measure" not in {event.stage for event in events} or number == 0
    first, second = reports
    assert "earlier runs" not in first.phases
    assert 0 < second.phases["earlier runs"] <= first.seconds
    assert sum(second.phases.values()) <= second.seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bits": 5.0}, r"settings \(bits: 6.0 there, 5.0 now\)"),
        ({"seed": 1}, r"settings \(seed: unset there, 1 now\)"),
        ({"metric": {"token_floor": 0.5}}, r"settings \(token_floor: 0.4 there, 0.5 now\)"),
        (
            {"bits": 5.0, "metric": {"token_floor": 0.5}},
            r"settings \(bits: 6.0 there, 5.0 now; token_floor: 0.4 there, 0.5 now\)",
        ),
        ({"weights": True}, r"model; remove"),
        ({"data": True}, r"data; remove"),
    ],
)
def test_the_work_of_another_run_is_refused_with_what_differs(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model = tiny_model("vit")
    config = fips.CompressionConfig(bits=6.0, metric={"token_floor": 0.4})
    fips.compress(model, batches_for(model), config, work=tmp_path / "work")
    other = tiny_model("vit")
    batches = batches_for(other)
    if change.pop("weights", False):
        nn.init.ones_(other.classifier.bias)
    if change.pop("data", False):
        batches = batches[1:]
    config = fips.CompressionConfig(**{"bits": 6.0, "metric": {"token_floor": 0.4}, **change})
    with pytest.raises(OutputError, match=f"belongs to a run with other {named}"):
        fips.compress(other, batches, config, work=tmp_path / "work")
    assert not factored_layers(other)


def test_a_work_directory_is_a_directory_of_ours_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        WorkDirectory(tmp_path / "file", {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(OutputError, match="is no work directory"):
        WorkDirectory(tmp_path / "full", {})
    with pytest.raises(OutputError, match="cannot write work directory"):
        WorkDirectory(Path("/proc/no"), {})
    work = WorkDirectory(tmp_path / "work", {"a": 1})
    assert work.get("x") is None
    work.put("x", {"t": torch.arange(3)}, {"n": [1]})
    tensors, fields = work.get("x") or ({}, {})
    assert torch.equal(tensors["t"], torch.arange(3))
    assert fields == {"n": [1]}
    (tmp_path / "work" / "x.safetensors").write_bytes(b"12345678{")
    with pytest.raises(OutputError, match=r"`.*x.safetensors` is damaged"):
        work.get("x")
    assert fingerprints(tmp_path / "work") == {"a": 1}
    (tmp_path / "work" / "run.json").write_text("[]")
    with pytest.raises(OutputError, match=r"must hold a JSON object, got list; remove the work directory"):
        WorkDirectory(tmp_path / "work", {"a": 1})


@pytest.mark.parametrize("changed", ["a tensor", "a field"])
def test_a_piece_that_the_disk_changed_is_not_believed(changed: str, tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path, {})
    work.put("x", {"t": torch.arange(300, dtype=torch.bfloat16), "none": torch.zeros(0)}, {"rate": 0.5})
    path = tmp_path / "x.safetensors"
    content = bytearray(path.read_bytes())
    place = len(content) - 7 if changed == "a tensor" else content.index(b"0.5") + 2
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(OutputError, match=r"`.*x.safetensors` is damaged \(its SHA-256 is not .*\); remove it"):
        work.get("x")


@pytest.mark.parametrize(
    ("output", "work", "said"),
    [
        ("run/model", "run", "the output `.*run/model` lies in the work directory"),
        ("model", ".", "the output `.*model` lies in the work directory"),
        ("run", "run", "is both the output and the work directory"),
        ("run", "run/work", "the work directory `.*run/work` lies in the output"),
        ("run", "link/work", "the work directory `.*link/work` lies in the output"),
    ],
)
def test_an_output_and_its_work_directory_are_apart(output: str, work: str, said: str, tmp_path: Path) -> None:
    """The work directory is removed at the end; a result in it would be gone with it."""
    (tmp_path / "link").symlink_to("run")
    begun = False
    with (
        pytest.raises(OutputError, match=f"{said}.*choose another with `--work`"),
        kept_work(tmp_path / work, tmp_path / output, first=True, keep=False),
    ):
        begun = True
    assert not begun


def test_what_others_put_into_a_work_directory_stays(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with kept_work(work, tmp_path / "model", first=True, keep=False):
        WorkDirectory(work, {}).put("x", {"t": torch.arange(3)}, {})
        (work / "thesis.txt").write_text("years")
    assert [path.name for path in work.iterdir()] == ["thesis.txt"]
    with kept_work(tmp_path / "other", tmp_path / "model", first=True, keep=False):
        WorkDirectory(tmp_path / "other", {}).put("x", {"t": torch.arange(3)}, {})
        for name in (".y.safetensors.123", ".seconds.txt.123", ".run.json.123"):
            (tmp_path / "other" / name).write_text("of a process that was killed")
    assert not (tmp_path / "other").exists()


# Processes


def command(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        "fips", "compress", str(model), "--data", str(data), "--bits", "6.0", "--num-samples", "12",
        "--sequence-length", "16", "--batch-size", "2", "--output", str(output), *more,
    ]  # fmt: skip


def torchrun(count: int, *words: str) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launch, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def kill_family(process: subprocess.Popen[str]) -> None:
    """The launcher and its workers, which are in sessions of their own."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    family = [process.pid]
    for pid in family:
        family += children.get(pid, [])
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture
def source(llama_directory: Path, text: Path) -> tuple[Path, Path]:  # noqa: F811
    return llama_directory, text


@pytest.mark.slow
def test_what_killed_processes_left_is_gone_on_with_by_any_number(source: tuple[Path, Path], tmp_path: Path) -> None:
    """Two are killed in the middle, three go on, and what is written is what one process writes (20 times at random
    moments, by as many as before: benchmarks/kill_and_resume.py)."""
    from fips.cli import main

    assert main(command(*source, tmp_path / "whole")[1:]) == 0
    output = tmp_path / "out"
    process = torchrun(2, *command(*source, output, "--memory", "20kB"))
    while process.poll() is None and len(list((tmp_path / "out.work").glob("*.safetensors"))) < 5:
        time.sleep(0.02)
    kill_family(process)
    assert not output.exists()
    process = torchrun(3, *command(*source, output, "--memory", "20kB"))
    words, _ = process.communicate(timeout=300)
    assert process.returncode == 0, words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    found, expected = (load_file(place / "model.safetensors") for place in (output, tmp_path / "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_part_of_the_batches_is_made_without_the_others() -> None:
    made: list[int] = []

    def collate(chunk: Sequence[int]) -> dict[str, Tensor]:
        made.append(chunk[0])
        return {"input_ids": torch.tensor([[3, 4 + chunk[0]]])}

    batches = Batches(kind="text", description={}, num_samples=6, chunks=[[n] for n in range(6)], collate=collate)
    data = CalibrationData(tiny_model("llama"), batches, seed=0)
    data.check()
    made.clear()
    found = [(number, int(batch["input_ids"][0, 1])) for number, batch in data.part(lambda number: number % 4 == 1)]
    assert found == [(1, 5), (5, 9)]
    assert made == [1, 5]
    listed = CalibrationData(tiny_model("llama"), list(batches), seed=0)
    listed.check()
    again = [(number, int(batch["input_ids"][0, 1])) for number, batch in listed.part(lambda number: number % 4 == 1)]
    assert again == found


def test_several_processes_keep_the_moments_of_their_own_blocks() -> None:
    """3 blocks of 100 bytes: of 2 ranks the first keeps two of them, and a step of one block holds 6 moments a rank."""
    blocks = [SimpleNamespace(moment_bytes=100) for _ in range(3)]
    assert [len(step) for step in steps_of(blocks, 700, ranks=2)] == [1, 1, 1]  # type: ignore[arg-type]
    assert bytes_beside(blocks, 700, ranks=2) is None  # type: ignore[arg-type]
    assert bytes_beside(blocks, 800, ranks=2) == 200  # type: ignore[arg-type]


def test_methods_that_do_not_share_the_work_refuse_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from fips.ranks import Ranks

    @contextmanager
    def two() -> Iterator[Ranks]:
        yield Ranks(0, 2)

    monkeypatch.setattr(sys.modules["fips.compression"], "joined", two)
    model = tiny_model("vit")
    for config in (fips.CompressionConfig(bits=8.0, method="svd"), fips.CompressionConfig(bits=8.0, effort="max")):
        with pytest.raises(ConfigError, match="runs in one process, got 2"):
            fips.compress(model, batches_for(model), config)
    with pytest.raises(ConfigError, match="give `work`"):
        fips.compress(model, batches_for(model), fips.CompressionConfig(bits=8.0))


@pytest.mark.slow
def test_finished_work_is_named_when_a_command_fails(
    source: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fips.app import compressing
    from fips.cli import main

    def fail(*_: Any, **__: Any) -> None:
        raise FipsError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(compressing, "_write", fail)
        assert main(command(*source, tmp_path / "out")[1:]) == 1
    assert "the command that began it goes on from there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    assert main(command(*source, tmp_path / "out")[1:]) == 0
    assert "`out.work` keeps what earlier runs finished in " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
