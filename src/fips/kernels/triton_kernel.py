"""The packed product in Triton: the tile of S that a program needs is decoded in registers and multiplied at once.

A program reads *groups* of columns, those that lie in one 32-bit word of the mask, in one N:M code, in one block or in
the fewest whole words of a stream of integers. The first columns of 16 or more groups are one operand of a product of
matrices, the second columns the next and so on: columns may be added in any order, so that none has to be moved, and
the place of a kept value among all is found once per group. That is 6 to 32 instructions per entry of S where one entry
at a time takes 66 to 84 (benchmarks/gpu_code.py counts them in what the compiler makes for sm_80 and sm_90).

``decode`` writes S out whole, for inputs so long that the decoding does not count. Triton is optional
(``pip install fips[gpu]``).

Shape legend: T tokens, N stored rows (outputs), K stored columns (the reduction).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from fips.errors import BackendError
from fips.formats.constants import made_apart
from fips.formats.packed import Packed, check_packed
from fips.formats.rotation import rotate
from fips.formats.trellis import RUN
from fips.formats.values import values_named
from fips.kernels import triton_words
from fips.kernels.backend import Backend, PreparedMatrix, RepeatedCall, kernel_refuses, unsupported_format
from fips.kernels.reference import check_inputs
from fips.kernels.validity import without_autocast

try:
    import triton
    import triton.language as tl
except ImportError as error:  # the reason is told when the kernel is asked for
    triton = None
    _missing = str(error)

__all__ = ["TileLayout", "TritonBackend", "TritonMatrix", "available", "decode", "multiply", "prepare"]

_FULL, _BITMASK, _NM, _BLOCK_ROWS, _BLOCK_COLS = range(5)
ROWS, DECODED_ROWS = 64, 4
"""Rows of S that one program multiplies by, and that one program decodes to memory."""
TILE_COLUMNS, FEWEST_GROUPS = 128, 16
"""Columns of S that a program takes at a time, and groups at least: products of matrix units sum over 16 or more."""
MOST_TOKENS, MOST_FLOAT32_TOKENS = 64, 16
"""Tokens that one program multiplies."""
MOST_SPLITS, PROGRAMS = 8, 4
"""Programs per multiprocessor that few rows are split for."""
UNROLL, WARPS, STAGES = 4, 4, 1
"""Columns of a group in one turn of the loop over them where there is a pattern; of a program; of its pipeline."""


@dataclass(frozen=True, slots=True)
class TileLayout:
    """How the kernels read a packed matrix: their constants."""

    FORMAT: int
    BITS: int
    """Of integer values; 0 for floats."""
    GROUP: int
    """Columns of a group."""
    WORDS: bool
    """Whether the mask, or a stream of integers without one, is read 32 bits at a time."""
    UNIT: int = 1
    """Entries under one bit or code of the pattern."""
    CODE_BITS: int = 1
    GROUP_KEPT: int = 0
    """Kept entries of an N:M group."""
    SCALE_GROUP: int = 0
    """Columns under one group scale; 0 without."""
    LEVELS: bool = False
    """Whether integers are codes of levels."""
    MEMORY: int = 0
    """Rows above an entry whose codes count."""

    @property
    def GROUPS(self) -> int:
        """In one tile of S."""
        return max(FEWEST_GROUPS, TILE_COLUMNS // self.GROUP)

    @property
    def counts(self) -> bool:
        """Whether only the pattern says where the values of a row begin."""
        return self.FORMAT in (_BITMASK, _BLOCK_ROWS, _BLOCK_COLS)

    @classmethod
    def of(cls, packed: Packed) -> TileLayout:
        numbers = packed.numbers
        found = replace(cls._of(packed), SCALE_GROUP=numbers.scale_group or 0, LEVELS=bool(numbers.levels))
        return replace(found, MEMORY=numbers.memory, WORDS=False) if numbers.memory else found

    @classmethod
    def _of(cls, packed: Packed) -> TileLayout:
        cols = packed.shape[1]
        pattern, bits = packed.layout, packed.bits
        code, unit = pattern.code(packed.block_axis), pattern.group
        if code is None or not packed.numbers.compiled:
            raise BackendError(f"{unsupported_format(packed)}; use torch")
        if code == _NM:
            return cls(_NM, bits, unit, False, unit, pattern.group_bits, pattern.group_kept or 0)
        if code == _FULL:
            group = 32 // math.gcd(bits, 32) if bits else 8
            return cls(_FULL, bits, group, bits > 0 and _in_words(packed.values_Z, cols * bits))
        if code == _BLOCK_COLS:
            return cls(_BLOCK_COLS, bits, unit, False, unit)
        return cls(code, bits, 32, _in_words(packed.pattern, cols), unit)

    def read(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """Values and pattern in the units they are read in."""
        values, pattern = packed.values_Z, packed.pattern
        if self.WORDS and self.FORMAT == _FULL:
            return values.view(torch.int32), pattern
        return values, pattern.view(torch.int32) if self.WORDS else pattern

    def constants(self) -> dict[str, int | bool]:
        """By the names of the kernels' parameters."""
        names = ("FORMAT", "BITS", "GROUP", "GROUPS", "WORDS", "UNIT", "CODE_BITS", "GROUP_KEPT")
        return {name: getattr(self, name) for name in names}

    def meanings(self) -> dict[str, int | bool]:
        """What kernels that look at values want beside ``constants``."""
        return {"SCALE_GROUP": self.SCALE_GROUP, "LEVELS": self.LEVELS, "MEMORY": self.MEMORY, "RUN": RUN}


