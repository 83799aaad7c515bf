"""How kept entries are stored: in a floating type, or as integers of some bits with scales.

Integers of 2 to 8 bits stand for ``value * scale[row]``, one scale per stored row, symmetric: 4 bits are [-7, 7].
``int8`` values are stored as they are, narrower ones as a stream of two's complement numbers, least significant bit
first: 8 values of b bits fill b bytes. ``int4g32`` has a further scale for every 32 entries along the sum, a number of
8 bits without sign: ``value * group_scale[row, column // 32] * scale[row]``.

Values ``nl4`` are codes of 16 levels that are not evenly spaced: close where weights are many, wide where they are few.
On normal weights they leave 0.66 to 0.8 of the squared error of integers of as many bits. IQ4_NL of llama.cpp and NF4
(arXiv 2305.14314) are the same idea with other levels.

Values ``tc4`` are codes whose numbers depend on the codes above them, see ``fips.formats.trellis``.

A further value format is a subclass of ``Values`` with ``VALUES.register`` above it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from fips.formats.constants import kept
from fips.formats.registry import Registry

__all__ = [
    "FLOAT",
    "VALUES",
    "Values",
    "automatic_values",
    "integers",
    "pack_integers",
    "packed_length",
    "signed",
    "unpack_integers",
    "values_named",
]

FLOAT = "float"
SCALE_GROUPS = (16, 32, 64, 128)
"""Entries under one group scale that formats are there for."""
MOST_GROUP_SCALE = 255


class Values:
    """Numbers on a grid: a code per entry, as int8 while it is not packed, times the scale of its row.

    A kept entry of row n is ``decode(code) * scale_n``; the code 0 stands for 0. Subclasses say what differs.
    """

    known: ClassVar[tuple[str, ...]] = ()
    """Names of the class, as files and settings have them."""
    bits: int | None = 8
    """Of one stored value; None where the floating type of the tensor says it. Values with bits have scales."""
    scale_group: int | None = None
    """Entries along the sum under one group scale, beside the scale of the row; None: there are none."""
    largest: float = 127
    """Largest number of the grid, in units of the scale."""
    rounding_error: float = 0.0
    """Expected squared error of the best such grid for a normal variable of variance 1."""
    automatic: ClassVar[tuple[str, ...]] = ()
    """Those of its names that ``values: auto`` tries."""
    compiled: bool = False
    """Whether the compiled kernels read it."""
    plain: bool = True
    """Whether codes are the numbers themselves, so that decoding is a product with the scales."""
    levels: tuple[int, ...] = ()
    """The numbers of the grid in the order of their codes, the first of which is :math:`-2^{b-1}`; none: codes are the
    numbers. They fit into a byte with sign."""
    run: int = 1
    """Rows that can be decoded without those above them, beginning at a multiple of their number."""
    history: tuple[tuple[int, ...], ...] = ()
    """What codes of the rows above an entry have to say in its number (``fips.formats.trellis``): the next row first,
    by the bits of the code. With such a memory numbers cannot be rounded one by one, and none is left out."""

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The format of this name, None where it belongs to another class."""
        return cls(name) if name in cls.known else None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def memory(self) -> int:
        """Rows above an entry whose codes count."""
        return len(self.history)

    @property
    def spacing(self) -> float:
        """Between neighbours of the grid, on average, in units of the scale: 1 for integers."""
        return self.largest / max((1 << ((self.bits or 8) - 1)) - 1, 1)

    @property
    def scaled(self) -> bool:
        """Whether scales belong to the values."""
        return self.bits is not None

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the stored tensor; None: a floating type."""
        return torch.int8 if self.bits == 8 else torch.uint8

    def length(self, count: int) -> int:
        """Numbers of the stored tensor for ``count`` values."""
        return packed_length(count, self.bits or 8)

    def bits_of(self, itemsize: int) -> int:
        """Bits of one value beside numbers of a floating type of ``itemsize`` bytes."""
        return self.bits or 8 * itemsize

    def nbytes(self, count: int, itemsize: int) -> int:
        """Bytes of ``count`` values, scales left out; ``itemsize`` is that of the floating type."""
        return self.length(count)

    def num_scales_of(self, rows: int, cols: int) -> tuple[int, int]:
        """Scales, in a floating type, and group scales, a byte each, of a matrix that is summed along its columns."""
        return rows, 0 if self.scale_group is None else rows * -(-cols // self.scale_group)

    def scale_bytes(self, rows: int, cols: int, itemsize: float) -> float:
        """Bytes of both, for scales of ``itemsize`` bytes."""
        scales, groups = self.num_scales_of(rows, cols)
        return scales * itemsize + groups

    def nearest(self, steps: Tensor) -> Tensor:
        """The numbers of the grid nearest to some in units of their scale."""
        return steps.round().clamp(-self.largest, self.largest)

    def table(self) -> Tensor | None:
        """``nearest`` of the integers from -128 to 128, if that is all there is to it."""
        integers = torch.arange(-128.0, 129.0)
        return self.nearest(integers) if type(self).nearest is Values.nearest and self.largest <= 128 else None

    def steps(self, scales: Tensor, group_scales: Tensor | None, cols: int) -> Tensor:
        """What the grid is multiplied by at every entry: (rows, cols), or (rows, 1) without group scales."""
        if self.scale_group is None or group_scales is None:
            return scales.unsqueeze(1)
        groups = group_scales.view(len(scales), -1).to(scales.dtype) * scales.unsqueeze(1)
        return groups.repeat_interleave(self.scale_group, 1)[:, :cols]

    def fitted_scales(self, matrix: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Scales in ``dtype``, and group scales, that map the largest kept magnitudes to ``largest``.

        Both are 0 where nothing is kept.
        """
        return self.stored_scales(self.in_groups((matrix * mask).abs()).amax(2) / self.largest, dtype)

    def in_groups(self, matrix: Tensor) -> Tensor:
        """A matrix as (rows, groups, entries of a group), the last group filled with zeros; one group is a row."""
        rows, cols = matrix.shape
        if self.scale_group is None:
            return matrix.view(rows, 1, cols)
        return torch.nn.functional.pad(matrix, (0, -cols % self.scale_group)).view(rows, -1, self.scale_group)

    def stored_scales(self, steps: Tensor, dtype: torch.dtype, *, room: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """``(scales, group_scales)`` next to wanted steps (rows, groups); ``room`` times the largest can be stored."""
        if self.scale_group is None:
            return steps.squeeze(1).to(dtype), None
        scales = (steps.amax(1) * (room / MOST_GROUP_SCALE)).to(dtype)
        return scales, self.group_scales(steps, scales.unsqueeze(1)).flatten()

    def group_scales(self, steps: Tensor, scales: Tensor) -> Tensor:
        """Group scales next to wanted steps, given the scales of their rows; a step that is not 0 does not become 0."""
        wide = scales.to(steps.dtype)
        found = torch.where(wide == 0, 0.0, steps / wide).round().clamp(0, MOST_GROUP_SCALE)
        return torch.where((steps > 0) & (wide > 0), found.clamp_min(1), found).to(torch.uint8)

    def quantize(self, matrix: Tensor, scales: Tensor, group_scales: Tensor | None = None) -> Tensor:
        """Codes of the nearest numbers of the grid, int8; 0 where the scale is 0."""
        steps = self.steps(scales.to(matrix.dtype), group_scales, matrix.shape[1])
        return self.encode(self.nearest(torch.where(steps == 0, torch.zeros_like(matrix), matrix / steps)))

    def dequantize(self, codes: Tensor, scales: Tensor, group_scales: Tensor | None = None) -> Tensor:
        """``decode(codes) * steps`` in float32, or in the type of the scales if that is wider."""
        return self.in_scale(self.decode(codes), scales, group_scales)

    def scales_of(
        self, rows: slice, count: int, scales: Tensor, group_scales: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What ``dequantize`` wants for some of ``count`` rows: their scales, and those of their groups."""
        groups = None if group_scales is None else group_scales.view(count, -1)[rows].flatten()
        return scales[rows], groups

    def in_scale(self, numbers: Tensor, scales: Tensor, group_scales: Tensor | None = None) -> Tensor:
        """Numbers of the grid times their steps."""
        wide = scales.to(torch.promote_types(scales.dtype, torch.float32))
        return numbers.to(wide.dtype) * self.steps(wide, group_scales, numbers.shape[1])

    def encode(self, numbers: Tensor) -> Tensor:
        """Codes of numbers of the grid, int8. Inverse of ``decode``."""
        return numbers.to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        """Numbers of the grid that codes stand for; codes are (rows, cols) where the format has a memory."""
        return codes

    def numbers_of(self, above: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Numbers of some ``rows``, given their codes (rows, cols) and, as far as the memory goes, those 1, 2, ... rows
        above, whatever stands for rows that do not count."""
        return self.decode(above[0])

    def pack(self, codes: Tensor) -> Tensor:
        """A flat tensor of codes as it is stored."""
        return pack_integers(codes, bits=self.bits or 8)

    def unpack(self, stored: Tensor, count: int) -> Tensor:
        """The first ``count`` codes of a stored tensor. Exact inverse of ``pack``."""
        return unpack_integers(stored, bits=self.bits or 8, count=count)


VALUES: Registry[Values] = Registry("value format")


def values_named(name: str) -> Values:
    """The value format of a name. Raises ``ConfigError`` for an unknown one."""
    return VALUES.named(name)


@VALUES.register
class _Floats(Values):
    known = (FLOAT,)
    bits, compiled = None, True

    @property
    def dtype(self) -> None:
        return None

    def length(self, count: int) -> int:
        return count

    def nbytes(self, count: int, itemsize: int) -> int:
        return count * itemsize

    def num_scales_of(self, rows: int, cols: int) -> tuple[int, int]:
        return 0, 0

    def pack(self, codes: Tensor) -> Tensor:
        return codes

    def unpack(self, stored: Tensor, count: int) -> Tensor:
        return stored


@VALUES.register
class _Integers(Values):
    known: ClassVar[tuple[str, ...]] = ("int8", "int7", "int6", "int5", "int4", "int3", "int2")
    automatic: ClassVar[tuple[str, ...]] = ("int6", "int7", "int8")
    compiled = True
    bits: int
    _ERRORS: ClassVar = {2: 0.119, 3: 0.0374, 4: 0.0115, 5: 0.0035, 6: 0.00104, 7: 0.0003, 8: 0.00009}

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.bits = int(name.removeprefix("int"))
        self.largest = (1 << (self.bits - 1)) - 1
        self.rounding_error = self._ERRORS[self.bits]


@VALUES.register
class _GroupedIntegers(_Integers):
    known: ClassVar[tuple[str, ...]] = (f"intBgG with B of 2 to 8 and G of {', '.join(map(str, SCALE_GROUPS))}",)
    automatic: ClassVar[tuple[str, ...]] = ("int6g64",)
    scale_group: int
    _SHARE: ClassVar = {16: 0.62, 32: 0.72, 64: 0.81, 128: 0.88}
    """Of the rounding error with a scale per row, for a normal variable."""

    def __init__(self, name: str, bits: int, group: int) -> None:
        super().__init__(f"int{bits}")
        self.name, self.scale_group = name, group
        self.rounding_error *= self._SHARE[group]

    @classmethod
    def parse(cls, name: str) -> Self | None:
        found = re.fullmatch(rf"int([2-8])g({'|'.join(map(str, SCALE_GROUPS))})", name)
        return None if found is None else cls(name, int(found[1]), int(found[2]))


@VALUES.register
class _Levels(Values):
    """Levels that are not evenly spaced, 0 among them, with a scale per row or groups of them as integers have."""

    known: ClassVar[tuple[str, ...]] = (f"nlB and nlBgG with B of 2 to 5 and G of {', '.join(map(str, SCALE_GROUPS))}",)
    automatic: ClassVar[tuple[str, ...]] = ("nl2g64", "nl3", "nl3g64", "nl4", "nl4g64", "nl5", "nl5g64")
    compiled, plain = True, False
    bits: int
    _LEVELS: ClassVar[dict[int, tuple[int, ...]]] = {
        2: (-127, -55, 0, 90),
        3: (-127, -81, -49, -23, 0, 30, 64, 114),
        4: (-127, -97, -76, -59, -45, -33, -21, -11, 0, 12, 24, 36, 51, 68, 91, 124),
        5: (-127, -106, -91, -79, -69, -60, -53, -46, -40, -34, -29, -23, -19, -14, -9, -5,
            0, 5, 9, 14, 19, 25, 30, 36, 42, 49, 57, 65, 76, 89, 105, 127),
    }  # fmt: skip
    """Least squared error for normal numbers in groups of 64, each with its best scale (Lloyd's algorithm with 0 held
    in its place), in units of the largest."""
    _ERRORS: ClassVar = {2: 0.136, 3: 0.0358, 4: 0.0095, 5: 0.00245}
    _SHARE: ClassVar = {16: 0.6, 32: 0.7, 64: 0.8, 128: 0.87}

    def __init__(self, name: str, bits: int, group: int | None) -> None:
        super().__init__(name)
        self.bits, self.scale_group, self.levels = bits, group, self._LEVELS[bits]
        self.rounding_error = self._ERRORS[bits] * (1.0 if group is None else self._SHARE[group])
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def parse(cls, name: str) -> Self | None:
        found = re.fullmatch(rf"nl([2-5])(?:g({'|'.join(map(str, SCALE_GROUPS))}))?", name)
        return None if found is None else cls(name, int(found[1]), int(found[2]) if found[2] else None)

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """``(levels, codes, nearest)``: the number of every code, and code and number next to every integer from -128
        to 128."""
        return kept(self._tables, device, lambda: self._made_on(device))

    def _made_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        levels = torch.tensor(self.levels, dtype=torch.float32)
        middles = (levels[1:] + levels[:-1]) / 2
        places = torch.bucketize(torch.arange(-128.0, 129.0), middles)
        return levels.to(device), places.to(device=device, dtype=torch.int8), levels[places].to(device)

    def _places(self, numbers: Tensor) -> Tensor:
        """Places in the table of integers of numbers, flat."""
        return numbers.clamp(-128, 128).add_(128.5).int().flatten()

    def table(self) -> Tensor:
        return self._on(torch.device("cpu"))[2]

    def nearest(self, steps: Tensor) -> Tensor:
        nearest = self._on(steps.device)[2]
        return nearest.to(steps.dtype).index_select(0, self._places(steps)).view(steps.shape)

    def encode(self, numbers: Tensor) -> Tensor:
        codes = self._on(numbers.device)[1]
        return codes.index_select(0, self._places(numbers)).view(numbers.shape) - (1 << (self.bits - 1))

    def decode(self, codes: Tensor) -> Tensor:
        levels = self._on(codes.device)[0]
        return levels.index_select(0, (codes.int() + (1 << (self.bits - 1))).flatten()).view(codes.shape)


def integers(bits: int, group: int | None = None) -> Values:
    """The integers of 2 to 8 bits, with group scales if asked for. Raises ``ConfigError`` for others."""
    return VALUES.named(f"int{bits}" if group is None else f"int{bits}g{group}")


def automatic_values(*, coded: bool = True) -> list[Values]:
    """What ``values: auto`` chooses among, fewest bits first; without those that have a memory unless ``coded``, and
    with it without levels of as few bits, which leave more at the same size."""
    found = [values_named(name) for cls in VALUES.classes for name in cls.automatic]
    most = max((one.bits or 0 for one in found if one.memory), default=0)
    found = [one for one in found if (one.memory or (one.bits or 0) > most if coded else not one.memory)]
    return sorted(found, key=lambda one: one.scale_bytes(1, 4096, 2) + 512 * (one.bits or 0))


def packed_length(count: int, bits: int) -> int:
    """Bytes of ``count`` packed integers."""
    return (count * bits + 7) // 8


def pack_integers(values: Tensor, *, bits: int) -> Tensor:
    """A flat int8 tensor as a stream of ``bits`` per value, uint8; for 8 bits as it is."""
    if bits == 8:
        return values
    eights = torch.nn.functional.pad(values.long() & ((1 << bits) - 1), (0, -values.numel() % 8)).view(-1, 8)
    words = (eights << bits * torch.arange(8, device=values.device)).sum(1, keepdim=True)
    bytes_ = words >> 8 * torch.arange(bits, device=values.device) & 255
    return bytes_.to(torch.uint8).flatten()[: packed_length(values.numel(), bits)]


def unpack_integers(packed: Tensor, *, bits: int, count: int) -> Tensor:
    """The first ``count`` integers of a stream, int8. Exact inverse of ``pack_integers``."""
    if bits == 8:
        return packed
    if 8 % bits == 0:  # bytes, not words of 64 bits
        fields = packed.unsqueeze(1) >> torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return signed(fields & ((1 << bits) - 1), bits).flatten()[:count]
    bytes_ = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits).long()
    words = (bytes_ << 8 * torch.arange(bits, device=packed.device)).sum(1, keepdim=True)
    fields = words >> bits * torch.arange(8, device=packed.device) & ((1 << bits) - 1)
    return signed(fields, bits).flatten()[:count]


def signed(fields: Tensor, bits: int) -> Tensor:
    """Two's complement numbers, int8, whose lowest ``bits`` are these fields."""
    sign = 1 << (bits - 1)
    found = (fields ^ sign) - sign
    return found.view(torch.int8) if found.dtype == torch.uint8 else found.to(torch.int8)
