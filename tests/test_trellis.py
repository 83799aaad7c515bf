"""Values that are coded together: what codes stand for, the search for the best, what it may be combined with."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import batches_for, tiny_model
from test_kernels import ROUNDS_MANY, assert_close, rounded_inputs
from torch import Tensor
from transformers import PreTrainedModel

import fips
from fips.errors import BackendError, BudgetError, ConfigError
from fips.formats import rotation
from fips.formats.packed import Packed, check_packed, to_dense
from fips.formats.trellis import RUN, Trellis
from fips.formats.values import automatic_values, values_named
from fips.kernels import cpu
from fips.layers.linear import FactoredLinear, factored_layers
from fips.methods.fips.method import _say_that_codes_are_left_out
from fips.solve.coded import rounded
from fips.solve.descent import descend
from fips.solve.feedback import inverse_root, with_feedback
from fips.solve.grids import grid_for

needs_library = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "library present")
NAMES = ["tc2", "tc3", "tc4", "tc2g64", "tc2g16", "tc2g32", "tc3g16", "tc4g32", "tc4g128"]


def code(name: str) -> Trellis:
    found = values_named(name)
    assert isinstance(found, Trellis)
    return found


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cost(values: Trellis, codes_JN: Tensor, wanted_JN: Tensor, weight_JN: Tensor) -> Tensor:
    return ((values.decode(codes_JN.T).T - wanted_JN).square() * weight_JN).sum(1)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_the_formula_in_the_docstring(name: str) -> None:
    values = code(name)
    codes_NK = torch.randint(0, 1 << values.bits, (2 * RUN + 3, 5), generator=torch.Generator().manual_seed(1))
    numbers_NK = values.decode(codes_NK)
    for n, k in itertools.product((0, 1, 2, 3, 7, RUN - 1, RUN, RUN + 1, 2 * RUN + 2), range(5)):
        place = int(codes_NK[n, k])
        for back in range(1, min(values.memory, n % RUN) + 1):
            place ^= values.history[back - 1][int(codes_NK[n - back, k])]
        assert numbers_NK[n, k] == values.levels[place]


@pytest.mark.parametrize("name", NAMES)
def test_numbers_and_stored_bytes_lead_back_to_the_codes(name: str) -> None:
    values = code(name)
    sign = 1 << (values.bits - 1)
    codes_NK = torch.randint(-sign, sign, (RUN + 9, 7), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    weight_N = torch.ones(len(codes_NK))
    weight_N[[3, RUN + 1]] = 0  # what these rows stand for counts nowhere; others can follow all the same
    found_NK = values.decode(codes_NK)
    numbers_KN, again_KN = rounded(values, found_NK.T.contiguous(), weight_N)
    assert again_KN is not None
    assert torch.equal(values.decode(again_KN.T), numbers_KN.T)
    assert torch.equal(numbers_KN.T[weight_N > 0], found_NK[weight_N > 0])
    stored = values.pack(codes_NK.flatten())
    assert stored.numel() == values.nbytes(codes_NK.numel(), 4) == -(-codes_NK.numel() * values.bits // 8)
    assert torch.equal(values.unpack(stored, codes_NK.numel()), codes_NK.flatten())


@pytest.mark.parametrize("name", ["tc2", "tc3", "tc4"])
def test_levels_that_can_follow_the_same_codes_differ(name: str) -> None:
    values = code(name)
    codes = 1 << values.bits
    for first in range(0, len(values.levels), codes):
        assert len(set(values.levels[first : first + codes])) == codes
    assert all(0 <= place < len(values.levels) for row in values.history for place in row)


@pytest.mark.parametrize("name", ["tc2", "tc3"])
def test_the_search_finds_the_best_of_all_ways(name: str) -> None:
    values = code(name)
    wanted_JN = normal(3, 5) * values.deviation
    weight_JN = normal(3, 5, seed=1).exp()
    ways = torch.cartesian_prod(*[torch.arange(1 << values.bits)] * 5)
    for wanted_N, weight_N in zip(wanted_JN, weight_JN, strict=True):
        best = cost(values, ways, wanted_N.expand(len(ways), -1), weight_N.expand(len(ways), -1)).min()
        found = values.search(wanted_N.unsqueeze(0), weight_N.unsqueeze(0))
        assert torch.isclose(cost(values, found, wanted_N, weight_N)[0], best)


@needs_library
@pytest.mark.parametrize("name", ["tc2", "tc3", "tc4"])
@pytest.mark.parametrize("rows", [1, 2, 5, RUN, RUN + 1, 2 * RUN + 40])
def test_the_compiled_search_finds_as_good_a_way(name: str, rows: int) -> None:
    values = code(name)
    wanted_JN, weight_JN = normal(4, rows) * values.deviation, normal(4, rows, seed=1).exp()
    wanted_JN[0, 0], wanted_JN[1] = 1e6, 0  # far outside the levels; all alike
    codes_JN, numbers_JN = cpu.search_paths(values, wanted_JN, weight_JN)
    assert torch.equal(values.decode(codes_JN.T).T, numbers_JN)
    found, best = (cost(values, one, wanted_JN, weight_JN) for one in (codes_JN, values.search(wanted_JN, weight_JN)))
    assert (found[1:] <= 1.002 * best[1:] + 1e-3).all()
    assert found[0] <= (1 + 1e-5) * best[0]


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("name", ["tc2", "tc3", "tc4"])
@pytest.mark.parametrize("columns", [1, 5])
def test_every_instruction_set_finds_the_same_way(
    name: str, columns: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several runs of rows are searched side by side, as many as the registers hold; some are shorter or missing."""
    values = code(name)
    wanted_JN, weight_JN = normal(columns, 2 * RUN + 40) * values.deviation, normal(columns, 2 * RUN + 40, seed=1).exp()
    monkeypatch.setattr(cpu, "_best", cpu.ISAS.index("portable"))
    expected = cpu.search_paths(values, wanted_JN, weight_JN)
    monkeypatch.setattr(cpu, "_best", cpu.ISAS.index(isa))
    for found, want in zip(cpu.search_paths(values, wanted_JN, weight_JN), expected, strict=True):
        assert torch.equal(found, want)


