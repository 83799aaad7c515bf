r"""The quadratic error of one matrix in the metric of its own activations, and the parts a solver needs of it.

For a layer with weight W (D, F), basis B and factor C, whose side of the residual stream has the metric :math:`M_D` and
whose hidden side has the metric :math:`M_F`,

.. math:: \ell(B, C) = \mathrm{tr}\left(M_D\, (W - BC)\, M_F\, (W - BC)^\top\right).

An ``up`` layer reads the residual stream: :math:`M_D` is the second moment of its inputs and :math:`M_F` that of the
gradients at its outputs. For a ``down`` layer it is the other way round. This is the Kronecker-factored second-order
change of the model's output, so that errors of different layers add up and compare.

Shape legend: D width, F hidden features, R rank, J features of one run.

References: Martens & Grosse, arXiv 1503.05671 (the factored metric); Wang et al., arXiv 1905.05934 (pruning in it).
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from fips.solve.conjugate import conjugate_gradients

__all__ = ["DAMPING", "LayerProblem"]

DAMPING = 1e-4
MAX_EIGEN = 16384
WIDE_ITERATIONS = 30


class LayerProblem:
    r"""Error of one matrix as a function of the basis and its factor, prepared for one basis at a time.

    All parts work on *scaled* factors :math:`X_{kj} = s_k C_{kj} c_j` in which every entry has curvature 1:
    :math:`c_j^2 = (M_F)_{jj}`, :math:`s_k^2 = (B^\top M_D B)_{kk}`. Then the loss is a constant plus
    :math:`\langle X, A(X) \rangle - 2 \langle X, T \rangle` with ``apply`` for A and ``target_RF`` for T, and a squared
    scaled entry says, up to correlations, what it is worth.

    ``prox`` solves :math:`A(X) + \rho X = T + \rho V` with one float32 eigendecomposition per side, made when it
    is first asked for. Hidden sides wider than ``max_eigen`` are cut into runs of at most that many columns, and
    conjugate gradients with the runs as preconditioner put back the correlations between them: less memory, but some 30
    products per iteration instead of 2.
    """

    def __init__(
        self,
        weight_DF: Tensor,
        left_DD: Tensor,
        right_FF: Tensor,
        *,
        damping: float = DAMPING,
        max_eigen: int = MAX_EIGEN,
    ) -> None:
        scale_F = _root(right_FF.float().diagonal())
        self.left_DD = _damped(left_DD.float(), damping)
        self._right = _Side(scale_F, _damped(right_FF.float() / torch.outer(scale_F, scale_F), damping), max_eigen)
        self._has_identity = False
        self._weigh(weight_DF.float())

    def _weigh(self, weight_DF: Tensor) -> None:
        self.weight_DF = weight_DF
        self._weighted_DF = weight_DF * self.column_F
        self._scaled_DF = self._weighted_DF @ self._right.metric

    def prepare(self, basis_DR: Tensor | None) -> None:
        """Fix the basis; None is the identity."""
        if basis_DR is None and self._has_identity:
            return
        self._has_identity = basis_DR is None
        projected_DR = self.left_DD if basis_DR is None else self.left_DD @ basis_DR
        gram_RR = projected_DR if basis_DR is None else basis_DR.T @ projected_DR
        row_R = _root(gram_RR.diagonal())
        self._left = _Side(row_R, gram_RR / torch.outer(row_R, row_R))
        self._aim(projected_DR)

    def _aim(self, projected_DR: Tensor) -> None:
        self.target_RF = (projected_DR.T @ self._scaled_DF) / self.row_R.unsqueeze(1)

    def sample(self, axis: int, count: int) -> tuple[Self, float]:
        """The problem of ``count`` columns (axis 0) or rows (1) for the identity, and their share of the error
        (where there is none, of the places).

        They are spread evenly over what the columns or rows weigh. The decomposition of the other side is shared with
        this problem.
        """
        self.prepare(None)
        moved_DF = self.left_DD @ self._weighted_DF if axis == 0 else self._scaled_DF * self.row_R.square().unsqueeze(1)
        worth = (self._weighted_DF * moved_DF).sum(axis)
        size = worth.numel()
        places = (torch.arange(count, device=worth.device) + 0.5) * (size / count)
        chosen = worth.argsort()[places.long()].sort().values
        small = copy.copy(self)
        if axis == 0:
            small._right = self._right.part(chosen)
            small._weigh(self.weight_DF[:, chosen])
        else:
            small._left = self._left.part(chosen)
            small.left_DD = self.left_DD[chosen][:, chosen]
            small._weigh(self.weight_DF[chosen])
        small._aim(small.left_DD)
        total = float(worth.sum())
        return small, float(worth[chosen].sum()) / total if total > 0 else count / size

    @property
    def row_R(self) -> Tensor:
        """:math:`s_k`."""
        return self._left.scale

    @property
    def column_F(self) -> Tensor:
        """:math:`c_j`."""
        return self._right.scale

    def axis(self, axis: int) -> tuple[Tensor, Tensor]:
        """Scale of every row (0) or column (1) of a factor, and the metric between them with a unit diagonal."""
        side = self._left if axis == 0 else self._right
        return side.scale, side.metric

    def scaled(self, factor_RF: Tensor) -> Tensor:
        """The factor in coordinates in which every entry has curvature 1: :math:`s_k c_j C_{kj}`."""
        return factor_RF * self.row_R.unsqueeze(1) * self.column_F

    def unscaled(self, scaled_RF: Tensor) -> Tensor:
        """Inverse of ``scaled``."""
        return scaled_RF / self.row_R.unsqueeze(1) / self.column_F

    def apply(self, scaled_RF: Tensor) -> Tensor:
        """Half the gradient of the quadratic part of the loss at a scaled factor: left metric times it times right."""
        return self._left.metric @ scaled_RF @ self._right.metric

    def prox(self, point_RF: Tensor, rho: float, *, iterations: int = WIDE_ITERATIONS) -> Tensor:
        r"""The scaled factor Z with the least loss plus :math:`\rho \lVert Z - P \rVert^2` for a point P: the step of
        ADMM (Boyd et al., 2011). By eigenvectors; where the right metric is cut into runs, by conjugate gradients
        preconditioned with them, ``iterations`` at most."""
        wanted_RF = self.target_RF + rho * point_RF
        solved_RF = self._solve_runs(wanted_RF, rho)
        if len(self._right.eigen) == 1:
            return solved_RF
        return conjugate_gradients(
            lambda direction_RF: self.apply(direction_RF) + rho * direction_RF,
            solved_RF,
            wanted_RF - self.apply(solved_RF) - rho * solved_RF,
            iterations=iterations,
            enough=1e-8 * wanted_RF.square().sum(),
            precondition=lambda residual_RF: self._solve_runs(residual_RF, rho),
        )

    def _solve_runs(self, wanted_RF: Tensor, rho: float) -> Tensor:
        """The solution of the prox equation without correlations between runs of columns."""
        ((values_R, vectors_RR),) = self._left.eigen
        rotated_RF = vectors_RR.T @ wanted_RF
        parts, start = [], 0
        for values_J, vectors_JJ in self._right.eigen:
            part_RJ = rotated_RF[:, start : start + len(values_J)] @ vectors_JJ
            parts.append((part_RJ / (torch.outer(values_R, values_J) + rho)) @ vectors_JJ.T)
            start += len(values_J)
        return vectors_RR @ torch.cat(parts, dim=1)

    def loss(self, basis_DR: Tensor | None, factor_RF: Tensor) -> float:
        """Second-order change of the model's output for the product of a basis (None: the identity) and a factor, which
        is not scaled."""
        product_DF = factor_RF if basis_DR is None else basis_DR @ factor_RF
        error_DF = self._weighted_DF - product_DF * self.column_F
        moved_DF = self.left_DD @ error_DF @ self._right.metric
        return max(float((moved_DF * error_DF).sum(dtype=torch.float64)), 0.0)

    def basis_terms(self, factor_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(left_DD, right_RR, target_DR)`` of the normal equation ``left B right = target`` for a fixed factor."""
        weighted_RF = factor_RF * self.column_F
        moved_RF = weighted_RF @ self._right.metric
        return self.left_DD, moved_RF @ weighted_RF.T, self.left_DD @ (self._weighted_DF @ moved_RF.T)


