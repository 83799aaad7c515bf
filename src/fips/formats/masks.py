"""Masks of the largest scores. Exact counts, deterministic ties."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["block_masks", "nm_mask", "top_mask", "top_masks"]

FEW = 1 << 16
"""Up to so many scores are joined and searched at once."""


def top_mask(scores: Tensor, *, count: int) -> Tensor:
    """Mask of the ``count`` largest scores; among equal ones the first in memory win, negative ones never do."""
    return top_masks([scores], count=count)[0]


def top_masks(scores: Sequence[Tensor], *, count: int) -> list[Tensor]:
    """Masks of the ``count`` largest scores over several tensors; negative ones are never kept.

    The threshold is found on the bits of float32, whose order is that of the non-negative numbers they stand for.
    Large tensors are never joined: radix selection in two passes of 2^16 bins is exact, and no copy is larger than one
    tensor. Ties go to the first tensors, and within one to the first in memory.
    """
    threshold, spare = _select(scores, count)
    masks = []
    for score in scores:
        bits = _order_bits(score)
        mask = bits > threshold
        ties = (bits == threshold).flatten().nonzero().squeeze(1)[:spare]
        mask.view(-1)[ties] = True
        spare -= ties.numel()
        masks.append(mask)
    return masks


def _order_bits(scores: Tensor) -> Tensor:
    """Numbers as int32: the same order where they are non-negative, below 0 where they are negative."""
    return scores.float().contiguous().view(torch.int32)


def _select(scores: Sequence[Tensor], count: int) -> tuple[int, int]:
    """``(threshold, spare)``: fewer than ``count`` entries lie above the threshold, ``spare`` more are wanted at it."""
    if count <= 0:
        return torch.iinfo(torch.int32).max, 0
    if sum(score.numel() for score in scores) <= FEW:
        return _select_few(scores, count)
    prefix, wanted = 0, count
    for shift, bins in ((16, 1 << 15), (0, 1 << 16)):
        histogram = torch.zeros(bins, dtype=torch.int64)
        for score in scores:
            bits = _order_bits(score).flatten()
            bits = bits[bits >= 0] if shift else bits[bits >> 16 == prefix]
            histogram += torch.bincount((bits >> shift) & (bins - 1), minlength=bins).cpu()
        at_least = histogram.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= wanted).sum()) - 1
        if digit < 0:  # fewer non-negative scores than wanted: all of them are kept
            return -1, 0
        wanted -= int(at_least[digit] - histogram[digit])
        prefix = digit if shift else (prefix << 16) | digit
    return prefix, wanted


def _select_few(scores: Sequence[Tensor], count: int) -> tuple[int, int]:
    """What ``_select`` returns, where the bins would take longer than a copy of all scores."""
    bits = torch.cat([_order_bits(score).flatten().cpu() for score in scores])
    bits = bits[bits >= 0]
    if len(bits) < count:
        return -1, 0
    threshold = int(bits.kthvalue(len(bits) - count + 1).values)
    return threshold, count - int((bits > threshold).sum())


def nm_mask(scores: Tensor, *, n: int, m: int, dim: int) -> Tensor:
    """Mask with exactly the ``n`` largest of every ``m`` consecutive scores along ``dim`` (a multiple of m)."""
    moved = scores.movedim(dim, -1)
    groups = moved.reshape(-1, m)
    chosen = groups.topk(n, dim=1, sorted=False).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, chosen, True)
    return mask.view(moved.shape).movedim(-1, dim)


def block_masks(scores: Sequence[Tensor], *, count: int, size: int) -> list[Tensor]:
    """Masks of whole blocks of ``size`` neighbours along the last axis, those with the largest sums, over all tensors.

    Keeps at most ``count`` entries; the last axis must be a multiple of ``size``.
    """
    sums = [score.unflatten(-1, (-1, size)).sum(-1) for score in scores]
    return [mask.repeat_interleave(size, dim=-1) for mask in top_masks(sums, count=count // size)]