@needs_library
def test_a_search_with_arguments_that_do_not_fit_is_refused() -> None:
    wanted_JN = normal(2, 8)
    with pytest.raises(BackendError, match="does not search codes of nl4"):
        cpu.search_paths(values_named("nl4"), wanted_JN, wanted_JN)


@pytest.mark.parametrize("name", ["tc2", "tc3", "tc4"])
def test_normal_numbers_lose_what_the_docs_say(name: str) -> None:
    values = code(name)
    wanted_N = normal(256 * RUN) * values.deviation
    found_N, _ = rounded(values, wanted_N, torch.ones(len(wanted_N)))
    error = float((found_N - wanted_N).square().mean() / values.deviation**2)
    assert error == pytest.approx(values.rounding_error, rel=0.05)
    assert error < 0.66 * float(values_named(f"nl{values.bits}").rounding_error)


def test_rows_that_weigh_more_are_met_better() -> None:
    values = code("tc2")
    wanted_N = normal(4 * RUN) * values.deviation
    weight_N = torch.where(torch.arange(4 * RUN) % 2 == 0, 20.0, 1.0)
    error_N = (rounded(values, wanted_N, weight_N)[0] - wanted_N).square()
    assert error_N[::2].mean() < 0.6 * error_N[1::2].mean()


