"""The paper's start: one singular value decomposition of all matrices of a group side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["shared_svd"]


def shared_svd(weights_DF: Sequence[Tensor], *, rank: int) -> tuple[Tensor, list[Tensor]]:
    r"""Best shared basis of R orthonormal vectors for several matrices of equal height, in Frobenius norm.

    With :math:`[W_1 | \dots | W_m] = U S V^\top` returns ``basis_DR`` = first R columns of U and the factors
    ``factor_RF`` = :math:`U_R^\top W_i` (the blocks of :math:`S V^\top`), so that

    .. math:: \sum_i \lVert W_i - B C_i \rVert_F^2 = \sum_{j > R} \sigma_j^2, \qquad B^\top B = I.

    For R > D the rank is D. U comes from the eigenvectors of :math:`\sum_i W_i W_i^\top` in float64 (cost
    :math:`D^2 P + D^3`), results are float32. The largest-magnitude entry of every basis column is positive.

    Reference: Eckart & Young (1936); arXiv 2411.09816, section 3.
    """
    width = weights_DF[0].shape[0]
    gram_DD = torch.zeros(width, width, dtype=torch.float64, device=weights_DF[0].device)
    for weight_DF in weights_DF:
        exact_DF = weight_DF.double()
        gram_DD += exact_DF @ exact_DF.T
    _, vectors_DD = torch.linalg.eigh(gram_DD)
    basis_DR = vectors_DD.flip(1)[:, : min(rank, width)]
    peaks_R = basis_DR.gather(0, basis_DR.abs().argmax(0, keepdim=True)).squeeze(0)
    basis_DR = basis_DR * torch.where(peaks_R < 0, -1.0, 1.0)
    factors_RF = [(basis_DR.T @ weight_DF.double()).float() for weight_DF in weights_DF]
    return basis_DR.float(), factors_RF