class _Side:
    """The metric of one axis of a factor: the scale of every place, and a matrix with a unit diagonal between them."""

    def __init__(self, scale: Tensor, metric: Tensor, max_eigen: int | None = None) -> None:
        self.scale, self.metric = scale, metric
        self._size = max_eigen or len(scale)

    @cached_property
    def eigen(self) -> list[tuple[Tensor, Tensor]]:
        """Eigenvalues and eigenvectors of every run of at most ``max_eigen`` places."""
        runs = [slice(start, start + self._size) for start in range(0, len(self.scale), self._size)]
        return [_eigh(self.metric[run, run]) for run in runs]

    def part(self, chosen: Tensor) -> _Side:
        """Of some places alone."""
        return _Side(self.scale[chosen], self.metric[chosen][:, chosen], self._size)


def _root(diagonal: Tensor) -> Tensor:
    """Square root of a diagonal; entries that are nothing beside the mean are raised to a trace of it."""
    floor = diagonal.mean().clamp_min(0) * 1e-6 + torch.finfo(diagonal.dtype).tiny
    return diagonal.clamp_min(floor).sqrt()


def _damped(matrix: Tensor, damping: float) -> Tensor:
    """A metric with a small multiple of its mean diagonal added, so that no direction is free."""
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    return matrix + (damping * matrix.diagonal().mean() + torch.finfo(matrix.dtype).tiny) * identity


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (not below 0) and eigenvectors; on failure the damping grows tenfold until it succeeds."""
    extra = 0.0
    while True:
        try:
            values, vectors = torch.linalg.eigh(matrix if extra == 0 else _damped(matrix, extra))
            return values.clamp_min(0), vectors
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if not bool(matrix.isfinite().all()) or extra > 1:
                raise
            extra = max(extra * 10, 1e-6)
