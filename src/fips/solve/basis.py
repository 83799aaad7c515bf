"""The basis step: the shared basis for fixed factors, by conjugate gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fips.solve.conjugate import conjugate_gradients
from fips.solve.problems import LayerProblem

__all__ = ["fit_basis", "normalize"]


def fit_basis(
    problems: Sequence[LayerProblem], basis_DR: Tensor, factors_RF: Sequence[Tensor], *, iterations: int = 20
) -> Tensor:
    r"""Minimise the sum of all losses over B, factors fixed, starting from ``basis_DR``.

    Conjugate gradients on :math:`\sum_i L_i B K_i = \sum_i L_i W_i R_i F_i^\top` with :math:`K_i = F_i R_i F_i^\top`;
    the matrix of the system is never formed. Every iterate is at least as good as the one before.
    """
    terms = [problem.basis_terms(factor) for problem, factor in zip(problems, factors_RF, strict=True)]

    def apply(direction_DR: Tensor) -> Tensor:
        total = torch.zeros_like(direction_DR)
        for left, right, _ in terms:
            total += left @ direction_DR @ right
        return total

    residual = torch.stack([target for _, _, target in terms]).sum(0) - apply(basis_DR)
    enough = 1e-12 * residual.square().sum()
    return conjugate_gradients(apply, basis_DR, residual, iterations=iterations, enough=enough)


def normalize(basis_DR: Tensor, factors_RF: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The same products with basis columns of norm 1 (columns of norm 0 stay 0)."""
    norms_R = basis_DR.norm(dim=0)
    safe_R = torch.where(norms_R > 0, norms_R, torch.ones_like(norms_R))
    return basis_DR / safe_R, [factor_RF * safe_R.unsqueeze(1) for factor_RF in factors_RF]
