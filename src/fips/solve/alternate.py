"""Rounds of F and B steps until the error stops falling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fips.solve.basis import fit_basis, normalize
from fips.solve.factors import MaskChooser, refit, sparse_factors
from fips.solve.problems import SiteProblem

__all__ = ["Factorization", "alternate"]


@dataclass(frozen=True, slots=True)
class Factorization:
    """A shared basis, sparse factors with their supports, and the error after every round."""

    basis_DR: Tensor
    factors_RF: list[Tensor]
    masks_RF: list[Tensor]
    losses: list[float]
    """Sum of the losses relative to that of zero factors, one per round."""


def alternate(
    problems: Sequence[SiteProblem],
    basis_DR: Tensor,
    choose: MaskChooser,
    *,
    max_rounds: int = 6,
    tolerance: float = 2e-3,
) -> Factorization:
    """Alternate sparse factors and basis from a start; stops when a round gains less than ``tolerance``.

    A round whose new support is worse than the refitted old one keeps the old support, so that the error never rises.
    """
    basis_DR, _ = normalize(basis_DR.float(), [])
    zero = sum(problem.loss(basis_DR, basis_DR.new_zeros(_shape(problem, basis_DR))) for problem in problems)
    best: Factorization | None = None
    for _ in range(max_rounds):
        for problem in problems:
            problem.prepare(basis_DR)
        starts = [problem.weight_DF.new_zeros(_shape(problem, basis_DR)) for problem in problems]
        if best is not None:
            starts = best.factors_RF
        candidates = [sparse_factors(problems, starts, choose)]
        if best is not None:
            kept = [refit(p, f, m) for p, f, m in zip(problems, best.factors_RF, best.masks_RF, strict=True)]
            candidates.append((kept, best.masks_RF))
        factors, masks = min(candidates, key=lambda pair: _total(problems, basis_DR, pair[0]))
        basis_DR, factors = normalize(fit_basis(problems, basis_DR, factors), factors)
        loss = _total(problems, basis_DR, factors) / zero
        losses = [*best.losses, loss] if best is not None else [loss]
        done = best is not None and loss > (1 - tolerance) * best.losses[-1]
        best = Factorization(basis_DR, factors, masks, losses)
        if done:
            break
    assert best is not None
    return best


def _shape(problem: SiteProblem, basis_DR: Tensor) -> tuple[int, int]:
    return basis_DR.shape[1], problem.weight_DF.shape[1]


def _total(problems: Sequence[SiteProblem], basis_DR: Tensor, factors_RF: Sequence[Tensor]) -> float:
    return sum(problem.loss(basis_DR, factor) for problem, factor in zip(problems, factors_RF, strict=True))


def grow_basis(basis_DR: Tensor, weights_DF: Sequence[Tensor], *, rank: int, seed: int) -> Tensor:
    """Columns added up to a rank beyond D: normalized random columns of the weights."""
    extra = rank - basis_DR.shape[1]
    if extra <= 0:
        return basis_DR
    columns_DF = torch.cat(list(weights_DF), dim=1)
    order = torch.randperm(columns_DF.shape[1], generator=torch.Generator().manual_seed(seed))[:extra]
    chosen_DR = columns_DF[:, order.to(columns_DF.device)].to(basis_DR.dtype)
    return torch.cat([basis_DR, chosen_DR / chosen_DR.norm(dim=0).clamp_min(1e-12)], dim=1)
