"""The alternating solver: monotone, exact where an exact answer exists, in the metric it promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batches_for, tiny_model
from torch import Tensor

import fips
from fips.calibration.inputs import CalibrationData
from fips.calibration.moments import collect_moments
from fips.calibration.preserve import preserved
from fips.errors import BudgetError
from fips.formats.masks import nm_mask
from fips.formats.packed import in_place
from fips.formats.patterns import pattern_for
from fips.formats.values import integers as named_integers
from fips.formats.values import values_named
from fips.layers.linear import factored_layers
from fips.methods.fips import Fips, FipsConfig, stages
from fips.methods.workbench import Workbench, dense_matrix
from fips.models import group_layers, locate_layers
from fips.solve.allocate import allocate, expected_total, tempered
from fips.solve.alternate import alternate, prune
from fips.solve.basis import fit_basis, normalize
from fips.solve.factors import refit, sparse_factors
from fips.solve.patterns import unstructured_masks
from fips.solve.problems import LayerProblem
from fips.solve.reorder import neighbour_order
from fips.solve.rounding import Grid, grid_steps, round_factor, round_rows
from fips.solve.search import GroupSearch
from fips.solve.structures import Choice, Point, Pricing, expected_error
from fips.solve.supports import ByteBudget
from fips.solve.svd import shared_svd
from fips.training.factors import TrainableGroup

D, F = 24, 60


def moment(size: int, generator: torch.Generator) -> Tensor:
    """An ill-conditioned covariance."""
    samples = torch.randn(4 * size, size, generator=generator) * torch.logspace(0, -2, size)
    mixed = samples @ torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    return mixed.T @ mixed / (4 * size)


def problems(seed: int = 0, **options: Any) -> list[LayerProblem]:
    generator = torch.Generator().manual_seed(seed)
    result: list[LayerProblem] = []
    for _ in range(2):
        weights = [torch.randn(D, F, generator=generator) for _ in range(2)]
        result.append(LayerProblem(weights[0], moment(D, generator), moment(F, generator), **options))
        result.append(LayerProblem(weights[1], torch.eye(D), 0.7 * moment(F, generator), **options))
    return result


def choose(sparsity: float) -> Any:
    return lambda scores: unstructured_masks(scores, sparsity=sparsity, scope="group")


def start(items: Sequence[LayerProblem], rank: int = D) -> Tensor:
    return shared_svd([item.weight_DF for item in items], rank=rank)[0]


def total(items: Sequence[LayerProblem], basis: Tensor, factors: Sequence[Tensor]) -> float:
    return sum(item.loss(basis, factor) for item, factor in zip(items, factors, strict=True))


def right_of(problem: LayerProblem) -> Tensor:
    """The metric of the hidden side as the problem uses it, in float64."""
    columns = problem.column_F.double()
    return problem._right.metric.double() * torch.outer(columns, columns)


def test_the_loss_equals_its_formula_in_float64() -> None:
    for problem in problems()[:2]:
        basis, factor = torch.randn(D, 10), torch.randn(10, F)
        error = problem.weight_DF.double() - basis.double() @ factor.double()
        expected = torch.trace(problem.left_DD.double() @ error @ right_of(problem) @ error.T).item()
        assert problem.loss(basis, factor) == pytest.approx(expected, rel=1e-5)
        identity = problem.weight_DF * (torch.rand(D, F) < 0.5)
        assert problem.loss(None, identity) == pytest.approx(problem.loss(torch.eye(D), identity), rel=1e-5)


def test_the_metric_is_the_one_given() -> None:
    """Up to the damping: what the problem uses is what it was given."""
    generator = torch.Generator().manual_seed(3)
    left, right = moment(D, generator), moment(F, generator)
    problem = LayerProblem(torch.randn(D, F, generator=generator), left, right, damping=0.0)
    torch.testing.assert_close(problem.left_DD, left)
    torch.testing.assert_close(right_of(problem).float(), right, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("identity", [True, False])
def test_prox_and_operator_agree_with_a_dense_solve(index: int, identity: bool) -> None:
    problem = problems()[index]
    problem.prepare(None if identity else torch.randn(D, 7, generator=torch.Generator().manual_seed(1)))
    point = torch.randn(problem.target_RF.shape)
    solved = problem.prox(point, 0.3)
    torch.testing.assert_close(
        problem.apply(solved) + 0.3 * solved, problem.target_RF + 0.3 * point, atol=2e-4, rtol=2e-4
    )


def test_wide_layers_search_in_runs_and_fit_exactly() -> None:
    """Runs of columns change only the search: the loss is the same function, and the result nearly as good."""
    exact, cut = problems(max_eigen=2048), problems(max_eigen=16)
    factor = torch.randn(D, F)
    assert cut[0].loss(None, factor) == exact[0].loss(None, factor)
    best, rough = (prune(items, choose(0.5)).losses[-1] for items in (exact, cut))
    assert 0.95 * best < rough < 1.05 * best


@pytest.mark.parametrize("index", [0, 1])
def test_the_target_is_the_gradient_at_zero(index: int) -> None:
    """apply(X) - target is half the gradient of the loss in scaled coordinates."""
    problem = problems()[index]
    basis = torch.randn(D, 7, generator=torch.Generator().manual_seed(1))
    problem.prepare(basis)
    scaled = torch.randn(7, F).double().requires_grad_(True)
    factor = scaled / problem.row_R.double().unsqueeze(1) / problem.column_F.double()
    error = problem.weight_DF.double() - basis.double() @ factor
    loss = torch.trace(problem.left_DD.double() @ error @ right_of(problem) @ error.T)
    (gradient,) = torch.autograd.grad(loss, scaled)
    half = (problem.apply(scaled.detach().float()) - problem.target_RF).double()
    torch.testing.assert_close(half, gradient / 2, atol=1e-3, rtol=1e-3)


def test_ill_conditioned_metrics_are_solved_not_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    rank_one = torch.outer(*[torch.randn(F, generator=generator)] * 2)
    dead = torch.zeros(D, D)
    for left, right in ((moment(D, generator), rank_one), (dead, moment(F, generator)), (dead, torch.zeros(F, F))):
        found = prune([LayerProblem(torch.randn(D, F, generator=generator), left, right)], choose(0.5))
        assert all(bool(factor.isfinite().all()) for factor in found.factors_RF)


@pytest.mark.parametrize("index", [0, 1])
def test_refit_solves_least_squares_on_the_support(index: int) -> None:
    problem = problems()[index]
    basis = start(problems())
    problem.prepare(basis)
    mask = torch.rand(D, F, generator=torch.Generator().manual_seed(2)) < 0.4
    fitted = refit(problem, torch.zeros(D, F), mask, iterations=400)
    assert (fitted[~mask] == 0).all()
    residual = (problem.apply(problem.scaled(fitted)) - problem.target_RF)[mask]
    assert residual.norm() < 1e-3 * problem.target_RF[mask].norm()


def test_the_basis_step_reaches_the_normal_equations_and_never_rises() -> None:
    items = problems()
    basis = start(items)
    for item in items:
        item.prepare(basis)
    factors, _ = sparse_factors(items, [torch.zeros(D, F)] * 4, choose(0.5))
    losses = [total(items, fit_basis(items, basis, factors, iterations=n), factors) for n in (0, 1, 5, 20, 300)]
    assert losses == sorted(losses, reverse=True)
    best = fit_basis(items, basis, factors, iterations=300).requires_grad_(True)
    loss = torch.zeros(())
    for item, factor in zip(items, factors, strict=True):
        error = item.weight_DF - best @ factor
        loss = loss + torch.trace(item.left_DD @ error @ right_of(item).float() @ error.T)
    (gradient,) = torch.autograd.grad(loss, best)
    scale = sum(terms[2].norm() for terms in (i.basis_terms(f) for i, f in zip(items, factors, strict=True)))
    assert gradient.norm() < 1e-2 * scale


def test_normalizing_keeps_the_products() -> None:
    basis, factors = torch.randn(D, 5), [torch.randn(5, F)]
    basis[:, 2] = 0
    unit, scaled = normalize(basis, factors)
    torch.testing.assert_close(unit @ scaled[0], basis @ factors[0])
    torch.testing.assert_close(unit.norm(dim=0), torch.tensor([1.0, 1, 0, 1, 1]))


@pytest.mark.parametrize("rank", [12, D, 40])
def test_the_error_never_rises_from_round_to_round(rank: int) -> None:
    items = problems()
    extra = [item.weight_DF[:, : max(rank - D, 0) // 4] for item in items]
    basis = torch.cat([start(items, min(rank, D)), *extra], dim=1)
    assert basis.shape == (D, rank)
    found = alternate(items, basis, choose(0.6), max_rounds=8, tolerance=-1.0)
    assert len(found.losses) == 8
    assert all(after <= before * (1 + 1e-6) for before, after in zip(found.losses, found.losses[1:], strict=False))
    assert found.losses[-1] < found.losses[0]
    assert sum(int(mask.sum()) for mask in found.masks_RF) == int(0.4 * 4 * rank * F + 1e-6)
    assert all((factor[~mask] == 0).all() for factor, mask in zip(found.factors_RF, found.masks_RF, strict=True))


def test_without_sparsity_at_full_rank_the_matrices_are_reproduced() -> None:
    items = problems()
    found = alternate(items, start(items), choose(0.0))
    assert found.losses[-1] < 1e-5 * total(items, torch.eye(D), [torch.zeros(D, F)] * 4)


def test_the_weighted_solution_beats_magnitude_pruning_of_the_svd() -> None:
    items = problems()
    basis = start(items)
    plain = [basis.T @ item.weight_DF for item in items]
    masks = unstructured_masks([factor.abs() for factor in plain], sparsity=0.6, scope="group")
    magnitude = total(items, basis, [factor * mask for factor, mask in zip(plain, masks, strict=True)])
    found = alternate(items, basis, choose(0.6))
    assert found.basis_DR is not None
    assert total(items, found.basis_DR, found.factors_RF) < 0.5 * magnitude


@pytest.mark.slow
def test_a_planted_sparse_factorization_is_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    planted = []
    for _ in range(4):
        mask = torch.rand(D, 200, generator=generator) < 0.1
        planted.append(torch.randn(D, 200, generator=generator) * mask)
    eye = torch.eye(D)
    items = [LayerProblem(basis @ factor, eye, torch.eye(200), damping=0.0) for factor in planted]
    count = sum(int((factor != 0).sum()) for factor in planted)
    rough = basis + 0.05 * torch.randn(D, D, generator=generator)
    found = alternate(items, rough, choose(1 - count / (4 * D * 200)), max_rounds=30, tolerance=1e-9)
    assert found.losses[-1] < 1e-4 * total(items, eye, [torch.zeros(D, 200)] * 4)
    assert found.basis_DR is not None
    overlap = (found.basis_DR.T @ basis).abs().max(dim=1).values
    assert overlap.min() > 0.99


def test_nm_supports_hold_exactly() -> None:
    items = [LayerProblem(torch.randn(32, 48), torch.eye(32), torch.eye(48))]
    found = alternate(items, start(items, 32), lambda scores: [nm_mask(s, n=4, m=16, dim=0) for s in scores])
    assert (found.masks_RF[0].T.reshape(-1, 16).sum(1) == 4).all()


def test_the_same_start_gives_the_same_bits() -> None:
    first, again = (alternate(problems(), start(problems()), choose(0.5)) for _ in range(2))
    assert first.basis_DR is not None
    assert again.basis_DR is not None
    assert torch.equal(first.basis_DR, again.basis_DR)
    assert all(torch.equal(a, b) for a, b in zip(first.factors_RF, again.factors_RF, strict=True))


def test_a_free_basis_beats_pruning_at_the_same_number_of_kept_entries() -> None:
    items = problems()
    pruned = prune(items, choose(0.6))
    shared = alternate(items, start(items), choose(0.6), max_rounds=8)
    assert pruned.basis_DR is None
    assert pruned.losses[-1] == pytest.approx(total(items, torch.eye(D), pruned.factors_RF), rel=1e-4)
    assert shared.losses[-1] < pruned.losses[-1]


@pytest.mark.parametrize("family", ["vit", "llama", "phi3"])
def test_moments_equal_a_direct_computation(family: str) -> None:
    model = tiny_model(family).requires_grad_(False)
    batches = batches_for(model, count=3)
    sublayer = locate_layers(model).sublayers[1]
    floor = 0.3
    found = collect_moments(model, sublayer.sites, batches, lambda m, b: m(**b), temperature=2.0, floor=floor, seed=5)
    again = collect_moments(model, sublayer.sites, batches, lambda m, b: m(**b), temperature=2.0, floor=floor, seed=5)
    for site in sublayer.sites:
        inputs, gradients = [], []
        generator = torch.Generator().manual_seed(5)
        for batch in batches:
            x, gradient = inputs_and_gradient(model, site.name, batch, generator)
            inputs.append(x)
            gradients.append(gradient)
        weights = torch.cat([(1 - floor) * g.square().sum(1) / g.square().sum(1).mean() + floor for g in gradients])
        x, g = torch.cat(inputs), torch.cat(gradients)
        mean = (weights[:, None] * x).sum(0) / weights.sum()
        second = (weights[:, None] * x).T @ x / weights.sum()
        if site.has_bias:
            second = second - torch.outer(mean, mean)
        moments = found[site.name]
        torch.testing.assert_close(moments.mean_I, mean, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(moments.inputs_II, second, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(moments.gradients_OO, g.T @ g / 12, atol=1e-6, rtol=1e-3)
        assert torch.equal(moments.inputs_II, again[site.name].inputs_II)


def inputs_and_gradient(
    model: Any, name: str, batch: dict[str, Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Inputs of a layer and the gradient at its outputs, by a hook that replaces the outputs by a leaf."""
    seen: list[Tensor] = []

    def hook(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        leaf = out.detach().requires_grad_(True)
        seen.extend([args[0], leaf])
        return leaf

    handle = model.get_submodule(name).register_forward_hook(hook)
    logits = model(**batch).logits
    handle.remove()
    q = (logits.detach() / 2.0).softmax(-1)
    noise = torch.randn(logits.shape, generator=generator)
    v = q.sqrt() * noise - q * (q.sqrt() * noise).sum(-1, keepdim=True)
    (gradient,) = torch.autograd.grad((logits * v).sum(), seen[1])
    return seen[0].detach().flatten(0, -2), gradient.flatten(0, -2)


def test_padding_counts_for_nothing() -> None:
    model = tiny_model("bert").requires_grad_(False)
    sites = locate_layers(model).sublayers[0].sites
    batch = batches_for(model, count=1)[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 10:] = 0
    results = []
    for filler in (5, 40):
        ids = batch["input_ids"].clone()
        ids[:, 10:] = filler
        padded = [{"input_ids": ids, "attention_mask": mask}]
        results.append(collect_moments(model, sites, padded, lambda m, b: m(**b), temperature=2.0, floor=0.4, seed=0))
    for site in sites:
        first, second = (result[site.name] for result in results)
        torch.testing.assert_close(first.inputs_II, second.inputs_II)
        torch.testing.assert_close(first.gradients_OO, second.gradients_OO)


@pytest.mark.parametrize("family", ["vit", "llama", "gpt2", "swin"])
@pytest.mark.slow
def test_the_solver_starts_closer_than_the_paper(family: str) -> None:
    def error(method: str) -> float:
        model = tiny_model(family)
        reconstruction = {"steps": 0}
        config = fips.CompressionConfig(bits=8.0, method=method, reconstruction=reconstruction, precision="float32")  # type: ignore[arg-type]
        report = fips.compress(model, batches_for(model), config)
        return sum(result["relative_error_start"] for result in report.groups)

    assert error("fips") < 0.2 * error("fips-paper")


SETTINGS: list[dict[str, Any]] = [
    {},
    {"values": "float"},
    {"values": "int4"},
    {"sharing": "always"},
    {"pattern": "block4"},
    {"pattern": "4:16"},
    {"reconstruction": {"steps": 4, "update_every": 1}, "precision": "float32", "schedule": "rigl"},
    {"distill": {"steps": 3, "hidden_weight": 0.1}},
    {"metric": {"memory": 1000, "propagate_errors": True}, "share_blocks": 1},
]
"""All with one family; with the others the default, and blocks, whose order differs where gate and up are fused."""


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", changes) for changes in SETTINGS]
    + [(family, changes) for family in ("vit", "phi3", "gpt2") for changes in ({}, {"pattern": "block4"})],
    ids=str,
)
@pytest.mark.slow
def test_every_setting_keeps_its_bytes_and_loads_exactly(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(family)
    batches = batches_for(model)
    report = fips.compress(model, batches, fips.CompressionConfig(bits=6.4, layers="mlp", **changes))
    dense, factored = (report.plan["layers"][key] for key in ("dense", "factored"))
    assert factored["bytes"] <= 0.4 * 2 * dense["parameters"]
    formats = {name for group in report.plan["groups"] for name in group["format"].split(", ")}
    if formats & {"bitmask", "block4"} and not any(":16" in name for name in formats):  # the size of others is fixed
        assert factored["bytes"] > 0.399 * 2 * dense["parameters"]
    assert fips.save(model, tmp_path / "out") == report.plan["compressed_model"]["bytes"]
    loaded = fips.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(**batches[0]).logits, model(**batches[0]).logits)