def test_a_row_of_zeros_and_a_matrix_of_zeros_stay_zero() -> None:
    matrix_NK = normal(40, 64)
    matrix_NK[3] = 0
    for name in ("tc3", "tc3g64"):
        for matrix in (matrix_NK, torch.zeros(40, 64)):
            grid = grid_for(code(name), matrix, torch.ones(64), torch.float32)
            found_NK, _ = with_feedback(matrix, inverse_root(torch.eye(64), 0.01), grid)
            back_NK = code(name).dequantize(*grid.stored(found_NK))
            assert torch.equal(back_NK[3], torch.zeros(64))
            torch.testing.assert_close(back_NK, found_NK)


@pytest.mark.parametrize("name", ["tc2g64", "tc3", "tc4g16"])
def test_sweeps_never_make_it_worse_and_weigh_rows(name: str) -> None:
    values, matrix_NK = code(name), normal(300, 128)
    inputs = normal(400, 128, seed=3) @ normal(128, 128, seed=4)
    metric_KK = inputs.T @ inputs / 400
    rows_N = normal(300, seed=5).exp()

    def loss(found_NK: Tensor) -> float:
        error_NK = matrix_NK - found_NK
        return float((((error_NK @ metric_KK) * error_NK).sum(1) * rows_N).sum())

    grid = grid_for(values, matrix_NK, metric_KK.diagonal(), torch.float32, rows_N)
    found_NK, _ = with_feedback(matrix_NK, inverse_root(metric_KK, 0.01), grid)
    losses = [loss(found_NK)]
    for sweeps in (1, 2):
        stored = descend(matrix_NK, grid.stored(found_NK), values, metric_KK, rows_N=rows_N, sweeps=sweeps)
        losses.append(loss(values.dequantize(*stored)))
    assert losses[0] > losses[1] > losses[2]


def coded(name: str, rows: int, cols: int, *, rotation: int = 1) -> Packed:
    values = code(name)
    generator = torch.Generator().manual_seed(rows)
    sign = 1 << (values.bits - 1)
    codes = torch.randint(-sign, sign, (rows * cols,), generator=generator).to(torch.int8)
    groups = values.num_scales_of(rows, cols)[1]
    return Packed(
        values.pack(codes), torch.empty(0, dtype=torch.uint8), (torch.rand(rows, generator=generator) + 0.5) / 4096,
        (rows, cols), "full", value_format=name, count=rows * cols, rotation=rotation,
        group_scales=torch.randint(1, 256, (groups,), generator=generator).to(torch.uint8) if groups else None,
    )  # fmt: skip


SHAPES = [(1, 64), (3, 128), (40, 192), (RUN + 5, 64), (2 * RUN, 448), (9, 80), (RUN + 2, 33), (5, 96), (6, 2048 + 192)]


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("name", NAMES)
def test_products_on_every_path(name: str, isa: str) -> None:
    for rows, cols in SHAPES:
        matrix = coded(name, rows, cols, rotation=16 if cols % 16 == 0 else 1)
        prepared, dense = cpu.prepare(matrix), to_dense(matrix).double()
        bias = normal(rows)
        for tokens in (*range(1, 9), 33):
            dtype = {3: torch.bfloat16, 7: torch.float16}.get(tokens, torch.float32)
            x = normal(tokens, cols, seed=tokens).to(dtype)
            expected = x.double() @ dense.T + bias.to(dtype).double()
            for path in cpu.PATHS:
                try:
                    y = cpu.multiply(x, prepared, bias.to(dtype), path=path, isa=isa)
                except BackendError:
                    assert path in ("direct", "tiles")
                    continue
                scale = float((x.double().abs() @ dense.abs().T).max() + bias.abs().max())
                allowed = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}[dtype]
                assert float((y.double() - expected).abs().max()) <= allowed * scale, (path, rows, cols, tokens)


