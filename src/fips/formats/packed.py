"""A packed matrix: stored values, a packed pattern, scales, and what they mean.

Shape legend: N stored rows (outputs), K stored columns (the reduction), Z kept entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor
from torch.nn.functional import embedding

from fips.errors import BackendError
from fips.formats.patterns import FULL, BlockAxis, Pattern, pattern_named
from fips.formats.rotation import rotate, rotation_fits
from fips.formats.values import FLOAT, Values, signed, values_named

__all__ = ["Packed", "check_packed", "dense_slices", "in_place", "rows_of", "to_dense"]

SLICE = 1 << 20
"""Entries that are decoded at a time: with what decoding needs besides, some tens of bytes each."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed matrix S of shape (N, K): a pattern of ``fips.formats.patterns``, values of ``fips.formats.values``."""

    values_Z: Tensor
    pattern: Tensor
    """Packed pattern; empty where it costs no bits."""
    scales_N: Tensor | None
    """Per row, beside integer values."""
    shape: tuple[int, int]
    fmt: str
    """Name of the pattern."""
    block_axis: BlockAxis = 1
    value_format: str = FLOAT
    """Name of the value format."""
    count: int = 0
    """Kept entries, where the number of stored values does not say it: of integers of less than 8 bits."""
    group_scales: Tensor | None = None
    """A byte for every group of columns of every row, where the value format has them."""
    rotation: int = 1
    """Columns of a block that are stored turned, see ``fips.formats.rotation``; 1: none are."""

    @property
    def layout(self) -> Pattern:
        """What the pattern means."""
        return pattern_named(self.fmt)

    @property
    def numbers(self) -> Values:
        """What the values mean."""
        return values_named(self.value_format)

    @property
    def bits(self) -> int:
        """Of integer values; 0 for floating ones."""
        return self.numbers.bits or 0

    @property
    def kept(self) -> int:
        """Kept entries."""
        return self.count or self.values_Z.numel()

    @property
    def kind(self) -> str:
        """Type of the values: ``float32``, ``int8``, ``int4``, ..."""
        return self.value_format if self.numbers.scaled else str(self.values_Z.dtype).removeprefix("torch.")

    def nbytes(self) -> int:
        """Bytes of everything stored."""
        parts = (self.values_Z, self.pattern, self.scales_N, self.group_scales)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def check_packed(packed: Packed) -> None:
    """Raise ``BackendError`` unless the stored tensors are as long as the shape and the format say; reads none."""
    rows, cols = packed.shape
    pattern, numbers, size = packed.layout, packed.numbers, rows * cols
    whole = size if pattern.group_kept is not None else packed.shape[packed.block_axis]
    if rows < 0 or cols < 1 or whole % pattern.group:
        raise BackendError(f"a matrix of shape {packed.shape} cannot be packed as {packed.fmt}")
    count, fixed = packed.kept, pattern.kept(size)
    if count > size or count % pattern.block or (fixed is not None and count != fixed):
        raise BackendError(f"{packed.fmt} of shape {packed.shape} cannot hold {count} values")
    scales, groups = numbers.num_scales_of(rows, cols)
    for name, tensor, wanted in (
        ("values", packed.values_Z, numbers.length(count)),
        ("pattern", packed.pattern, pattern.nbytes(size)),
        ("scales", packed.scales_N, scales),
        ("group scales", packed.group_scales, groups),
    ):
        if tensor is not None and (tensor.numel() != wanted or not tensor.is_contiguous()):
            raise BackendError(
                f"{name} of a matrix of shape {packed.shape} in format {packed.fmt}: want {wanted} numbers side by "
                f"side, got {tuple(tensor.shape)}; load the checkpoint again"
            )
    if numbers.memory and packed.fmt != FULL:
        raise BackendError(f"values {packed.kind} leave no entry out, but the format is {packed.fmt}")
    if (packed.group_scales is None) != (numbers.scale_group is None):
        raise BackendError(f"values {packed.kind} {'lack' if packed.group_scales is None else 'have no'} group scales")
    if not rotation_fits(cols, packed.rotation) or (packed.rotation > 1 and not numbers.scaled):
        raise BackendError(f"a matrix of {cols} columns and values {packed.kind} has no rotation {packed.rotation}")
    stored = packed.values_Z.dtype
    patterned = packed.pattern.numel() == 0 or packed.pattern.dtype == torch.uint8
    if not patterned or (numbers.dtype is not None and stored != numbers.dtype):
        raise BackendError(
            f"patterns are bytes (uint8) and {packed.kind} values {numbers.dtype}, got {packed.pattern.dtype}, {stored}"
        )