@pytest.mark.parametrize("schedule", ["static", "rigl"])
@pytest.mark.parametrize("family", ["vit", "llama"])
@pytest.mark.slow
def test_calibration_from_the_solver_lowers_the_error(family: str, schedule: str) -> None:
    model = tiny_model(family)
    reconstruction = {"steps": 40, "update_every": 10}
    config = fips.CompressionConfig(
        bits=6.4, values="float", schedule=schedule, reconstruction=reconstruction, precision="float32"
    )  # type: ignore[arg-type]
    result = fips.compress(model, batches_for(model), config).groups[0]
    assert result["relative_error_final"] < result["relative_error_start"]


@pytest.mark.slow
@pytest.mark.parametrize("values", ["auto", "int4", "float"])
def test_steps_that_make_errors_larger_are_taken_back(values: Any) -> None:
    model = tiny_model("llama")
    config = fips.CompressionConfig(
        bits=6.4, values=values, precision="float32", schedule="rigl", effort="fast",
        reconstruction={"steps": 4, "update_every": 1, "learning_rate": 1.0},
    )  # fmt: skip
    report = fips.compress(model, batches_for(model), config)
    assert "4 steps made the errors of `g0` no smaller: it stays as it was solved" in report.notes
    (group,) = report.groups
    assert group["relative_error_final"] <= 1.01 * group["relative_error_start"]


