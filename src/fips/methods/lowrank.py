"""Low rank: plain SVD, SVD in the metric of the inputs (SVD-LLM), and one basis for several layers (Basis Sharing).

All take matrices as (D, F), the residual stream on axis 0, and return a basis (D, R) and factors (R, F).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fips.solve.basis import normalize
from fips.solve.moments import usable_moment

__all__ = ["shared_whitened_svd", "truncated_svd", "whitened_svd"]


def truncated_svd(weight_DF: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of a rank in Frobenius norm. Reference: Eckart & Young (1936)."""
    u, s, vh = torch.linalg.svd(weight_DF.double(), full_matrices=False)
    return u[:, :rank].float(), (s[:rank, None] * vh[:rank]).float()


def whitened_svd(weight_DF: Tensor, moment: Tensor, *, reads_stream: bool, rank: int) -> tuple[Tensor, Tensor]:
    r"""Best approximation of a rank of the layer's outputs, given the second moment of its inputs.

    ``reads_stream`` says which side the inputs are on: D (up layers) or F (down layers). Reference: Wang et al.,
    arXiv 2403.07378.
    """
    if reads_stream:
        basis_DR, (factor_RF,) = shared_whitened_svd([weight_DF], moment, rank=rank)
        return basis_DR, factor_RF
    root_FF, inverse_FF = _roots(moment)
    basis_DR, factor_RF = truncated_svd(weight_DF.double() @ root_FF, rank=rank)
    return basis_DR, (factor_RF.double() @ inverse_FF).float()


def shared_whitened_svd(weights_DF: Sequence[Tensor], moment_DD: Tensor, *, rank: int) -> tuple[Tensor, list[Tensor]]:
    """One basis for the inputs of several layers, dense coefficients for each. Reference: arXiv 2410.03765."""
    root_DD, inverse_DD = _roots(moment_DD)
    joined_DF = torch.cat([weight.double() for weight in weights_DF], dim=1)
    basis_DR, factor_RF = truncated_svd(root_DD @ joined_DF, rank=rank)
    # columns of norm 1: those of small moments would be too large for float16, and their coefficients too small
    basis_DR, (factor_RF,) = normalize(inverse_DD @ basis_DR.double(), [factor_RF.double()])
    return basis_DR.float(), list(factor_RF.float().split([weight.shape[1] for weight in weights_DF], dim=1))


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root and its inverse."""
    values, vectors = torch.linalg.eigh(usable_moment(moment.double()))
    values = values.clamp_min(1e-6 * float(values.mean())).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T
