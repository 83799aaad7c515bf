"""Supports under one threshold, and supports that change while training. Exact counts, deterministic ties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from fips.formats.masks import top_mask, top_masks

__all__ = ["num_kept", "prune_and_regrow", "unstructured_masks"]

Scope = Literal["group", "layer"]


def unstructured_masks(scores: Sequence[Tensor], *, sparsity: float, scope: Scope) -> list[Tensor]:
    """Masks that keep the largest scores: one threshold for all (``group``) or one for each tensor (``layer``).

    Keeps exactly ``floor((1 - sparsity) * size)`` entries of the whole group or of each tensor.
    """
    if scope == "layer":
        return [top_mask(s, count=num_kept(size=s.numel(), sparsity=sparsity)) for s in scores]
    total = sum(s.numel() for s in scores)
    return top_masks(scores, count=num_kept(size=total, sparsity=sparsity))


def prune_and_regrow(
    masks: Sequence[Tensor], *, magnitudes: Sequence[Tensor], gradients: Sequence[Tensor], fraction: float, scope: Scope
) -> list[Tensor]:
    """RigL update: drop the smallest kept magnitudes, grow the largest gradients outside the support.

    ``fraction`` of the support is exchanged, counted over the group or per layer; the number of kept entries stays
    the same (if fewer entries are free than dropped, fewer are exchanged). Reference: Evci et al., arXiv 1911.11134.
    """
    if scope == "layer":
        parts = zip(masks, magnitudes, gradients, strict=True)
        return [_exchange([mask], [size], [gradient], fraction)[0] for mask, size, gradient in parts]
    return _exchange(masks, magnitudes, gradients, fraction)


def _exchange(
    masks: Sequence[Tensor], magnitudes: Sequence[Tensor], gradients: Sequence[Tensor], fraction: float
) -> list[Tensor]:
    kept = sum(int(mask.sum()) for mask in masks)
    free = sum(mask.numel() for mask in masks) - kept
    count = min(int(fraction * kept), free)
    inside = [size.abs().masked_fill(~mask, -1.0) for size, mask in zip(magnitudes, masks, strict=True)]
    outside = [slope.abs().masked_fill(mask, -1.0) for slope, mask in zip(gradients, masks, strict=True)]
    survivors = top_masks(inside, count=kept - count)
    grown = top_masks(outside, count=count)
    return [a | b for a, b in zip(survivors, grown, strict=True)]


def num_kept(*, size: int, sparsity: float) -> int:
    """Entries kept out of ``size``: ``floor((1 - sparsity) * size)``."""
    return int((1 - sparsity) * size + 1e-9 * max(size, 1))
