"""The maths against closed forms and independent computations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fips.errors import BudgetError
from fips.formats import masks
from fips.formats.masks import nm_mask, top_mask, top_masks
from fips.methods.paper import grow_rank, rank_for_budget
from fips.solve.patterns import num_kept, prune_and_regrow, unstructured_masks
from fips.solve.svd import shared_svd
from fips.training.schedules import gmp_sparsity, rigl_fraction, update_steps


def matrices(*shapes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def squared_error(weights: Sequence[Tensor], basis: Tensor, factors: Sequence[Tensor]) -> float:
    pairs = zip(weights, factors, strict=True)
    return sum((w.double() - basis.double() @ f.double()).square().sum().item() for w, f in pairs)


@pytest.mark.parametrize("rank", [1, 7, 24])
def test_shared_svd_reaches_the_eckart_young_bound(rank: int) -> None:
    weights = matrices((24, 50), (24, 30), (24, 9))
    basis, factors = shared_svd(weights, rank=rank)
    tail = torch.linalg.svdvals(torch.cat(weights, dim=1).double())[rank:].square().sum().item()
    assert squared_error(weights, basis, factors) == pytest.approx(tail, rel=1e-5, abs=1e-8)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), atol=1e-6, rtol=0)


def test_shared_svd_has_a_definite_sign_and_is_repeatable() -> None:
    weights = matrices((12, 40))
    basis, _ = shared_svd(weights, rank=5)
    again, _ = shared_svd(weights, rank=5)
    assert torch.equal(basis, again)
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


def test_growth_keeps_the_product_and_copies_rows_over_tau() -> None:
    weights = matrices((8, 30), (8, 20))
    basis, factors = shared_svd(weights, rank=8)
    grown, longer = grow_rank(basis, factors, rank=21, tau=32.0)
    assert grown.shape == (8, 21)
    assert (grown[:, 8:] == 0).all()
    for before, after in zip(factors, longer, strict=True):
        assert torch.equal(after[:8], before)
        assert torch.equal(after[8:16], before / 32.0)
        assert torch.equal(after[16:], before[:5] / 32.0)
        torch.testing.assert_close(grown @ after, basis @ before)


def test_growth_does_nothing_within_the_width() -> None:
    basis, factors = shared_svd(matrices((8, 30)), rank=4)
    grown, same = grow_rank(basis, factors, rank=4)
    assert torch.equal(grown, basis)
    assert torch.equal(same[0], factors[0])


@pytest.mark.parametrize(
    ("budget", "width", "hidden", "sparsity", "rank"),
    [
        (0.5, 768, 4 * 2 * 3072, 0.75, 1365),  # DeiT-B: floor(.5 * 768 * 24576 / (768 + .25 * 24576))
        (0.5, 2048, 4 * 3 * 8192, 0.75, 3780),  # Llama-3.2-1B
        (1.0, 10, 10, 0.0, 5),
        (0.25, 192, 6144, 0.5, 90),
    ],
)
def test_rank_follows_the_general_formula(budget: float, width: int, hidden: int, sparsity: float, rank: int) -> None:
    assert rank_for_budget(budget=budget, width=width, hidden=hidden, sparsity=sparsity) == rank
    kept = rank * width + num_kept(size=rank * hidden, sparsity=sparsity)
    one_more = (rank + 1) * (width + (1 - sparsity) * hidden)
    assert kept <= budget * width * hidden < one_more


def test_rank_is_rounded_to_a_multiple() -> None:
    assert rank_for_budget(budget=0.5, width=768, hidden=24576, sparsity=0.75, multiple=16) == 1360


def test_too_small_a_budget_names_the_smallest() -> None:
    with pytest.raises(
        BudgetError, match=r"below the cost of one basis vector.*smallest budget for it is 0\.0115"
    ) as e:
        rank_for_budget(budget=0.001, width=100, hidden=700, sparsity=0.0)
    least = float(str(e.value).rsplit(" ", 1)[1])
    assert rank_for_budget(budget=least, width=100, hidden=700, sparsity=0.0) == 1


@pytest.mark.parametrize("count", [0, 1, 7, 12])
def test_top_mask_keeps_exactly_the_largest_even_with_ties(count: int) -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0], [3.0, 2.0, 3.0, 1.0], [0.0, 0.0, 3.0, 2.0]])
    mask = top_mask(scores, count=count)
    assert int(mask.sum()) == count
    kept, dropped = scores[mask], scores[~mask]
    assert count in (0, 12) or kept.min() >= dropped.max()
    if count == 7:
        assert mask.tolist() == [
            [False, True, True, False],
            [True, True, True, False],
            [False, False, True, True],
        ]


@pytest.fixture(params=[0, masks.FEW], ids=["bins", "joined"], name="way")
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "FEW", request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
@pytest.mark.parametrize("count", [1, 99, 700, 1499])
def test_selection_equals_sorting_over_several_tensors(count: int, scale: float) -> None:
    scores = [m.abs() * scale for m in matrices((20, 50), (1, 300), (40, 5))]
    flat = torch.cat([s.flatten() for s in scores])
    expected = torch.zeros(1500, dtype=torch.bool)
    expected[flat.argsort(descending=True)[:count]] = True
    found = top_masks(scores, count=count)
    assert [m.shape for m in found] == [s.shape for s in scores]
    assert torch.equal(torch.cat([m.flatten() for m in found]), expected)


@pytest.mark.usefixtures("way")
def test_negative_scores_are_never_kept_and_ties_go_to_the_first_tensor() -> None:
    scores = [torch.tensor([-1.0, 2.0, 0.0]), torch.tensor([2.0, -5.0, 2.0])]
    assert [m.tolist() for m in top_masks(scores, count=2)] == [[False, True, False], [True, False, False]]
    assert [m.tolist() for m in top_masks(scores, count=6)] == [[False, True, True], [True, False, True]]
    assert not any(m.any() for m in top_masks(scores, count=0))


def test_one_threshold_for_a_group_and_one_per_layer() -> None:
    large, small = matrices((10, 40), (10, 40))
    small = small / 100
    group = unstructured_masks([large.abs(), small.abs()], sparsity=0.5, scope="group")
    assert [int(m.sum()) for m in group] != [200, 200]
    assert sum(int(m.sum()) for m in group) == 400
    flat = torch.cat([large.abs().flatten(), small.abs().flatten()])
    expected = flat >= flat.sort(descending=True).values[399]
    assert torch.equal(torch.cat([m.flatten() for m in group]), expected)
    layer = unstructured_masks([large.abs(), small.abs()], sparsity=0.5, scope="layer")
    assert [int(m.sum()) for m in layer] == [200, 200]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 16), (1, 8)])
def test_nm_mask_keeps_the_n_largest_of_every_m(n: int, m: int, dim: int) -> None:
    scores = matrices((32, 48))[0].abs()
    mask = nm_mask(scores, n=n, m=m, dim=dim)
    groups = mask.movedim(dim, -1).reshape(-1, m)
    values = scores.movedim(dim, -1).reshape(-1, m)
    assert (groups.sum(1) == n).all()
    for kept, row in zip(groups, values, strict=True):
        assert set(kept.nonzero().flatten().tolist()) == set(row.argsort(descending=True)[:n].tolist())


@pytest.mark.parametrize("scope", ["group", "layer"])
def test_rigl_drops_the_smallest_and_grows_the_largest_gradients(scope: str) -> None:
    factors = matrices((6, 20), (6, 20))
    gradients = matrices((6, 20), (6, 20), seed=1)
    masks = unstructured_masks([f.abs() for f in factors], sparsity=0.75, scope="layer")
    after = prune_and_regrow(masks, magnitudes=factors, gradients=gradients, fraction=0.2, scope=scope)  # type: ignore[arg-type]
    assert sum(int(m.sum()) for m in after) == 60
    dropped = torch.cat([(b & ~a).flatten() for b, a in zip(masks, after, strict=True)])
    grown = torch.cat([(a & ~b).flatten() for b, a in zip(masks, after, strict=True)])
    before = torch.cat([m.flatten() for m in masks])
    assert int(dropped.sum()) == int(grown.sum()) == 12
    if scope == "group":
        magnitude = torch.cat([f.abs().flatten() for f in factors])
        gradient = torch.cat([g.abs().flatten() for g in gradients])
        assert magnitude[dropped].max() <= magnitude[before & ~dropped].min()
        assert gradient[grown].min() >= gradient[~before & ~grown].max()


def test_gmp_is_cubic_and_ends_exactly_at_its_target() -> None:
    schedule = [gmp_sparsity(t, initial=0.05, final=0.75, begin=0, end=450) for t in range(600)]
    assert schedule[0] == 0.05
    assert schedule[225] == pytest.approx(0.75 - 0.70 / 8)
    assert all(a <= b for a, b in pairwise(schedule))
    assert set(schedule[450:]) == {0.75}
    assert schedule[449] < 0.75


@pytest.mark.parametrize(("steps", "every", "end"), [(600, 50, 0.75), (7, 3, 1.0), (1, 50, 0.75), (90, 40, 0.5)])
def test_the_last_update_is_always_a_step(steps: int, every: int, end: float) -> None:
    updates = update_steps(steps=steps, every=every, end=end)
    assert updates[0] == 0
    assert updates[-1] == min(round(end * steps), steps - 1)
    assert list(updates) == sorted(set(updates))
    assert gmp_sparsity(updates[-1], initial=0.0, final=0.6, begin=0, end=updates[-1]) == 0.6


def test_rigl_fraction_decays_to_zero() -> None:
    assert rigl_fraction(0, initial=0.3, end=100) == 0.3
    assert rigl_fraction(50, initial=0.3, end=100) == pytest.approx(0.15)
    assert rigl_fraction(25, initial=0.3, end=100) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))
    assert rigl_fraction(100, initial=0.3, end=100) == 0.0