@pytest.mark.slow
def test_biases_take_up_the_mean_error() -> None:
    """With all tokens alike the mean output of every layer that reads the original's inputs stays."""
    model, original = tiny_model("vit"), tiny_model("vit")
    batches = batches_for(model)
    config = fips.CompressionConfig(
        bits=4.8, values="float", factor_dtype="float32", metric={"token_floor": 1.0},
        precision="float32",
    )  # fmt: skip
    fips.compress(model, batches, config)
    name = "vit.layers.0.mlp.fc1"
    outputs: dict[str, list[Tensor]] = {"a": [], "b": []}
    for key, m in (("a", model), ("b", original)):
        m.get_submodule(name).register_forward_hook(lambda _, __, out, k=key: outputs[k].append(out))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            original(**batch)
    new, old = (torch.cat(outputs[key]).flatten(0, 1) for key in ("a", "b"))
    torch.testing.assert_close(new.mean(0), old.mean(0), atol=1e-4, rtol=1e-3)
    weight = dense_matrix(original, locate_layers(original).sublayers[0].sites[0])
    assert not torch.allclose(model.get_submodule(name).dense_weight(), weight.T, atol=1e-3)


@pytest.mark.slow
def test_propagated_errors_reach_the_later_groups_only() -> None:
    states = []
    for propagate in (False, True):
        model = tiny_model("llama")
        config = fips.CompressionConfig(
            bits=3.2, effort="max", metric={"propagate_errors": propagate}, share_blocks=1, layers="mlp"
        )
        fips.compress(model, batches_for(model), config)
        states.append([layer.dense_weight() for layer in factored_layers(model).values()])
    same = [torch.equal(before, after) for before, after in zip(*states, strict=True)]
    assert all(same[:3])
    assert not all(same[3:])


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({}, False), ({"metric": {"propagate_errors": True}}, False),
        ({"sharing": "always", "layers": "mlp", "values": "int5"}, False),
        ({"distill": {"steps": 1}}, True), ({"reconstruction": {"steps": 1}, "precision": "float32"}, True),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_integers_are_packed_as_they_were_found_and_only_what_is_trained_is_trainable(
    settings: dict[str, Any], trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    made: list[TrainableGroup] = []
    solve = stages.Search.solve
    monkeypatch.setattr(
        stages.Search,
        "solve",
        lambda *args: found.append(solve(*args)) or found[-1],  # type: ignore[func-returns-value]
    )
    start = TrainableGroup.__init__
    monkeypatch.setattr(TrainableGroup, "__init__", lambda group, *args: made.append(group) or start(group, *args))  # type: ignore[func-returns-value]
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), fips.CompressionConfig(bits=5.6, **settings))
    assert bool(made) == trained
    grids = [grid for _, one in found for grid in one.grids]
    layers = list(factored_layers(model).values())
    assert len(grids) == len(layers)
    for grid, layer in zip(grids, layers, strict=True):
        assert grid.codes_RF.dtype == torch.int8
        if not trained:
            assert torch.equal(layer.role.to_factor(in_place(layer.packed())), grid.codes_RF)
            assert torch.equal(layer.scales, grid.steps_N)
            if grid.group_steps is not None:
                assert torch.equal(layer.group_scales, grid.group_steps)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model() -> None:
    states = []
    for _ in range(2):
        model = tiny_model("llama")
        fips.compress(model, batches_for(model), fips.CompressionConfig(bits=6.4, distill={"steps": 2}))
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("family", ["vit", "llama", "phi3", "gpt2"])
def test_reordered_neurons_leave_the_output_unchanged(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all entries kept, a model whose hidden neurons are in any other order computes what the original does."""
    model = tiny_model(family)
    batches = batches_for(model)
    with torch.no_grad():
        expected = model(**batches[0]).logits
    orders = []

    def shuffled(masks: Sequence[Tensor], *, size: int) -> Tensor:
        orders.append(torch.randperm(masks[0].shape[1], generator=torch.Generator().manual_seed(1)))
        return orders[-1]

    monkeypatch.setattr(stages, "neighbour_order", shuffled)
    original = tiny_model(family)
    fips.compress(model, batches, fips.CompressionConfig(budget=1.0, layers="mlp", pattern="block4"))
    site = locate_layers(original).sublayers[0].sites[0]
    weight = model.get_submodule(site.name).dense_weight().T
    assert not torch.allclose(weight, dense_matrix(original, site), atol=1e-3)
    torch.testing.assert_close(
        weight[:, : len(orders[0])], dense_matrix(original, site)[:, orders[0]], atol=1e-3, rtol=1e-2
    )
    with torch.no_grad():
        torch.testing.assert_close(model(**batches[0]).logits, expected, atol=1e-4, rtol=1e-3)


def test_neighbours_share_what_they_want() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.rand(D, 4, generator=generator) < 0.4
    labels = torch.arange(4).repeat(5)[torch.randperm(20, generator=generator)]
    order = neighbour_order([kinds[:, labels]], size=4)
    assert sorted(order.tolist()) == list(range(20))
    runs = labels[order].view(-1, 4)
    assert (runs == runs[:, :1]).all(1).sum() >= 3


@pytest.mark.parametrize("axis", [0, 1])
def test_rounding_stays_on_the_grid_and_support_and_feedback_pays(axis: int) -> None:
    ours, plain = 0.0, 0.0
    for problem in problems():
        problem.prepare(None)
        mask = torch.rand(D, F, generator=torch.Generator().manual_seed(1)) < 0.8
        factor = refit(problem, problem.weight_DF, mask)
        grid = round_factor(problem, factor, mask, axis=axis, values=named_integers(3), dtype=torch.bfloat16)
        rounded, steps, wanted = grid.factor(), grid.steps_N, grid.wanted_RF
        assert steps.dtype == torch.bfloat16
        assert (rounded[~mask] == 0).all()
        assert grid.codes_RF.dtype == torch.int8
        assert grid.codes_RF.abs().max() <= 3
        step = steps.float().unsqueeze(axis)
        assert torch.equal(wanted.round().clamp(-3, 3) * mask * step, rounded)
        nearest = (factor / step).round().clamp(-3, 3) * step * mask
        ours += problem.loss(None, rounded)
        plain += problem.loss(None, nearest)
    assert ours < 0.97 * plain  # on axis 0 half of the metrics are plain, and nothing can be made up for


def test_rounding_in_a_plain_metric_is_to_the_nearest() -> None:
    matrix = torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    mask, ones = torch.ones_like(matrix, dtype=torch.bool), torch.ones(300)
    steps, _ = grid_steps(matrix, ones, values=named_integers(4), dtype=torch.float32)
    integers, _ = round_rows(matrix, mask, torch.eye(300), ones, steps.unsqueeze(1), values=named_integers(4))
    assert torch.equal(integers, (matrix / steps.unsqueeze(1)).round().clamp(-7, 7))
    clipped = (matrix.abs().amax(1) / 7).unsqueeze(1)
    plain = ((matrix / clipped).round() * clipped - matrix).square().sum(1)
    assert ((integers * steps.unsqueeze(1) - matrix).square().sum(1) <= plain * (1 + 1e-6)).all()


def test_what_is_expected_of_a_choice_falls_with_bytes_and_bits() -> None:
    densities = [expected_error(density, named_integers(6)) for density in (0.2, 0.5, 0.9, 1.0)]
    assert densities == sorted(densities, reverse=True)
    assert expected_error(1.0, values_named("float")) == 0 < expected_error(1.0, named_integers(8))
    assert (
        expected_error(1.0, named_integers(8))
        < expected_error(1.0, named_integers(4))
        < expected_error(0.3, named_integers(8))
    )


@pytest.mark.slow
def test_the_width_of_the_values_follows_the_bytes() -> None:
    kinds = []
    for size in (4.0, 8.0):
        model = tiny_model("llama")
        fips.compress(model, batches_for(model), fips.CompressionConfig(bits=size))
        kinds.append([layer.bits or 0 for layer in factored_layers(model).values()])
    assert sum(kinds[0]) < sum(kinds[1])


def test_bytes_go_where_they_are_worth_most() -> None:
    choice = Choice(False, "unstructured")
    steep = [Point(choice, size, 100 * 0.5**size) for size in (1.0, 2.0, 4.0)]
    flat = [Point(choice, size, 1 * 0.5**size) for size in (1.0, 2.0, 4.0)]
    (_, first), (_, second) = allocate([steep, flat], 4.0)
    assert first > second
    assert 3.95 < first + second <= 4.0 + 1e-6
    cheap = Point(Choice(False, "4:16"), 1.0, 1e-3)
    (picked, size), _ = allocate([[*steep, cheap], flat], 4.0)
    assert picked == cheap.choice
    assert size == 1.0
    with pytest.raises(BudgetError, match="smallest structures"):
        allocate([steep, flat], 1.5)


def test_a_byte_budget_is_kept_and_full_factors_lose_their_pattern() -> None:
    scores = [torch.rand(16, 40) + 10, torch.rand(16, 40)]
    rule = ByteBudget(total=640 + 300, value_bytes=1)
    masks = rule(scores)
    assert bool(masks[0].all())  # without a pattern it takes 640 bytes, with one 720
    assert int(masks[1].sum()) + 640 / 8 <= 300 < int(masks[1].sum()) + 640 / 8 + 1
    blocks = ByteBudget(total=500, value_bytes=1, pattern=pattern_for("block4"))(scores)
    assert all((mask.view(16, 10, 4).all(2) == mask.view(16, 10, 4).any(2)).all() for mask in blocks)
    with pytest.raises(BudgetError, match="patterns"):
        ByteBudget(total=100, value_bytes=1)(scores)


def test_a_basis_is_not_shared_where_pruning_loses_nothing() -> None:
    """More bytes than dense int8 matrices take: everything is kept whole, and no basis is paid for."""
    search = GroupSearch(problems(), (0, 1, 0, 1), Pricing(value=1.0, basis_entry=2.0, row_scale=2.0))
    dense = search.overhead(Choice(False, "unstructured")) + 4 * D * F
    points = search.trials([Choice(False, "unstructured")], 1.2 * dense)
    known = expected_total([points], 1.2 * dense)
    assert search.sharing_ratio(Choice(True, "unstructured"), 1.2 * dense, known) == math.inf
    ((choice, size),) = allocate([points], 1.2 * dense)
    assert all(bool(mask.all()) for mask in search.solve(choice, size).masks_RF)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_sample_is_the_problem_of_its_columns_or_rows(axis: int) -> None:
    whole = problems()[0]
    small, share = whole.sample(axis, 12)
    side = whole.weight_DF.shape[1 - axis]
    kept = [place for place in range(side) if (whole.weight_DF.select(1 - axis, place)[None] == (
        small.weight_DF.T if axis == 0 else small.weight_DF)).all(1).any()]  # fmt: skip
    assert len(kept) == 12
    rows, columns = (slice(None), kept) if axis == 0 else (kept, slice(None))
    weight, left, right = whole.weight_DF[rows][:, columns], whole.left_DD[rows][:, rows], right_of(whole)
    error = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).double()
    wanted = torch.trace(left.double() @ error @ right[columns][:, columns] @ error.T).item()
    assert small.loss(None, (weight - error).float()) == pytest.approx(wanted, rel=1e-4)
    assert 0.5 * 12 / side < share < 1.5 * 12 / side
    other = "_right" if axis == 1 else "_left"
    assert getattr(small, other) is getattr(whole, other)  # its eigendecomposition too


@pytest.mark.parametrize("axis", [0, 1])
def test_trials_on_some_rows_tell_what_those_on_all_do(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (32, 256) if axis == 0 else (256, 32)
    metrics = [moment(size, generator) for size in shape]
    metrics[1 - axis] = torch.eye(256) + 0.3 * metrics[1 - axis] / metrics[1 - axis].diagonal().mean()
    problem = LayerProblem(torch.randn(shape, generator=generator), *metrics)
    choices = [Choice(False, "unstructured", f"int{bits}") for bits in (3, 4, 5, 6, 8)] + [
        Choice(False, "8:16", "int4")
    ]
    found = []
    for sample in (1024, 64):
        monkeypatch.setattr(fips.solve.search, "SAMPLE", sample)
        search = GroupSearch([problem], [axis], Pricing(value=2.0, basis_entry=2.0, row_scale=2.0))
        found.append(search.trials(choices, 0.6 * 32 * 256))
    assert [point[:2] for point in found[0]] == [point[:2] for point in found[1]]
    ratios = [few.loss / all_.loss for all_, few in zip(*found, strict=True)]
    assert 0.75 < min(ratios) < max(ratios) < 1.35


def test_sharing_is_tried_on_some_columns_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they promise nothing, no shared basis of the whole group is solved for."""
    monkeypatch.setattr(fips.solve.search, "SAMPLE", 16)
    monkeypatch.setattr(fips.solve.search, "COLUMNS", 2)
    pricing = Pricing(value=2.0, basis_entry=2.0, row_scale=2.0)
    search = GroupSearch(problems(), (0, 1, 0, 1), pricing)
    small, share = search._some_columns()
    assert small.hidden == round(share * 4 * F) < 4 * F
    assert small.overhead(Choice(True, "unstructured", "int8")) - 2 * D * D * share == pytest.approx(
        2 * (small.hidden / 2 + 2 * D)
    )
    asked: list[Choice] = []
    monkeypatch.setattr(search, "solve", lambda choice, *_, **__: asked.append(choice))
    assert search.sharing_ratio(Choice(True, "unstructured", "int8"), 0.5 * 4 * D * F, 1.0) == math.inf
    assert not asked


def shared_search() -> GroupSearch:
    """Of eight matrices, two fifths of whose columns are enough for a basis."""
    items = [problem for seed in (0, 1) for problem in problems(seed)]
    return GroupSearch(items, (0, 1) * 4, Pricing(value=2.0, basis_entry=2.0, row_scale=2.0))


def test_whole_factors_of_a_shared_basis_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to iterate for: what remains are rounding errors of float32."""
    search, whole = shared_search(), Choice(True, "unstructured")
    monkeypatch.setattr(fips.solve.search, "alternate", None)
    found = search.solve(whole, search.dense_bytes(whole))
    zero = total(search.problems, torch.zeros(D, D), [torch.zeros(D, F)] * 8)
    assert found.basis_DR is not None
    assert all(bool(mask.all()) for mask in found.masks_RF)
    assert total(search.problems, found.basis_DR, found.factors_RF) < 1e-9 * zero
    rounded = search.solve(whole._replace(values="int8"), search.dense_bytes(whole))
    assert 0 < rounded.losses[-1] < 1e-4 * zero


def test_a_shared_basis_is_tried_and_learnt_on_some_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fips.solve.search, "SAMPLE", 20)
    search, choice = shared_search(), Choice(True, "unstructured", "int6")
    rounds: list[tuple[int, int]] = []

    def counted(items: Sequence[LayerProblem], *args: Any, max_rounds: int) -> Any:
        found = alternate(items, *args, max_rounds=max_rounds)
        rounds.append((items[0].weight_DF.shape[1], len(found.losses)))
        return found

    monkeypatch.setattr(fips.solve.search, "alternate", counted)
    size = 0.55 * search.dense_bytes(choice)
    points = search.trials([choice], size)
    few, _ = search._some_columns()
    columns = few.problems[0].weight_DF.shape[1]
    assert columns < F / 2
    assert {place[0] for place in rounds} == {columns}
    assert max(points).bytes == search.dense_bytes(choice)  # which is not rounded away by the sample
    rounds.clear()
    found = search.solve(choice, size)
    assert [place[0] for place in rounds] == [columns, F]
    assert rounds[1][1] <= 2
    monkeypatch.setattr(search, "_some_columns", lambda _=1: (search, 1.0))
    search.forget()
    assert found.losses[-1] < 1.25 * search.solve(choice, size).losses[-1]


def model_that_shares() -> Any:
    """Matrices of its MLPs are a basis of theirs all times factors of few entries."""
    model, generator = tiny_model("vit"), torch.Generator().manual_seed(0)
    sites = [site for sublayer in locate_layers(model).sublayers for site in sublayer.sites]
    width = sites[0].width
    basis = torch.randn(width, width, generator=generator)
    for site in sites:
        kept = torch.rand(width, site.hidden, generator=generator) < 0.1
        weight = basis @ (torch.randn(width, site.hidden, generator=generator) * kept)
        model.get_submodule(site.name).weight.data.copy_(site.role.to_linear(0.05 * weight / weight.std()))
    return model


@pytest.mark.parametrize(
    ("held_out", "count", "rank"),
    [
        pytest.param(None, 4, 32, id="measured"),
        pytest.param(1.01, 4, 0, id="worse on data held out"),
        pytest.param(None, 1, 0, id="nothing to hold out"),
    ],
)
def test_a_basis_is_shared_where_data_held_out_says_so(
    held_out: float | None, count: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, parts = model_that_shares(), []
    measure = Workbench.moments_of_part

    def spied(bench: Workbench, name: str, sites: Any, wanted: Any, **options: Any) -> Any:
        parts.append([number for number in range(count) if wanted(number)])
        return measure(bench, name, sites, wanted, **options)

    monkeypatch.setattr(Workbench, "moments_of_part", spied)
    if held_out is not None:
        monkeypatch.setattr(stages, "_ratio_held_out", lambda *_: held_out)
    options: Any = {"values": "float", "pattern": "unstructured", "share_blocks": 8, "layers": "mlp"}
    config = fips.CompressionConfig(bits=6.0, effort="max", **options)
    report = fips.compress(model, batches_for(model, count=count), config)
    assert [group["rank"] for group in report.plan["groups"]] == [rank]
    assert sum("one batch of data leaves none to judge it by" in note for note in report.notes) == (count == 1)
    assert parts[1:] == ([[0, 2], [1, 3]] if rank else [])


@pytest.mark.parametrize("values", ["int4", "nl4g16"])
def test_some_columns_have_room_for_what_all_columns_have_room_for(values: str) -> None:
    """Scales of ``down`` layers belong to rows: a part of the columns has as many of them as the whole."""
    model = tiny_model("opt", num_hidden_layers=6)
    config = fips.CompressionConfig(
        method="fips-shared", bits=2.0 if values == "int4" else 2.5, values=values, share_blocks=6, precision="float32"
    )
    report = fips.compress(model, batches_for(model), config)
    layers = report.plan["layers"]
    assert 0.99 * config.bits < 8 * layers["factored"]["bytes"] / layers["dense"]["parameters"] <= config.bits


class TestTrainedGrid:
    """Integers times trained steps: what is trained is what is stored."""

    def group(self, role: str = "up", bits: int = 4) -> tuple[TrainableGroup, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (16, 24)
        site = next(
            site for site in group_layers(locate_layers(tiny_model("vit")).sublayers)[0].sites if site.role == role
        )
        steps_N = torch.rand(shape[1] if role == "up" else shape[0], generator=generator).add(0.1).bfloat16()
        integers = torch.randint(-7, 8, shape, generator=generator).to(torch.int8)
        factor = integers * steps_N.float().unsqueeze(0 if role == "up" else 1)
        self.grid = Grid(integers, steps_N, named_integers(bits), site.role.reduction)
        config = fips.CompressionConfig(bits=4.8)
        group = TrainableGroup(None, [factor], [site], [None], config, None)
        group.set_masks([integers != 0])
        group.set_grids([self.grid])
        return group, factor, steps_N

    @pytest.mark.parametrize("role", ["up", "down"])
    def test_starts_at_the_solved_factor(self, role: str) -> None:
        group, factor, steps_N = self.group(role)
        assert torch.equal(group.layers[0].factor(), factor)
        assert torch.equal(group.layers[0].grid.steps(), steps_N.float())

    @pytest.mark.parametrize("role", ["up", "down"])
    def test_close_decisions_are_the_first_to_change(self, role: str) -> None:
        """Entries start where rounding found them: the same factor, and the next integer as near as it was."""
        group, factor, _ = self.group(role)
        layer = group.layers[0]
        integers = layer.entries_RF.detach().clone()
        wanted = integers + 2 * torch.rand(integers.shape, generator=torch.Generator().manual_seed(2)) - 1
        group.set_grids([replace(self.grid, wanted_RF=wanted)])
        assert torch.equal(layer.factor(), factor)
        rest = layer.entries_RF.detach() - integers
        assert torch.allclose(rest, (wanted - integers).clamp(-0.49, 0.49), atol=1e-5)

    @pytest.mark.parametrize("role", ["up", "down"])
    def test_after_a_step_the_factor_is_on_the_stored_grid(self, role: str) -> None:
        group, factor, _ = self.group(role)
        layer = group.layers[0]
        optimizer = torch.optim.AdamW(group.learning_rates(3e-3))
        layer.factor().square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            trained, steps = layer.factor(), layer.grid.grid.spread(layer.grid.steps())
        assert torch.equal(steps, steps.bfloat16().float())
        assert torch.equal(trained, (trained / steps).round().clamp(-7, 7) * steps)
        assert not trained[~layer.mask_RF].any()
        assert (trained / steps).abs().sum() < (
            factor / layer.grid.grid.spread(layer.grid.start)
        ).abs().sum()  # integers moved as well

    @pytest.mark.parametrize("role", ["up", "down"])
    def test_what_is_found_is_what_the_layer_computes(self, role: str) -> None:
        group, factor, steps_N = self.group(role)
        (grid,) = group.found().grids
        assert torch.equal(grid.codes_RF, self.grid.codes_RF)
        assert torch.equal(grid.steps_N, steps_N)
        assert torch.equal(grid.factor(), factor)

    def test_gradients_of_steps_and_integers(self) -> None:
        """d/ds of sum(c * q * s) is sum(c * q), d/du passes the rounding: c * s."""
        group, _, steps_N = self.group("down")
        layer = group.layers[0]
        weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
        (layer.factor() * weight).sum().backward()
        integers = layer.entries_RF.detach().round() * layer.mask_RF
        wanted = (weight * integers).sum(1) * steps_N.float()
        assert torch.allclose(layer.grid.growth.grad, wanted, rtol=1e-4, atol=1e-4)
        assert torch.allclose(layer.entries_RF.grad, weight * steps_N.float().unsqueeze(1) * layer.mask_RF)


def test_levels_of_layers_are_believed_by_half() -> None:
    """Of two layers alike, errors a hundredfold apart, the louder gets less than plain sums would say."""

    def curve(level: float) -> list[Point]:
        return [Point(Choice(False, "unstructured", f"int{b}"), b, level * 4.0**-b) for b in range(2, 9)]

    loud, quiet = curve(100.0), curve(1.0)
    assert [size for _, size in allocate([loud, quiet], 10.0)] == pytest.approx([6.7, 3.3], abs=0.4)
    assert [size for _, size in allocate(tempered([loud, quiet]), 10.0)] == pytest.approx([5.8, 4.2], abs=0.4)
    assert tempered([quiet])[0][0].loss / tempered([quiet])[0][1].loss == pytest.approx(4)


@pytest.mark.slow
def test_stages_run_by_hand_for_one_group_alone() -> None:
    """What one group becomes does not hang on the others but by its size."""
    model = tiny_model("llama")
    batches = batches_for(model)
    config = fips.CompressionConfig(bits=6.4, share_blocks=2, sharing="never", precision="float32")
    assert isinstance(config, FipsConfig)
    plan = fips.plan_compression(model, config)
    data = CalibrationData(model, batches, seed=config.seed)
    method = Fips(config)
    bench = Workbench(
        model, config, data, torch.device("cpu"), method.needs, method.temperature,
        influence_examples=method.influence_examples,
    )  # fmt: skip
    with preserved(model):
        assert bench.survey([group.group for group in plan.groups]) == {}
        curves, searches = [], []
        for group in plan.groups:
            moments = stages.measure(bench, config, [group], hold=True)
            trial = stages.open_search(bench, group, config, moments, trial=True)
            curves.append(stages.try_choices(bench, trial, group, config))
            searches.append(stages.open_search(bench, group, config, moments))
        split = allocate(
            tempered([*itertools.chain(*curves)]), sum(stages.group_share(group, config) for group in plan.groups)
        )
        last = split[-len(curves[-1]) :]
        _, layers = stages.pack(stages.solve(bench, plan.groups[-1], config, searches[-1], last))
    fips.compress(model, batches, config)
    for name, layer in layers.items():
        found = factored_layers(model)[name]
        assert torch.equal(layer.values, found.values)
        assert torch.equal(layer.scales, found.scales)
