"""The factor step: sparse factors for a fixed basis, by ADMM and an exact refit on the support found."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fips.solve.conjugate import conjugate_gradients
from fips.solve.problems import LayerProblem

__all__ = ["MaskChooser", "refit", "sparse_factors"]

MaskChooser = Callable[[Sequence[Tensor]], list[Tensor]]
"""From what every entry of all factors is worth to supports of the wanted size and pattern."""


def sparse_factors(
    problems: Sequence[LayerProblem],
    starts_RF: Sequence[Tensor],
    choose: MaskChooser,
    *,
    iterations: int = 40,
    growth: float = 1.15,
    rho: float = 0.05,
    refits: int = 30,
) -> tuple[list[Tensor], list[Tensor]]:
    r"""Factors and supports that approximately minimise the sum of all losses for the prepared basis.

    ADMM on :math:`X = Z`, Z sparse, in scaled coordinates: X from ``prox``, Z the projection of X + U on the entries
    with the largest squares over all problems, with a penalty that starts at ``rho`` (every entry has curvature 1) and
    grows by ``growth`` per iteration. Ends with ``refits`` steps of ``refit`` on the last support.

    References: Boyd et al. (2011); Boža, arXiv 2401.02938 (ADMM for pruning).
    """
    sparse = [problem.scaled(start) for problem, start in zip(problems, starts_RF, strict=True)]
    duals = [torch.zeros_like(start) for start in sparse]
    masks = [start != 0 for start in sparse]
    for _ in range(iterations):
        points = [p.prox(z - dual, rho) + dual for p, z, dual in zip(problems, sparse, duals, strict=True)]
        masks = choose([point.square() for point in points])
        sparse = [point * mask for point, mask in zip(points, masks, strict=True)]
        duals = [(point - z) / growth for point, z in zip(points, sparse, strict=True)]
        rho *= growth
    fitted = [p.unscaled(_fit(p, z, mask, refits)) for p, z, mask in zip(problems, sparse, masks, strict=True)]
    return fitted, masks


def refit(problem: LayerProblem, start_RF: Tensor, mask_RF: Tensor, *, iterations: int = 30) -> Tensor:
    """Least squares on a fixed support, by conjugate gradients preconditioned by the diagonal; never a step back."""
    return problem.unscaled(_fit(problem, problem.scaled(start_RF), mask_RF, iterations))


def _fit(problem: LayerProblem, start_RF: Tensor, mask_RF: Tensor, iterations: int) -> Tensor:
    scaled = start_RF * mask_RF
    residual = (problem.target_RF - problem.apply(scaled)) * mask_RF
    return conjugate_gradients(
        lambda direction: problem.apply(direction) * mask_RF,
        scaled,
        residual,
        iterations=iterations,
        enough=1e-10 * residual.square().sum(),
    )