class TritonMatrix(PreparedMatrix):
    """A packed matrix with its layout and the places of the first values of its rows.

    ``splits`` parts of the columns are multiplied side by side where rows alone are too few for the device.
    """

    def __init__(self, packed: Packed, *, splits: int | None = None) -> None:
        check_packed(packed)
        super().__init__(packed)
        self.words = triton_words.WordMatrix(packed) if triton_words.WordMatrix.fits(packed) else None
        self.layout = layout = TileLayout.of(packed)
        rows, cols = packed.shape
        device = packed.values_Z.device
        self.table = _code_table(layout.GROUP_KEPT, layout.UNIT if layout.FORMAT == _NM else 0, device)
        self.values, pattern = layout.read(packed)
        self.pattern = pattern if pattern.numel() else self.table
        self.group_scales = self.table if packed.group_scales is None else packed.group_scales
        self.levels, self.history = _tables(packed.value_format, device)
        tile = layout.GROUP * layout.GROUPS
        wanted = _splits(rows, device) if splits is None else splits
        self.split_columns = -(-cols // (wanted * tile)) * tile
        self.splits = -(-cols // self.split_columns)
        self.starts = self._starts() if layout.counts else self.table

    def _starts(self) -> Tensor:
        """Values before every row (of blocks) and split, (rows, splits)."""
        rows, cols = self.packed.shape
        rows //= self.layout.UNIT if self.layout.FORMAT == _BLOCK_ROWS else 1
        counts = torch.empty(rows, self.splits, dtype=torch.int32, device=self.values.device)
        _count_kernel[(triton.cdiv(rows, ROWS), self.splits)](
            self.pattern, self.table, counts, rows, cols, self.packed.pattern.numel(), self.split_columns, self.splits,
            **self.layout.constants(), ROWS=ROWS,
        )  # fmt: skip
        ends = counts.flatten().cumsum(0)
        kept = int(ends[-1]) * (self.layout.UNIT if self.layout.FORMAT == _BLOCK_ROWS else 1)
        if kept != self.packed.kept:
            raise BackendError(
                f"the pattern keeps {kept} entries, but there are {self.packed.kept} values; load the checkpoint again"
            )
        return (ends.view_as(counts) - counts).to(torch.int32)

    @property
    def extra_bytes(self) -> int:
        """Memory beyond the stored tensors."""
        return 4 * (self.table.numel() + (self.starts.numel() if self.layout.counts else 0))


def _in_words(stream: Tensor, row_bits: int) -> bool:
    """Whether every row begins with a whole 32-bit word."""
    return row_bits % 32 == 0 and stream.data_ptr() % 16 == 0 and stream.is_contiguous()


def _splits(rows: int, device: torch.device) -> int:
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return min(MOST_SPLITS, max(1, PROGRAMS * processors * ROWS // max(rows, 1)))


def available() -> bool:
    """Whether Triton is installed."""
    return triton is not None


def prepare(packed: Packed, *, splits: int | None = None) -> TritonMatrix:
    """What ``multiply`` and ``decode`` need, once per matrix.

    Raises ``BackendError`` without Triton or for damaged tensors.
    """
    if triton is None:
        raise BackendError(f"Triton is not installed ({_missing}); `pip install fips[gpu]`")
    return TritonMatrix(packed, splits=splits)


def multiply(x_TK: Tensor, prepared: TritonMatrix, bias_N: Tensor | None = None) -> Tensor:
    r""":math:`y = x S^\top + b` in the type of ``x``; sums in float32; no autograd.

    Raises ``ShapeError`` for inputs or a bias of another size.
    """
    packed = prepared.packed
    rows, cols = packed.shape
    check_inputs(x_TK, cols, bias_N, rows)
    bias_N = None if bias_N is None else bias_N.contiguous()
    x = rotate(x_TK.reshape(-1, cols), packed.rotation)
    tokens = x.shape[0]
    words = prepared.words
    if words is not None and tokens:
        if triton_words.takes(tokens, x.dtype):
            y = triton_words.multiply(x.contiguous(), packed, words, bias_N)
        else:
            y = linear(x, triton_words.decode(packed, words, x.dtype), None if bias_N is None else bias_N.to(x.dtype))
        return y.view(*x_TK.shape[:-1], rows)
    y = x.new_empty(tokens, rows)
    if y.numel() == 0:
        return y.view(*x_TK.shape[:-1], rows)
    most = MOST_TOKENS if x.dtype != torch.float32 else MOST_FLOAT32_TOKENS
    block_t = min(most, max(16, triton.next_power_of_2(tokens)))
    alone = prepared.splits == 1
    sums = y if alone else x.new_empty(prepared.splits, tokens, rows, dtype=torch.float32)
    unused = prepared.table
    scales, bias = (unused if part is None else part for part in (packed.scales_N, bias_N))
    affine = {"SCALED": packed.scales_N is not None, "BIASED": bias_N is not None}
    _multiply_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(tokens, block_t), prepared.splits)](
        x, prepared.values, prepared.pattern, prepared.starts, prepared.table, scales, prepared.group_scales,
        prepared.levels, prepared.history, bias, sums, tokens, rows, cols, x.stride(0), x.stride(1),
        packed.pattern.numel(), packed.values_Z.numel(), prepared.split_columns, prepared.splits,
        **prepared.layout.constants(), **prepared.layout.meanings(), **affine, ALONE=alone,
        WIDE=not x.is_cuda, BLOCK_T=block_t, ROWS=ROWS, UNROLL=UNROLL, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip  # WIDE is for the interpreter, whose dot product knows no bfloat16
    if not alone:
        triton_words.add_splits(sums, packed.scales_N, bias_N, y)
    return y.view(*x_TK.shape[:-1], rows)


def decode(prepared: TritonMatrix, dtype: torch.dtype) -> Tensor:
    """S as a dense (N, K) matrix; integers are multiplied by their scales in float32."""
    packed = prepared.packed
    if prepared.words is not None:
        return rotate(triton_words.decode(packed, prepared.words, dtype), packed.rotation)
    rows, cols = packed.shape
    dense = torch.empty(rows, cols, dtype=dtype, device=packed.values_Z.device)
    _decode_kernel[(triton.cdiv(rows, DECODED_ROWS), prepared.splits)](
        prepared.values, prepared.pattern, prepared.starts, prepared.table,
        prepared.table if packed.scales_N is None else packed.scales_N, prepared.group_scales, prepared.levels,
        prepared.history, dense, rows, cols, packed.pattern.numel(), packed.values_Z.numel(), prepared.split_columns,
        prepared.splits,
        **prepared.layout.constants(), **prepared.layout.meanings(), SCALED=packed.scales_N is not None,
        ROWS=DECODED_ROWS,
    )  # fmt: skip
    return rotate(dense, packed.rotation)


class TritonBackend(Backend):
    """The Triton kernels; torch itself multiplies by whole matrices of floats."""

    name = "triton"
    decodes = True
    repeats_up_to = triton_words.MOST_TOKENS

    def supports(self, packed: Packed, device: torch.device, dtype: torch.dtype) -> str | None:
        if not available():
            return f"Triton is not installed ({_missing}); `pip install fips[gpu]`"
        if packed.layout.code(packed.block_axis) == _FULL and packed.scales_N is None:
            return "a whole matrix of floats is a dense product"
        return kernel_refuses(packed, device, dtype, "cuda")

    def prepare(self, packed: Packed) -> TritonMatrix:
        with _on_device_of(packed.values_Z):
            return prepare(packed)

    def multiply(
        self, x: Tensor, prepared: PreparedMatrix, bias: Tensor | None, *, activation_bits: int | None = None
    ) -> Tensor:
        with _on_device_of(x):
            return multiply(x, cast(TritonMatrix, prepared), bias)

    def decode(self, prepared: PreparedMatrix, dtype: torch.dtype) -> Tensor:
        with _on_device_of(prepared.packed.values_Z):
            return decode(cast(TritonMatrix, prepared), dtype)

    def repeat(
        self, x: Tensor, prepared: PreparedMatrix, bias: Tensor | None, activation_bits: int | None
    ) -> RepeatedCall | None:
        matrix = cast(TritonMatrix, prepared)
        whole = bias is None or bias.is_contiguous()
        return _Repeated(x.dtype, matrix) if matrix.words is not None and x.is_cuda and whole else None


class _Repeated(RepeatedCall):
    """Few tokens once more through words of the same matrix."""

    __slots__ = ("dtype", "matrix")

    def __init__(self, dtype: torch.dtype, matrix: TritonMatrix) -> None:
        self.dtype, self.matrix = dtype, matrix

    def holds(self) -> bool:
        return self.matrix.holds()

    def __call__(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        words = self.matrix.words
        assert words is not None
        with _on_device_of(x), without_autocast(x.device):
            return triton_words.multiply(rotate(x, packed.rotation).contiguous(), packed, words, bias)


def _on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    there = not tensor.is_cuda or tensor.device.index == torch.cuda.current_device()
    return nullcontext() if there else torch.cuda.device(tensor.device)


@cache
def _code_table(n: int, m: int, device: torch.device) -> Tensor:
    """The M-bit mask of every code of an N:M format, in code order; of numbers that are no code, 0."""
    masks = sorted(mask for mask in range(1 << m) if mask.bit_count() == n)  # colexicographic order of the subsets
    assert len(masks) == math.comb(m, n)
    masks += [0] * ((1 << (len(masks) - 1).bit_length()) - len(masks))
    return made_apart(lambda: torch.tensor(masks, dtype=torch.int32, device=device))


@cache
def _tables(value_format: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The levels of a value format and what the codes above an entry add to its place; [0] where there are none."""
    numbers = values_named(value_format)
    return made_apart(
        lambda: (
            torch.tensor(numbers.levels or [0], dtype=torch.int8, device=device),
            torch.tensor(numbers.history or [0], dtype=torch.uint8, device=device),
        )
    )


if triton is not None:

    @triton.jit
    def _popcount(word) -> Any:
        word = word - ((word >> 1) & 0x55555555)
        word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
        word = (word + (word >> 4)) & 0x0F0F0F0F
        word = word + (word >> 8)
        return (word + (word >> 16)) & 0x3F

    @triton.jit
    def _bytes_at(stream, byte, mask, size, COUNT: tl.constexpr) -> Any:
        """Some bytes of a stream as one number of 64 bits."""
        word = tl.zeros_like(byte)
        for i in tl.static_range(COUNT):
            word |= tl.load(stream + byte + i, mask=mask & (byte + i < size), other=0).to(tl.int64) << (8 * i)
        return word

    @triton.jit
    def _kept(
        pattern, table, row, k, inside, cols, pattern_bytes, FORMAT: tl.constexpr, UNIT: tl.constexpr,
        CODE_BITS: tl.constexpr, GROUP_KEPT: tl.constexpr, WORDS: tl.constexpr,
    ) -> Any:  # fmt: skip
        """The kept columns of the groups that begin at ``k``, a bit each, and how many they are."""
        if FORMAT == 2:
            bit = (row * cols + k) // UNIT * CODE_BITS
            code = (_bytes_at(pattern, bit // 8, inside, pattern_bytes, 3) >> (bit % 8)) & ((1 << CODE_BITS) - 1)
            bits = tl.load(table + code, mask=inside, other=0)
            count = tl.full(bits.shape, GROUP_KEPT, tl.int32)
        elif FORMAT == 4:
            block = row * (cols // UNIT) + k // UNIT
            byte = tl.load(pattern + block // 8, mask=inside, other=0).to(tl.int32)
            bits = -((byte >> (block % 8).to(tl.int32)) & 1)
            count = -bits * UNIT
        else:
            if WORDS:
                bits = tl.load(pattern + row // UNIT * (cols // 32) + k // 32, mask=inside, other=0)
            else:
                at = row // UNIT * cols + k
                bits = (_bytes_at(pattern, at // 8, inside, pattern_bytes, 5) >> (at % 8)).to(tl.int32)
                left = tl.minimum(cols - k, 32)
                bits &= tl.where(left < 32, (1 << (left % 32)) - 1, -1)
            count = _popcount(bits)
        return bits, count

    @triton.jit
    def _first(starts, n, rows, cols, split, split_columns, splits, FORMAT: tl.constexpr, UNIT: tl.constexpr,
               GROUP_KEPT: tl.constexpr) -> Any:  # fmt: skip
        """Places of the first values of rows in a split."""
        if FORMAT == 2:
            return (n * (cols // UNIT) + split * (split_columns // UNIT)) * GROUP_KEPT
        elif FORMAT == 3:  # the rows of a block take turns in its values
            return tl.load(starts + n // UNIT * splits + split, mask=n < rows, other=0) * UNIT + n % UNIT
        elif FORMAT == 0:
            return n
        else:
            return tl.load(starts + n * splits + split, mask=n < rows, other=0)

    @triton.jit
    def _places(
        pattern, table, row, k, inside, cols, pattern_bytes, first, stride, FORMAT: tl.constexpr, UNIT: tl.constexpr,
        CODE_BITS: tl.constexpr, GROUP_KEPT: tl.constexpr, WORDS: tl.constexpr,
    ) -> Any:  # fmt: skip
        """The kept columns of a tile's groups, the place of every group's first value, and those after the tile."""
        bits, count = _kept(
            pattern, table, row, k, inside, cols, pattern_bytes, FORMAT, UNIT, CODE_BITS, GROUP_KEPT, WORDS
        )
        place = first[:, None] + (tl.cumsum(count, axis=1) - count) * stride
        return bits, place, first + tl.sum(count, axis=1) * stride

    @triton.jit
    def _stored(values, place, mask, value_bytes, BITS: tl.constexpr) -> Any:
        """Values at their places: floats, bytes, or integers of BITS bits in a stream of bytes."""
        if BITS == 0:
            found = tl.load(values + place, mask=mask, other=0)
        else:
            if 8 % BITS == 0:
                bit = (place & (8 // BITS - 1)).to(tl.int32) * BITS
                byte = place >> (8 // BITS // 2)
            else:  # 8 integers fill BITS bytes
                bit = (place & 7).to(tl.int32) * BITS
                byte = (place >> 3) * BITS + (bit >> 3)
            word = tl.load(values + byte, mask=mask, other=0).to(tl.int32)
            if 8 % BITS != 0:
                word |= tl.load(values + byte + 1, mask=mask & (byte + 1 < value_bytes), other=0).to(tl.int32) << 8
            found = (word << (32 - BITS - (bit & 7))) >> (32 - BITS)
        return found

    @triton.jit
    def _field(word, after, AT: tl.constexpr, BITS: tl.constexpr) -> Any:
        """The integer at bit AT of a word, or of the word and the one after it."""
        if AT + BITS <= 32:
            found = word << (32 - BITS - AT)
        else:
            found = (((word >> AT) & ((1 << (32 - AT)) - 1)) | (after << (32 - AT))) << (32 - BITS)
        return found >> (32 - BITS)

    @triton.jit
    def _level(codes, levels, BITS: tl.constexpr, LEVELS: tl.constexpr) -> Any:
        """The numbers of codes; values that are no codes as they are."""
        if LEVELS:
            return tl.load(levels + (codes + (1 << (BITS - 1)))).to(tl.int32)
        else:
            return codes

    @triton.jit
    def _recalled(
        values, place, mask, row, cols, value_bytes, history, levels, BITS: tl.constexpr, MEMORY: tl.constexpr,
        RUN: tl.constexpr,
    ) -> Any:  # fmt: skip
        """The numbers of a matrix kept whole whose codes depend on those above them."""
        CODES: tl.constexpr = 1 << BITS
        found = _stored(values, place, mask, value_bytes, BITS) & (CODES - 1)
        for back in tl.static_range(1, MEMORY + 1):
            counts = mask & (row % RUN >= back)
            above = _stored(values, place - back * cols, counts, value_bytes, BITS) & (CODES - 1)
            found ^= tl.load(history + (back - 1) * CODES + above, mask=counts, other=0).to(tl.int32)
        return tl.load(levels + found).to(tl.int32)

    @triton.jit
    def _in_group(weights, group_scales, row, k, cols, inside, SCALE_GROUP: tl.constexpr) -> Any:
        """Integers of columns ``k`` times their group scales; as they are where there are none."""
        if SCALE_GROUP == 0:
            return weights
        else:
            at = row * ((cols + SCALE_GROUP - 1) // SCALE_GROUP) + k // SCALE_GROUP
            scale = tl.load(group_scales + at, mask=inside & (k < cols), other=0)
            return weights.to(tl.float32) * scale.to(tl.float32)

    @triton.jit
    def _terms(numbers) -> Any:
        """Float32 as three bfloat16 numbers that add up to it; of what is not finite the first is all."""
        high = numbers.to(tl.bfloat16)
        rest = numbers - high.to(tl.float32)
        rest = tl.where(rest - rest == 0.0, rest, 0.0)
        middle = rest.to(tl.bfloat16)
        return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)

    @triton.jit
    def _product(total, weights, x_ptr, x_at, k, t_inside, cols, stride_k, WIDE: tl.constexpr) -> Any:
        """The sums plus weights, (N, groups), of the columns ``k`` times these columns of the tokens.

        Products of float32 are made of bfloat16 terms: matrix units have none as exact, and without them a program is
        so long that compiling it takes minutes.
        """
        x = tl.load(x_ptr + x_at + k[:, None] * stride_k, mask=t_inside & (k[:, None] < cols), other=0.0)
        if WIDE:
            total = tl.dot(weights.to(tl.float32).to(x.dtype).to(tl.float32), x.to(tl.float32), total)
        elif x.dtype == tl.float32:
            high, middle, low = _terms(x)
            if weights.dtype.is_int() or weights.dtype == tl.bfloat16:
                exact = weights.to(tl.float32).to(tl.bfloat16)
                total = tl.dot(exact, low, total)
                total = tl.dot(exact, middle, total)
                total = tl.dot(exact, high, total)
            else:
                first, second, third = _terms(weights.to(tl.float32))
                finite = tl.where(x - x == 0.0, x, 0.0).to(tl.bfloat16)  # 0 times Inf would be NaN
                total = tl.dot(third, finite, total)
                total = tl.dot(second, middle, total)
                total = tl.dot(first, low, total)
                total = tl.dot(second, finite, total)
                total = tl.dot(first, middle, total)
                total = tl.dot(first, high, total)
        else:
            total = tl.dot(weights.to(tl.float32).to(x.dtype), x, total)
        return total

    @triton.jit
    def _count_kernel(
        pattern, table, counts, rows, cols, pattern_bytes, split_columns, splits, FORMAT: tl.constexpr,
        UNIT: tl.constexpr, CODE_BITS: tl.constexpr, GROUP_KEPT: tl.constexpr, WORDS: tl.constexpr,
        GROUP: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
    ) -> None:  # fmt: skip
        """Kept entries (blocks of rows) of every row and split."""
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        split = tl.program_id(1)
        total = tl.zeros((ROWS,), dtype=tl.int32)
        PATTERN_UNIT: tl.constexpr = 1 if FORMAT == 3 else UNIT  # here a row is a row of blocks
        for k0 in range(split * split_columns, min(cols, (split + 1) * split_columns), GROUP * GROUPS):
            k = k0 + tl.arange(0, GROUPS) * GROUP
            inside = (n[:, None] < rows) & (k[None, :] < cols)
            _, count = _kept(
                pattern, table, n[:, None].to(tl.int64), k[None, :], inside, cols, pattern_bytes, FORMAT, PATTERN_UNIT,
                CODE_BITS, GROUP_KEPT, WORDS,
            )  # fmt: skip
            total += tl.sum(tl.where(inside, count, 0), axis=1)
        tl.store(counts + n * splits + split, total, mask=n < rows)

    @triton.jit(do_not_specialize=["tokens"])
    def _multiply_kernel(
        x_ptr, values, pattern, starts, table, scales, group_scales, levels, history, bias, y_ptr, tokens, rows, cols,
        stride_t, stride_k, pattern_bytes, value_bytes, split_columns, splits, BITS: tl.constexpr, FORMAT: tl.constexpr,
        SCALE_GROUP: tl.constexpr, LEVELS: tl.constexpr, UNIT: tl.constexpr, CODE_BITS: tl.constexpr,
        GROUP_KEPT: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SCALED: tl.constexpr,
        BIASED: tl.constexpr, ALONE: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr,
        UNROLL: tl.constexpr, MEMORY: tl.constexpr, RUN: tl.constexpr,
    ) -> None:  # fmt: skip
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
        split = tl.program_id(2)
        t_inside = t[None, :] < tokens
        x_at = t[None, :].to(tl.int64) * stride_t
        row = n[:, None].to(tl.int64)
        first = _first(starts, n, rows, cols, split, split_columns, splits, FORMAT, UNIT, GROUP_KEPT)
        total = tl.zeros((ROWS, BLOCK_T), dtype=tl.float32)
        for k0 in range(split * split_columns, min(cols, (split + 1) * split_columns), GROUP * GROUPS):
            k = k0 + tl.arange(0, GROUPS) * GROUP
            inside = (n[:, None] < rows) & (k[None, :] < cols)
            if WORDS and FORMAT == 0:
                at = values + (row * (cols // GROUP) + k[None, :] // GROUP) * (GROUP * BITS // 32)
                word = tl.load(at, mask=inside, other=0)
                for i in tl.static_range(GROUP * BITS // 32):
                    after = word
                    if i + 1 < GROUP * BITS // 32:
                        after = tl.load(at + (i + 1), mask=inside, other=0)
                    for j in tl.static_range((32 * i + BITS - 1) // BITS, (32 * i + 31 + BITS) // BITS):
                        weights = _level(_field(word, after, j * BITS - 32 * i, BITS), levels, BITS, LEVELS)
                        weights = _in_group(weights, group_scales, row, k[None, :] + j, cols, inside, SCALE_GROUP)
                        total = _product(total, weights, x_ptr, x_at, k + j, t_inside, cols, stride_k, WIDE)
                    word = after
            elif FORMAT == 0:
                for j in tl.static_range(GROUP):
                    place = row * cols + k[None, :] + j
                    there = inside & (k[None, :] + j < cols)
                    if MEMORY > 0:
                        weights = _recalled(
                            values, place, there, row, cols, value_bytes, history, levels, BITS, MEMORY, RUN
                        )
                    else:
                        weights = _level(_stored(values, place, there, value_bytes, BITS), levels, BITS, LEVELS)
                    weights = _in_group(weights, group_scales, row, k[None, :] + j, cols, inside, SCALE_GROUP)
                    total = _product(total, weights, x_ptr, x_at, k + j, t_inside, cols, stride_k, WIDE)
            else:
                stride = UNIT if FORMAT == 3 else 1
                bits, place, first = _places(
                    pattern, table, row, k[None, :], inside, cols, pattern_bytes, first, stride, FORMAT, UNIT,
                    CODE_BITS, GROUP_KEPT, WORDS,
                )  # fmt: skip
                for j in tl.range(0, GROUP, loop_unroll_factor=UNROLL):
                    bit = (bits >> j) & 1
                    weights = _level(_stored(values, place, bit != 0, value_bytes, BITS), levels, BITS, LEVELS)
                    weights = _in_group(weights, group_scales, row, k[None, :] + j, cols, inside, SCALE_GROUP)
                    total = _product(total, weights, x_ptr, x_at, k + j, t_inside, cols, stride_k, WIDE)
                    place += bit * stride
        if ALONE and SCALED:
            total *= tl.load(scales + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
        if ALONE and BIASED:
            total += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
        y_at = (split.to(tl.int64) * tokens + t[None, :]) * rows + n[:, None]
        tl.store(y_ptr + y_at, total.to(y_ptr.dtype.element_ty), mask=(n[:, None] < rows) & t_inside)

    @triton.jit
    def _decode_kernel(
        values, pattern, starts, table, scales, group_scales, levels, history, dense, rows, cols, pattern_bytes,
        value_bytes, split_columns, splits, BITS: tl.constexpr, FORMAT: tl.constexpr, SCALE_GROUP: tl.constexpr,
        LEVELS: tl.constexpr, UNIT: tl.constexpr, CODE_BITS: tl.constexpr, GROUP_KEPT: tl.constexpr,
        WORDS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr,
        MEMORY: tl.constexpr, RUN: tl.constexpr,
    ) -> None:  # fmt: skip
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        split = tl.program_id(1)
        row = n[:, None].to(tl.int64)
        j = tl.arange(0, GROUP)[None, None, :]
        first = _first(starts, n, rows, cols, split, split_columns, splits, FORMAT, UNIT, GROUP_KEPT)
        scale = tl.full((ROWS,), 1.0, tl.float32)
        if SCALED:
            scale = tl.load(scales + n, mask=n < rows, other=0.0).to(tl.float32)
        for k0 in range(split * split_columns, min(cols, (split + 1) * split_columns), GROUP * GROUPS):
            k = k0 + tl.arange(0, GROUPS) * GROUP
            inside = (n[:, None] < rows) & (k[None, :] < cols)
            at = (row * cols + k[None, :])[:, :, None] + j
            keep = inside[:, :, None] & (k[None, :, None] + j < cols)
            present = keep
            if WORDS and FORMAT == 0:
                words = (row * (cols // GROUP) + k[None, :] // GROUP) * (GROUP * BITS // 32)
                place = words[:, :, None] + j * BITS // 32
                shift = j * BITS % 32
                word = tl.load(values + place, mask=keep, other=0).to(tl.uint32, bitcast=True) >> shift
                if 32 % BITS != 0:
                    after = tl.load(values + place + 1, mask=keep & (shift + BITS > 32), other=0)
                    word |= ((after << 1) << (31 - shift)).to(tl.uint32, bitcast=True)
                stored = (word.to(tl.int32, bitcast=True) << (32 - BITS)) >> (32 - BITS)
            elif MEMORY > 0:
                stored = _recalled(
                    values, at, keep, row[:, :, None], cols, value_bytes, history, levels, BITS, MEMORY, RUN
                )
            elif FORMAT == 0:
                stored = _stored(values, at, keep, value_bytes, BITS)
            else:
                stride = UNIT if FORMAT == 3 else 1
                bits, place, first = _places(
                    pattern, table, row, k[None, :], inside, cols, pattern_bytes, first, stride, FORMAT, UNIT,
                    CODE_BITS, GROUP_KEPT, WORDS,
                )  # fmt: skip
                present = keep & (((bits[:, :, None] >> j) & 1) != 0)
                before = _popcount(bits[:, :, None] & ((1 << j) - 1))
                stored = _stored(values, place[:, :, None] + before * stride, present, value_bytes, BITS)
            columns = k[None, :, None] + j
            step = _in_group(scale[:, None, None], group_scales, row[:, :, None], columns, cols, keep, SCALE_GROUP)
            if MEMORY == 0:
                stored = _level(stored, levels, BITS, LEVELS)
            numbers = stored.to(tl.float32)
            entries = tl.where(present, numbers * step, 0.0)
            tl.store(dense + at, entries.to(dense.dtype.element_ty), mask=keep)
