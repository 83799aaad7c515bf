"""An order of hidden neurons in which neighbours want the same support, so that they can share mask bits.

Permuting the hidden neurons of an MLP, in the outputs of its up layers and the inputs of its down layer alike, leaves
the MLP's output unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["neighbour_order"]


def neighbour_order(masks_RF: Sequence[Tensor], *, size: int) -> Tensor:
    """Permutation of the F hidden neurons that puts those of similar support into runs of ``size`` (a power of two).

    Pairs neurons greedily by the number of rows both want, summed over the factors, then pairs of pairs, and so on.
    Deterministic; F must be a multiple of ``size``.
    """
    wants = torch.cat([mask.float() for mask in masks_RF]).T.contiguous()  # a row for every run found so far
    members = torch.arange(wants.shape[0], device=wants.device).unsqueeze(1)
    while members.shape[1] < size:
        first, second = _pair(wants @ wants.T)
        members = torch.cat([members[first], members[second]], dim=1)
        wants = wants[first] + wants[second]
    return members.flatten()


def _pair(overlap_FF: Tensor) -> tuple[Tensor, Tensor]:
    """Disjoint pairs, rows with the largest best overlap first, each with the free row it overlaps most."""
    overlap_FF = overlap_FF.clone()
    overlap_FF.fill_diagonal_(-1)
    order = overlap_FF.max(1).values.argsort(descending=True, stable=True).tolist()
    free = torch.ones(len(order), dtype=torch.bool, device=overlap_FF.device)
    pairs = []
    for row in order:
        if free[row]:
            free[row] = False
            other = int(overlap_FF[row].masked_fill(~free, -2).argmax())
            free[other] = False
            pairs.append((row, other))
    first, second = torch.tensor(pairs, device=overlap_FF.device).T
    return first, second
