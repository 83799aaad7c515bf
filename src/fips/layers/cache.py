"""Keys and values of the tokens before, with room behind them: a token more is written, not everything copied.

transformers' cache (5.24) joins what it has and the new token in every layer for every token.

Shape legend: B examples, K heads, L tokens, D numbers of a head.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["Growing", "GrowingLayer", "GrowingWindow", "growing"]


class Growing(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A layer of transformers' ``DynamicCache`` whose keys and values are a part of larger tensors.

    It is one like the others to whoever asks: what exchanges ``keys`` or ``values``, as cropping and reordering do,
    makes the next token copy them once.
    """

    LEAST = 64
    """Tokens that there is room for when tensors are made, or a quarter of those that are there."""
    _whole: tuple[Tensor, Tensor] | None = None
    _shown: tuple[Tensor, Tensor] | None = None
    _first = 0
    """Place of the first token that is shown."""

    @classmethod
    def of(cls, layer: DynamicLayer) -> Self:
        """What takes the place of a layer."""
        new = cls.__new__(cls)
        new.__dict__.update(vars(layer))
        return new

    def with_room(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, more than L, D) of which the first L are those of now."""
        shown, keys, values = self._shown, self.keys, self.values
        length: int = keys.shape[2]
        if self._whole is None or shown is None or shown[0] is not keys or shown[1] is not values:
            self._whole = None
        if self._whole is None or self._first + length >= self._whole[0].shape[2]:
            self._whole = self._enlarged(keys, length), self._enlarged(values, length)
            self._show(0, length)
        if not self._first:
            return self._whole
        left = self._whole[0].shape[2] - self._first
        return self._whole[0].narrow(2, self._first, left), self._whole[1].narrow(2, self._first, left)

    def took_one(self) -> None:
        """One token more has been written into what ``with_room`` gave."""
        self._show(self._first, self.keys.shape[2] + 1)

    def _show(self, first: int, length: int) -> None:
        assert self._whole is not None
        keys, values = self._whole
        self._first = first
        self.keys, self.values = self._shown = keys.narrow(2, first, length), values.narrow(2, first, length)

    def _enlarged(self, old: Tensor, length: int) -> Tensor:
        examples, heads, _, size = old.shape
        whole = old.new_empty(examples, heads, length + max(self.LEAST, length // 4), size)
        whole.narrow(2, 0, length).copy_(old)
        return whole


class GrowingLayer(Growing):
    """Of all tokens before."""


class GrowingWindow(Growing, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Of the tokens in a window, one less than it is wide: the next one is in it, too."""

    def took_one(self) -> None:
        self.cumulative_length += 1
        length = self.keys.shape[2] + 1
        gone = max(length - self.sliding_window + 1, 0)
        self._show(self._first + gone, length - gone)


def growing(layer: object) -> Growing | None:
    """What does the same as a layer and grows, the layer itself if it does; None for other kinds, and for a window that
    is kept longer than needed, to be taken back."""
    if isinstance(layer, Growing):
        known = layer
    elif type(layer) is DynamicLayer:
        known = GrowingLayer.of(layer)
    elif type(layer) is DynamicSlidingWindowLayer:
        known = GrowingWindow.of(layer)
    else:
        return None
    return None if isinstance(known, GrowingWindow) and known.record_past else known