@needs_library
@pytest.mark.parametrize("isa", [name for name in cpu.isa_names() if name != "portable"])
@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_8_bits_share_a_scale_64_at_a_time(name: str, isa: str) -> None:
    for rows, cols in SHAPES:
        rotation = 16 if cols % 16 == 0 else 1
        matrix = coded(name, rows, cols, rotation=rotation)
        prepared, dense = cpu.prepare(matrix), to_dense(matrix).double()
        for tokens in (*range(1, 9), 19):
            x = normal(tokens, cols, seed=tokens)
            exact, rounded = x.double() @ dense.T, rounded_inputs(x, rotation) @ dense.T
            allowed = [rounded] if isa.startswith("avx512") else [exact]
            if isa == "amx" or (isa in ("avx2", "avx_vnni") and (cols % 64 == 0 if tokens <= 4 else ROUNDS_MANY)):
                allowed = [rounded, exact] if isa == "amx" else [rounded]
            y = cpu.multiply(x, prepared, isa=isa, activation_bits=8).double()
            scale = float((x.double().abs() @ dense.abs().T).max())
            assert min(float((y - one).abs().max()) for one in allowed) <= 3e-5 * scale, (rows, cols, tokens)


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("bits", [None, 8])
def test_tokens_that_are_not_finite_spoil_no_other(isa: str, bits: int | None) -> None:
    matrix = coded("tc3g64", 70, 128)
    x = normal(5, 128)
    x[1, 5], x[3, 7] = float("nan"), float("inf")
    y = cpu.multiply(x, cpu.prepare(matrix), isa=isa, activation_bits=bits)
    dense = torch.nn.functional.linear(x, to_dense(matrix))
    assert torch.equal(y.isnan(), dense.isnan())
    torch.testing.assert_close(
        y[::2], dense[::2], rtol=1e-4 if bits is None else 0.02, atol=1e-2 if bits is None else 0.5
    )
    torch.testing.assert_close(y[3], dense[3])


def test_a_layer_leaves_no_entry_out() -> None:
    mask = torch.ones(32, 24, dtype=torch.bool)
    layer = FactoredLinear.from_factor(None, normal(32, 24), mask, role="up", fmt="full", values="tc4")
    assert float((layer.dense_weight() - normal(32, 24).T).norm() / normal(32, 24).norm()) < 0.1
    with pytest.raises(ConfigError, match="values tc4 leave no entry out"):
        FactoredLinear.from_factor(None, normal(32, 24), mask, role="up", fmt="bitmask", values="tc4")
    wrong = coded("tc4", 8, 64)
    with pytest.raises(BackendError, match="leave no entry out"):
        check_packed(Packed(wrong.values_Z, torch.zeros(64, dtype=torch.uint8), wrong.scales_N, (8, 64), "bitmask",
                            value_format="tc4", count=512))  # fmt: skip


def test_what_chooses_by_itself_takes_coded_values_instead_of_levels_as_wide() -> None:
    coded, others = automatic_values(), automatic_values(coded=False)
    assert {one.name for one in coded if one.memory} == {"tc2", "tc2g64", "tc3", "tc3g64", "tc4", "tc4g64"}
    assert not any(one.memory for one in others)
    assert {one.name for one in coded if not one.memory} == {one.name for one in others if (one.bits or 0) > 4}


@pytest.mark.parametrize(
    "fields",
    [
        {"effort": "max"}, {"sharing": "always"}, {"pattern": "2:4"}, {"rotate": False},
        {"schedule": "rigl", "reconstruction": {"steps": 2}},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_coded_values_do_not_go_with(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="`values: tc4` codes all entries of a column together"):
        fips.CompressionConfig(bits=5, values="tc4", **fields)
    config = fips.CompressionConfig(bits=5, **fields)
    assert not any(one.memory for one in config.whole_choices)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({}, True), ({"values": "tc4"}, False), ({"values": "int4"}, False), ({"effort": "max"}, False)],
)
def test_a_run_without_the_compiled_search_says_that_it_loses_more(
    fields: dict[str, object], said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "_available", False)
    monkeypatch.setattr(cpu, "_reason", "no compiler")
    _say_that_codes_are_left_out.cache_clear()
    with caplog.at_level(logging.WARNING):
        fips.plan_compression(tiny_model("llama"), fips.CompressionConfig(bits=6, **fields))
    words = "values of 2 to 4 bits are not coded together"
    assert [words in record.message and "(no compiler)" in record.message for record in caplog.records] == [True] * said