def in_place(packed: Packed) -> Tensor:
    """The stored values in their places (N, K); integers as int8, without their scales."""
    values_Z = packed.numbers.unpack(packed.values_Z, packed.kept)
    return packed.layout.unpack(values_Z, packed.pattern, packed.shape, packed.block_axis)


def to_dense(packed: Packed) -> Tensor:
    """S as a dense matrix: in the type of its values, or of integers in float32 (float64 beside such scales)."""
    stored = in_place(packed)
    return stored if packed.scales_N is None else _in_scale(packed, stored, slice(0, packed.shape[0]))


def dense_slices(packed: Packed, most: int = SLICE) -> Iterator[tuple[slice, Tensor]]:
    """``to_dense`` of rows one after the other, about ``most`` entries at a time, with the places of the rows."""
    layout, numbers, (rows, cols) = packed.layout, packed.numbers, packed.shape
    unit = lcm(8 * layout.group, numbers.run)  # of such rows patterns fill whole bytes
    step = max(1, most // max(1, unit * cols)) * unit
    if step >= rows:
        yield slice(0, rows), to_dense(packed)
        return
    begin = 0
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        shape = (part.stop - first, cols)
        pattern = packed.pattern[layout.nbytes(first * cols) : layout.nbytes(part.stop * cols)]
        end = begin + layout.count(pattern, shape, packed.block_axis)
        before = begin % 8 if numbers.bits else 0  # codes of fewer than 8 bits begin within bytes, 8 of them do not
        codes_Z = packed.values_Z[numbers.length(begin - before) : numbers.length(end)]
        codes_Z = numbers.unpack(codes_Z, end - begin + before)[before:]
        stored = layout.unpack(codes_Z, pattern, shape, packed.block_axis)
        yield part, stored if packed.scales_N is None else _in_scale(packed, stored, part)
        begin = end


def _in_scale(packed: Packed, stored: Tensor, rows: slice) -> Tensor:
    """Codes of some rows as the numbers that they stand for."""
    assert packed.scales_N is not None
    scales = packed.numbers.scales_of(rows, packed.shape[0], packed.scales_N, packed.group_scales)
    return rotate(packed.numbers.dequantize(stored, *scales), packed.rotation)


def rows_of(packed: Packed, places: Tensor) -> Tensor:
    """Rows of S at some places: (..., K) for integers (...), as ``to_dense`` has them; nothing else is decoded.

    Raises ``BackendError`` where entries are left out or values have no grid, ``IndexError`` for a place outside.
    """
    numbers, (_, cols) = packed.numbers, packed.shape
    if packed.scales_N is None or packed.layout.group_bits:
        raise BackendError(f"rows are read of whole matrices on a grid, not of {packed.kind} in format {packed.fmt}")
    flat = places.flatten()
    scales_T = embedding(flat, packed.scales_N.unsqueeze(1)).squeeze(1)  # refuses places that there are not
    codes = [_codes_of(packed, (flat - back).clamp(min=0)).view(-1, cols) for back in range(numbers.memory + 1)]
    groups = packed.group_scales
    steps = None if groups is None else groups.view(packed.shape[0], -1)[flat].flatten()
    rows = rotate(numbers.in_scale(numbers.numbers_of(codes, flat), scales_T, steps), packed.rotation)
    return rows.view(*places.shape, cols)


def _codes_of(packed: Packed, flat: Tensor) -> Tensor:
    """The codes of some rows, int8, flat."""
    numbers, (rows, cols), stored = packed.numbers, packed.shape, packed.values_Z
    bits = packed.bits
    if cols * bits % 8 == 0:
        return numbers.unpack(stored.view(rows, -1)[flat].flatten(), flat.numel() * cols)
    # rows begin within bytes: of two bytes side by side the bits from the first of a code on
    places = flat.unsqueeze(1) * (cols * bits) + bits * torch.arange(cols, device=stored.device)
    first = places >> 3
    pairs = stored[first].int() | stored[(first + 1).clamp(max=stored.numel() - 1)].int() << 8
    return signed(pairs >> (places & 7) & ((1 << bits) - 1), bits).flatten()
