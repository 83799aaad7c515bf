r"""The quadratic error of one matrix in the metric of its own activations, and the parts a solver needs of it.

``up`` (fc1-like), inputs with moment H, column j weighted by how much it moves the output:

.. math:: \ell(B, F) = \mathrm{tr}\left((W - BF)^\top H (W - BF)\, \mathrm{diag}(w)\right)

``down`` (fc2-like), hidden inputs with moment C, weighted by a scalar s:

.. math:: \ell(B, F) = s\, \mathrm{tr}\left((W - BF)\, C\, (W - BF)^\top\right)

Shape legend: D width, F columns, R rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["DownProblem", "SiteProblem", "UpProblem"]

DAMPING = 1e-5


def _damped(moment: Tensor) -> Tensor:
    """A moment with a small multiple of its mean diagonal added, so that dead directions keep a curvature."""
    identity = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    return moment + (DAMPING * moment.diagonal().mean() + torch.finfo(moment.dtype).tiny) * identity


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (not below 0) and eigenvectors, computed in float64."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.clamp_min(0).to(matrix.dtype), vectors.to(matrix.dtype)


class SiteProblem(ABC):
    """Error of one matrix as a function of the basis and its factor.

    After ``prepare(basis)`` the factor part is :math:`A(F) = R` with a positive operator A: ``apply`` is A,
    ``target_RF`` is R, ``diagonal_RF`` is the diagonal of A, ``prox`` solves :math:`(A + \\rho) F = R + \\rho V`.
    Columns of an ``up`` problem separate, so its weights appear only in ``curvature_RF`` and ``loss``.
    """

    weight_DF: Tensor
    target_RF: Tensor
    diagonal_RF: Tensor

    @abstractmethod
    def prepare(self, basis_DR: Tensor) -> None:
        """Fix the basis."""

    @abstractmethod
    def apply(self, factor_RF: Tensor) -> Tensor: ...

    @abstractmethod
    def prox(self, point_RF: Tensor, rho: float) -> Tensor: ...

    @property
    @abstractmethod
    def curvature_RF(self) -> Tensor:
        """Second derivative of the loss in every entry, comparable between problems."""

    @abstractmethod
    def loss(self, basis_DR: Tensor, factor_RF: Tensor) -> float: ...

    @abstractmethod
    def basis_terms(self, factor_RF: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """``(left_DD, right_RR, target_DR)`` of the normal equation ``left B right = target`` (None: identity)."""


class UpProblem(SiteProblem):
    """A layer that reads the residual stream."""

    def __init__(self, weight_DF: Tensor, moment_DD: Tensor, weight_F: Tensor) -> None:
        self.weight_DF = weight_DF.float()
        self.moment_DD = _damped(moment_DD.float())
        floor = weight_F.float().mean() * 1e-4
        self.column_F = weight_F.float().clamp_min(floor)

    def prepare(self, basis_DR: Tensor) -> None:
        projected_DR = self.moment_DD @ basis_DR
        self.gram_RR = basis_DR.T @ projected_DR
        self.target_RF = projected_DR.T @ self.weight_DF
        self.values_R, self.vectors_RR = _eigh(self.gram_RR)
        self.diagonal_RF = self.gram_RR.diagonal().unsqueeze(1).expand_as(self.target_RF)

    def apply(self, factor_RF: Tensor) -> Tensor:
        return self.gram_RR @ factor_RF

    def prox(self, point_RF: Tensor, rho: float) -> Tensor:
        rotated_RF = self.vectors_RR.T @ (self.target_RF + rho * point_RF)
        return self.vectors_RR @ (rotated_RF / (self.values_R + rho).unsqueeze(1))

    @property
    def curvature_RF(self) -> Tensor:
        return self.diagonal_RF * self.column_F

    def loss(self, basis_DR: Tensor, factor_RF: Tensor) -> float:
        error_DF = self.weight_DF - basis_DR @ factor_RF
        return float(((self.moment_DD @ error_DF) * error_DF * self.column_F).sum(dtype=torch.float64))

    def basis_terms(self, factor_RF: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        weighted_RF = factor_RF * self.column_F
        return self.moment_DD, weighted_RF @ factor_RF.T, self.moment_DD @ (self.weight_DF @ weighted_RF.T)


class DownProblem(SiteProblem):
    """A layer that writes the residual stream."""

    def __init__(self, weight_DF: Tensor, moment_FF: Tensor, scale: float) -> None:
        self.weight_DF = weight_DF.float()
        self.moment_FF = _damped(moment_FF.float())
        self.scale = scale
        self.right_values_F, self.right_vectors_FF = _eigh(self.moment_FF)
        self.weighted_DF = self.weight_DF @ self.moment_FF

    def prepare(self, basis_DR: Tensor) -> None:
        self.gram_RR = basis_DR.T @ basis_DR
        self.target_RF = basis_DR.T @ self.weighted_DF
        self.values_R, self.vectors_RR = _eigh(self.gram_RR)
        self.diagonal_RF = torch.outer(self.gram_RR.diagonal(), self.moment_FF.diagonal())

    def apply(self, factor_RF: Tensor) -> Tensor:
        return self.gram_RR @ factor_RF @ self.moment_FF

    def prox(self, point_RF: Tensor, rho: float) -> Tensor:
        rotated_RF = self.vectors_RR.T @ (self.target_RF + rho * point_RF) @ self.right_vectors_FF
        solved_RF = rotated_RF / (torch.outer(self.values_R, self.right_values_F) + rho)
        return self.vectors_RR @ solved_RF @ self.right_vectors_FF.T

    @property
    def curvature_RF(self) -> Tensor:
        return self.diagonal_RF * self.scale

    def loss(self, basis_DR: Tensor, factor_RF: Tensor) -> float:
        error_DF = self.weight_DF - basis_DR @ factor_RF
        return self.scale * float(((error_DF @ self.moment_FF) * error_DF).sum(dtype=torch.float64))

    def basis_terms(self, factor_RF: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        moved_RF = factor_RF @ self.moment_FF
        return None, self.scale * (moved_RF @ factor_RF.T), self.scale * (self.weighted_DF @ factor_RF.T)