def test_pruned_layers_do_not_take_them() -> None:
    with pytest.raises(ConfigError, match="`tc4` leaves no entry out"):
        fips.CompressionConfig(method="magnitude", bits=3, values="tc4")


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("effort", ["fast", "default"])
def test_a_model_is_compressed_saved_and_loaded_with_them(tmp_path: Path, effort: str, llama: PreTrainedModel) -> None:
    batches = batches_for(llama)
    fips.compress(llama, batches, fips.CompressionConfig(bits=4.4, effort=effort))
    kinds = {layer.kind for layer in factored_layers(llama).values()}
    assert any(values_named(kind).memory for kind in kinds)
    fips.save(llama, tmp_path / "packed")
    assert json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]["format_version"] == 4
    loaded = fips.load(tmp_path / "packed")
    for name, layer in factored_layers(loaded).items():
        assert torch.equal(layer.dense_weight(), llama.get_submodule(name).dense_weight())
    torch.testing.assert_close(loaded(**batches[0]).logits, llama(**batches[0]).logits)


@needs_library
@pytest.mark.parametrize("effort", ["fast", "default"])
def test_rows_that_no_block_of_a_rotation_fills_are_kept_whole_too(effort: str) -> None:
    model = tiny_model("gpt2", n_embd=30, n_head=2)
    fips.compress(model, batches_for(model), fips.CompressionConfig(bits=3.4, effort=effort))
    layers = factored_layers(model).values()
    assert {layer.rotation for layer in layers} == {1, 4}
    assert {layer.fmt for layer in layers} == {"full"}


@pytest.mark.slow
@needs_library
def test_training_moves_their_steps_and_leaves_their_codes(llama: PreTrainedModel) -> None:
    still, trained = (copy.deepcopy(llama) for _ in range(2))
    fips.compress(still, batches_for(llama), fips.CompressionConfig(bits=5, values="tc3"))
    training = {"distill": {"steps": 3, "learning_rate": 1e-2, "held_out": 0}}
    fips.compress(trained, batches_for(llama), fips.CompressionConfig(bits=5, values="tc3", **training))
    for name, layer in factored_layers(trained).items():
        before = still.get_submodule(name)
        assert torch.equal(layer.values, before.values)
        assert not torch.equal(layer.scales, before.scales)


@needs_library
def test_too_few_bits_for_every_entry_are_an_error_before_any_work(llama: PreTrainedModel) -> None:
    with pytest.raises(BudgetError, match="smallest `bits` for these settings"):
        fips.compress(llama, batches_for(llama), fips.CompressionConfig(bits=3.0, values="tc4"))


@pytest.mark.parametrize("values", ["tc3g64", "nl3", "int3"])
def test_what_inference_mode_made_first_can_be_trained_after(values: str) -> None:
    for kept in (rotation._matrices.clear, values_named(values).__dict__.get("_tables", {}).clear):
        kept()
    layer = FactoredLinear(None, role="up", hidden=8, kept=8 * 64, fmt="full", width=64, values=values, rotation=16)
    layer.values.zero_()
    layer.scales.fill_(1)
    if layer.value_format.scale_group:
        layer.group_scales.fill_(1)
    x = torch.ones(1, 64)
    with torch.inference_mode():
        layer(x)
        layer.dense_weight()
        rotation.rotate(x, 16)
    x.requires_grad_()
    rotation.rotate(x, 16).square().sum().backward()
    x.grad = None
    layer(x).sum().backward()
    assert not layer.runtime._failed  # else plain torch would have done it
    assert_close(x.grad, layer.dense_weight().double().sum(0, keepdim=True), (1e-5, 1e-4))
