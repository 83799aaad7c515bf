"""Sparse supports: which entries of the factors are kept. Exact counts, deterministic ties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fips.solve.rank import num_nonzeros

__all__ = ["nm_mask", "prune_and_regrow", "top_mask", "unstructured_masks"]

Scope = Literal["group", "layer"]


def top_mask(scores: Tensor, *, count: int) -> Tensor:
    """Boolean mask of exactly ``count`` largest scores, of any shape; among equal scores the first in memory win."""
    flat = scores.flatten()
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)[: count - int(mask.sum())]
    mask[ties] = True
    return mask.view_as(scores)


def unstructured_masks(scores: Sequence[Tensor], *, sparsity: float, scope: Scope) -> list[Tensor]:
    """Masks that keep the largest scores: one threshold for all (``group``) or one for each tensor (``layer``).

    Keeps exactly ``floor((1 - sparsity) * size)`` entries of the whole group or of each tensor.
    """
    if scope == "layer":
        return [top_mask(s, count=num_nonzeros(size=s.numel(), sparsity=sparsity)) for s in scores]
    flat = torch.cat([s.flatten() for s in scores])
    mask = top_mask(flat, count=num_nonzeros(size=flat.numel(), sparsity=sparsity))
    return [part.view_as(s) for part, s in zip(mask.split([s.numel() for s in scores]), scores, strict=True)]


def nm_mask(scores: Tensor, *, n: int, m: int, dim: int) -> Tensor:
    """Mask with exactly the ``n`` largest of every ``m`` consecutive scores along ``dim`` (a multiple of m)."""
    moved = scores.movedim(dim, -1)
    groups = moved.reshape(-1, m)
    kept = groups.topk(n, dim=1, sorted=False).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True)
    return mask.view(moved.shape).movedim(-1, dim)


def prune_and_regrow(
    masks: Sequence[Tensor], *, magnitudes: Sequence[Tensor], gradients: Sequence[Tensor], fraction: float, scope: Scope
) -> list[Tensor]:
    """RigL update: drop the smallest kept magnitudes, grow the largest gradients outside the support.

    ``fraction`` of the support is exchanged, counted over the group or per layer; the number of kept entries stays
    the same (if fewer entries are free than dropped, fewer are exchanged). Reference: Evci et al., arXiv 1911.11134.
    """
    if scope == "layer":
        return [
            _exchange(mask, magnitude.abs(), gradient.abs(), fraction)
            for mask, magnitude, gradient in zip(masks, magnitudes, gradients, strict=True)
        ]
    flat = _exchange(_flatten(masks), _flatten(magnitudes).abs(), _flatten(gradients).abs(), fraction)
    return [part.view_as(mask) for part, mask in zip(flat.split([m.numel() for m in masks]), masks, strict=True)]


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _exchange(mask: Tensor, magnitude: Tensor, gradient: Tensor, fraction: float) -> Tensor:
    kept = int(mask.sum())
    count = min(int(fraction * kept), mask.numel() - kept)
    survivors = top_mask(magnitude.masked_fill(~mask, -1.0), count=kept - count)
    grown = top_mask(gradient.masked_fill(mask, -1.0), count=count)
    return survivors | grown
