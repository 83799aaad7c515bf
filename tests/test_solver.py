"""The alternating solver: monotone, exact where an exact answer exists, in the metric it promises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batches_for, tiny_model
from torch import Tensor

import fips
from fips.activations import ActivationSpool, record_blocks
from fips.compress import dense_matrix
from fips.solve.alternate import alternate, grow_basis
from fips.solve.basis import fit_basis, normalize
from fips.solve.factors import refit, sparse_factors
from fips.solve.patterns import nm_mask, unstructured_masks
from fips.solve.problems import DownProblem, SiteProblem, UpProblem
from fips.solve.svd import shared_svd
from fips.statistics import collect_statistics
from fips.structure import group_mlps, locate_mlps

D, F = 24, 60


def moment(size: int, generator: torch.Generator) -> Tensor:
    """An ill-conditioned covariance."""
    samples = torch.randn(4 * size, size, generator=generator) * torch.logspace(0, -2, size)
    mixed = samples @ torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    return mixed.T @ mixed / (4 * size)


def problems(seed: int = 0) -> list[SiteProblem]:
    generator = torch.Generator().manual_seed(seed)
    result: list[SiteProblem] = []
    for _ in range(2):
        weights = [torch.randn(D, F, generator=generator) for _ in range(2)]
        result.append(UpProblem(weights[0], moment(D, generator), torch.rand(F, generator=generator) + 0.1))
        result.append(DownProblem(weights[1], moment(F, generator), 0.7))
    return result


def choose(sparsity: float) -> Any:
    return lambda scores: unstructured_masks(scores, sparsity=sparsity, scope="group")


def start(items: Sequence[SiteProblem], rank: int = D) -> Tensor:
    return shared_svd([item.weight_DF for item in items], rank=rank)[0]


def total(items: Sequence[SiteProblem], basis: Tensor, factors: Sequence[Tensor]) -> float:
    return sum(item.loss(basis, factor) for item, factor in zip(items, factors, strict=True))


def test_losses_equal_their_formulas_in_float64() -> None:
    up, down = problems()[:2]
    basis, factor = torch.randn(D, 10), torch.randn(10, F)
    assert isinstance(up, UpProblem)
    assert isinstance(down, DownProblem)
    error = up.weight_DF.double() - basis.double() @ factor.double()
    expected = torch.trace(error.T @ up.moment_DD.double() @ error @ torch.diag(up.column_F.double())).item()
    assert up.loss(basis, factor) == pytest.approx(expected, rel=1e-5)
    error = down.weight_DF.double() - basis.double() @ factor.double()
    expected = 0.7 * torch.trace(error @ down.moment_FF.double() @ error.T).item()
    assert down.loss(basis, factor) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("index", [0, 1])
def test_prox_and_operator_agree_with_a_dense_solve(index: int) -> None:
    problem = problems()[index]
    problem.prepare(torch.randn(D, 7, generator=torch.Generator().manual_seed(1)))
    point = torch.randn(7, F)
    solved = problem.prox(point, 0.3)
    torch.testing.assert_close(
        problem.apply(solved) + 0.3 * solved, problem.target_RF + 0.3 * point, atol=2e-4, rtol=2e-4
    )


@pytest.mark.parametrize("index", [0, 1])
def test_the_target_is_the_gradient_at_zero(index: int) -> None:
    """apply(F) - target is half the gradient of the loss, up to the column weights."""
    problem = problems()[index]
    basis = torch.randn(D, 7, generator=torch.Generator().manual_seed(1))
    problem.prepare(basis)
    factor = torch.randn(7, F).double().requires_grad_(True)
    if isinstance(problem, UpProblem):
        error = problem.weight_DF.double() - basis.double() @ factor
        loss = ((problem.moment_DD.double() @ error) * error * problem.column_F.double()).sum()
        scale = problem.column_F.double()
    else:
        assert isinstance(problem, DownProblem)
        error = problem.weight_DF.double() - basis.double() @ factor
        loss = problem.scale * ((error @ problem.moment_FF.double()) * error).sum()
        scale = torch.tensor(problem.scale).double()
    (gradient,) = torch.autograd.grad(loss, factor)
    half = (problem.apply(factor.detach().float()) - problem.target_RF).double() * scale
    torch.testing.assert_close(half, gradient / 2, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("index", [0, 1])
def test_refit_solves_least_squares_on_the_support(index: int) -> None:
    problem = problems()[index]
    basis = start(problems())
    problem.prepare(basis)
    mask = torch.rand(D, F, generator=torch.Generator().manual_seed(2)) < 0.4
    fitted = refit(problem, torch.zeros(D, F), mask, iterations=400)
    assert (fitted[~mask] == 0).all()
    residual = (problem.apply(fitted) - problem.target_RF)[mask]
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
        if isinstance(item, UpProblem):
            loss = loss + ((item.moment_DD @ error) * error * item.column_F).sum()
        elif isinstance(item, DownProblem):
            loss = loss + item.scale * ((error @ item.moment_FF) * error).sum()
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
    basis = grow_basis(start(items, rank), [item.weight_DF for item in items], rank=rank, seed=0)
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
    assert found.losses[-1] < 1e-6


def test_the_weighted_solution_beats_magnitude_pruning_of_the_svd() -> None:
    items = problems()
    basis = start(items)
    plain = [basis.T @ item.weight_DF for item in items]
    masks = unstructured_masks([factor.abs() for factor in plain], sparsity=0.6, scope="group")
    magnitude = total(items, basis, [factor * mask for factor, mask in zip(plain, masks, strict=True)])
    found = alternate(items, basis, choose(0.6))
    assert total(items, found.basis_DR, found.factors_RF) < 0.5 * magnitude


def test_a_planted_sparse_factorization_is_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    planted = []
    for _ in range(4):
        mask = torch.rand(D, 200, generator=generator) < 0.1
        planted.append(torch.randn(D, 200, generator=generator) * mask)
    eye = torch.eye(D)
    items = [UpProblem(basis @ factor, eye, torch.ones(200)) for factor in planted]
    count = sum(int((factor != 0).sum()) for factor in planted)
    rough = basis + 0.05 * torch.randn(D, D, generator=generator)
    found = alternate(items, rough, choose(1 - count / (4 * D * 200)), max_rounds=30, tolerance=1e-9)
    assert found.losses[-1] < 1e-4
    overlap = (found.basis_DR.T @ basis).abs().max(dim=1).values
    assert overlap.min() > 0.99


def test_nm_supports_hold_exactly() -> None:
    items = [UpProblem(torch.randn(32, 48), torch.eye(32), torch.ones(48))]
    found = alternate(items, start(items, 32), lambda scores: [nm_mask(s, n=4, m=16, dim=0) for s in scores])
    assert (found.masks_RF[0].T.reshape(-1, 16).sum(1) == 4).all()


def test_the_same_start_gives_the_same_bits() -> None:
    first, again = (alternate(problems(), start(problems()), choose(0.5)) for _ in range(2))
    assert torch.equal(first.basis_DR, again.basis_DR)
    assert all(torch.equal(a, b) for a, b in zip(first.factors_RF, again.factors_RF, strict=True))


@pytest.mark.parametrize("family", ["vit", "llama", "phi3"])
def test_statistics_equal_a_direct_computation(family: str) -> None:
    model = tiny_model(family).requires_grad_(False)
    group = group_mlps(locate_mlps(model).mlps)[0]
    blocks = {name: model.get_submodule(name) for name in group.blocks}
    batches = batches_for(model, count=3)
    with ActivationSpool(1 << 30) as spool:
        records = record_blocks(model, blocks, batches, spool, lambda m, b: m(**b))
        statistics = collect_statistics(model, group, blocks, records, spool, torch.device("cpu"))
    mlp = group.mlps[1]
    up, down = mlp.sites[0], mlp.sites[-1]
    seen: dict[str, list[Tensor]] = {up.name: [], down.name: []}
    hooks = [
        model.get_submodule(site.name).register_forward_pre_hook(lambda _, args, n=site.name: seen[n].append(args[0]))
        for site in (up, down)
    ]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    for site in (up, down):
        x = torch.cat([part.reshape(-1, part.shape[-1]) for part in seen[site.name]]).double()
        stat = statistics[site.name]
        assert stat.count == x.shape[0]
        torch.testing.assert_close(stat.mean_D.double(), x.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            stat.moment(centered=True).double(), torch.cov(x.T, correction=0), atol=1e-5, rtol=1e-3
        )
    x = torch.cat([part.reshape(-1, part.shape[-1]) for part in seen[up.name]])
    step = 1e-2
    column = 5
    module = model.get_submodule(mlp.name)
    layer = model.get_submodule(up.name)

    def nudged(amount: float) -> Tensor:
        handle = layer.register_forward_hook(lambda _, __, out: out + amount * torch.eye(out.shape[-1])[column])
        result: Tensor = module(x)
        handle.remove()
        return result

    slope = (nudged(step) - nudged(-step)) / (2 * step)
    expected = slope.square().sum(-1).mean().item()
    stat = statistics[up.name]
    assert stat.column_F is not None
    assert (stat.column_F / stat.count)[column].item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("family", ["vit", "llama", "gpt2", "swin"])
def test_the_solver_starts_closer_than_the_paper(family: str) -> None:
    def error(method: str) -> float:
        model = tiny_model(family)
        calibration = {"steps": 0, "precision": "float32"}
        config = fips.CompressionConfig(budget=0.5, method=method, calibration=calibration)  # type: ignore[arg-type]
        report = fips.compress(model, batches_for(model), config)
        return sum(result["relative_error_start"] for result in report.groups)

    assert error("fips") < 0.5 * error("fips-paper")


@pytest.mark.parametrize("schedule", ["static", "rigl"])
@pytest.mark.parametrize("family", ["vit", "llama"])
def test_calibration_from_the_solver_lowers_the_error_and_saves_exactly(
    family: str, schedule: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    batches = batches_for(model)
    calibration = {"steps": 40, "update_every": 10, "precision": "float32"}
    config = fips.CompressionConfig(budget=0.5, method="fips", schedule=schedule, calibration=calibration)  # type: ignore[arg-type]
    report = fips.compress(model, batches, config)
    result = report.groups[0]
    assert result["relative_error_final"] < result["relative_error_start"]
    assert report.plan["groups"][0]["rank"] == 32
    assert fips.save(model, tmp_path / "out") == report.plan["compressed_model"]["bytes"]
    loaded = fips.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(**batches[0]).logits, model(**batches[0]).logits)


def test_biases_take_up_the_mean_error() -> None:
    model, original = tiny_model("vit"), tiny_model("vit")
    batches = batches_for(model)
    calibration = {"steps": 0, "precision": "float32"}
    fips.compress(model, batches, fips.CompressionConfig(budget=0.4, method="fips", calibration=calibration))
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
    weight = dense_matrix(original, locate_mlps(original).mlps[0].sites[0])
    assert not torch.allclose(model.get_submodule(name).dense_weight(), weight.T, atol=1e-3)
