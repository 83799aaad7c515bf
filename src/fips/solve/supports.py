"""Supports of all factors of a group that fit into a number of bytes, in the pattern wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fips.errors import BudgetError
from fips.formats.patterns import BITMASK, Pattern, pattern_named

__all__ = ["ByteBudget", "FixedPattern", "SupportRule"]

Reduction = Literal[0, 1]
"""Axis of a factor (R, F) along which an N:M pattern runs: 0 for ``up`` layers, 1 for ``down`` layers."""


@dataclass(frozen=True, slots=True)
class ByteBudget:
    """Keep the entries worth most, under one threshold for all factors, within a number of bytes.

    A factor so full that its pattern costs more than its zeros save is kept whole, without a pattern, and the bytes
    this frees go to the others. ``pattern`` says which entries may be chosen.
    """

    total: float
    """Bytes for values and patterns."""
    value_bytes: float
    pattern_bytes: float = 1 / 8
    """Bytes per bit of the pattern; 0 counts numbers only."""
    pattern: Pattern = field(default_factory=lambda: pattern_named(BITMASK))

    def __call__(self, scores_RF: Sequence[Tensor]) -> list[Tensor]:
        whole: set[int] = set()
        while True:
            rest = [index for index in range(len(scores_RF)) if index not in whole]
            masks = dict(
                zip(rest, self._sparse([scores_RF[i] for i in rest], self._left(scores_RF, whole)), strict=True)
            )
            full = {index for index, mask in masks.items() if self._is_full(mask)}
            if not full:
                ones = {index: torch.ones_like(scores_RF[index], dtype=torch.bool) for index in whole}
                return [({**masks, **ones})[index] for index in range(len(scores_RF))]
            whole |= full

    def _left(self, scores_RF: Sequence[Tensor], whole: set[int]) -> float:
        spent = sum(score.numel() * self.value_bytes for index, score in enumerate(scores_RF) if index in whole)
        patterns = sum(self._pattern(score) for index, score in enumerate(scores_RF) if index not in whole)
        left = self.total - spent - patterns
        if left < 0:
            raise BudgetError(
                f"{self.total:.0f} bytes are less than the {spent + patterns:.0f} that the patterns of these factors "
                "take alone; ask for more bytes or use an N:M pattern"
            )
        return left

    def _sparse(self, scores_RF: Sequence[Tensor], left: float) -> list[Tensor]:
        count = int(left / self.value_bytes + 1e-9)
        return self.pattern.choose(scores_RF, count)

    def _pattern(self, score_RF: Tensor) -> float:
        return self.pattern_bytes * self.pattern.bits(score_RF.numel())

    def _is_full(self, mask_RF: Tensor) -> bool:
        return int(mask_RF.sum()) * self.value_bytes + self._pattern(mask_RF) >= mask_RF.numel() * self.value_bytes


@dataclass(frozen=True, slots=True)
class FixedPattern:
    """What a pattern keeps along the reduction; the size follows from it."""

    pattern: Pattern
    reductions: tuple[Reduction, ...]

    def __call__(self, scores_RF: Sequence[Tensor]) -> list[Tensor]:
        parts = zip(scores_RF, self.reductions, strict=True)
        return [self.pattern.choose_fixed(score, axis=axis) for score, axis in parts]


SupportRule = ByteBudget | FixedPattern
