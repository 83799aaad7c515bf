"""Second moments of inputs that say nothing, made usable."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["usable_diagonal", "usable_moment"]


def usable_moment(moment: Tensor) -> Tensor:
    """The moment, or the identity where it is 0: inputs that were never anything but zeros prefer no direction.

    Methods then do what they do without data: magnitude pruning, plain SVD, rounding to the nearest.
    """
    power = moment.diagonal().mean()
    if bool(power > torch.finfo(moment.dtype).tiny):
        return moment
    return torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)


def usable_diagonal(moment_K: Tensor) -> Tensor:
    """As ``usable_moment``, of a moment given as its diagonal (K,)."""
    usable = bool(moment_K.mean() > torch.finfo(moment_K.dtype).tiny)
    return moment_K if usable else torch.ones_like(moment_K)
