"""The F step: sparse factors for a fixed basis, by ADMM and an exact refit on the support found."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fips.solve.problems import SiteProblem

__all__ = ["refit", "sparse_factors"]

MaskChooser = Callable[[Sequence[Tensor]], list[Tensor]]
"""From scores of all factors of a group to supports of the wanted size and pattern."""


def sparse_factors(
    problems: Sequence[SiteProblem],
    starts_RF: Sequence[Tensor],
    choose: MaskChooser,
    *,
    iterations: int = 20,
    growth: float = 1.25,
    rho: float = 0.1,
) -> tuple[list[Tensor], list[Tensor]]:
    r"""Factors and supports that approximately minimise the sum of all losses for the prepared basis.

    ADMM on :math:`F = Z`, Z sparse: F from ``prox``, Z the projection of F + U on the entries with the largest
    :math:`(F + U)^2 \cdot` curvature over the whole group, with a penalty that starts at ``rho`` times the mean
    diagonal of each problem and grows by ``growth`` per iteration. Ends with ``refit`` on the last support.

    References: Boyd et al. (2011); Boža, arXiv 2401.02938 (ADMM for pruning).
    """
    sparse = [start.clone() for start in starts_RF]
    duals = [torch.zeros_like(start) for start in starts_RF]
    rhos = [rho * float(problem.diagonal_RF.mean()) for problem in problems]
    masks = [start != 0 for start in starts_RF]
    for _ in range(iterations):
        points = []
        for index, problem in enumerate(problems):
            solved = problem.prox(sparse[index] - duals[index], rhos[index])
            points.append(solved + duals[index])
        masks = choose([p.square() * q.curvature_RF for p, q in zip(points, problems, strict=True)])
        sparse = [point * mask for point, mask in zip(points, masks, strict=True)]
        duals = [(point - z) / growth for point, z in zip(points, sparse, strict=True)]
        rhos = [value * growth for value in rhos]
    fitted = [refit(p, z, m) for p, z, m in zip(problems, sparse, masks, strict=True)]
    return fitted, masks


def refit(problem: SiteProblem, start_RF: Tensor, mask_RF: Tensor, *, iterations: int = 30) -> Tensor:
    """Least squares on a fixed support, by conjugate gradients preconditioned by the diagonal; never a step back."""
    factor = start_RF * mask_RF
    inverse = mask_RF / problem.diagonal_RF.clamp_min(torch.finfo(torch.float32).tiny)
    residual = (problem.target_RF - problem.apply(factor)) * mask_RF
    scaled = residual * inverse
    direction, product = scaled.clone(), (residual * scaled).sum()
    first = product
    for _ in range(iterations):
        if product <= 1e-10 * first:
            break
        moved = problem.apply(direction) * mask_RF
        step = product / (direction * moved).sum()
        factor = factor + step * direction
        residual = residual - step * moved
        scaled = residual * inverse
        before, product = product, (residual * scaled).sum()
        direction = scaled + (product / before) * direction
    return factor
