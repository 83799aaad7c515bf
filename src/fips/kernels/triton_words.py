"""Whole matrices of codes in Triton, read a 32-bit word at a time: products for few tokens, and S written out.

A dense bfloat16 entry is read in the time of about 17 instructions of one thread (H100), one of 4 bits in that of 4 or
5. So hardly anything may be done per entry. Every thread reads the bytes of eight columns, which are as many as a code
has bits, and, for a token or a few, the same columns of the tokens, which stay in registers for all rows of a program.
Numbers of the grid are cut out by one logical operation, which makes them the lower bits of a float32 (``_integer``);
sums are float32 and added between threads once, at the end; nothing passes through shared memory. Coded values
(``fips.formats.trellis``) are looked up at places whose bits are sums modulo 2 of bits of the codes, made for all codes
of a thread at once (``_places``). From ``MOST_TOKENS`` on the numbers of many rows go to the matrix units.

Tensors of the size of a tile have one dimension until the numbers are there: with two, some versions of Triton lay
threads along the rows, and every number then passes through shared memory.

Shape legend: T tokens, N stored rows (outputs), K stored columns (the reduction).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fips.formats.constants import made_apart
from fips.formats.packed import Packed
from fips.formats.patterns import FULL
from fips.formats.trellis import RUN
from fips.formats.values import values_named

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["EIGHT", "MOST_TOKENS", "WordMatrix", "add_splits", "decode", "multiply", "takes"]

EIGHT = 8
"""Columns whose codes one thread reads at a time."""
MOST_TOKENS = 64
"""Tokens that ``multiply`` takes."""
FEW_TOKENS, FEW_TOKENS_OF_LARGE, LARGE_ROWS = 4, 2, 4096
"""Tokens up to which threads multiply them, and the same for matrices of at least so many rows; matrix units are faster
for more."""
ROWS, WARPS = 4, 4
"""Rows of a program for few tokens, all of them in every thread, and warps, side by side along the columns."""
TILE_ROWS, TILE_EIGHTS, TILE_WARPS = 64, 16, 4
"""Rows and eights of columns of a tile that goes to the matrix units."""
PROGRAMS, MOST_SPLITS = 8, 8
"""Programs per multiprocessor that columns are split for where rows are few, and parts at most."""
DECODED_ROWS, DECODING_WARPS = 4, 4


class WordMatrix:
    """What the kernels know of a packed matrix beside its stored tensors; ``fits`` says which have one."""

    def __init__(self, packed: Packed) -> None:
        numbers = packed.numbers
        self.words = packed.values_Z.view(torch.int32)
        self.levels = _levels(numbers.name, packed.values_Z.device) if numbers.levels else self.words
        self.pitch = packed.shape[1] // EIGHT
        self.constants: dict[str, int] = {
            "BITS": packed.bits,
            "SCALE_GROUP": numbers.scale_group or 0,
            "PLACE_BITS": max(len(numbers.levels) - 1, 0).bit_length(),
            "MEMORY": numbers.memory,
            "HISTORY": _history(numbers.history, packed.bits),
            "RUN": RUN,
        }
        self._launches: dict[Hashable, tuple[Any, tuple[object, ...]]] = {}

    def again(self, key: Hashable, tensors: Sequence[Tensor | None]) -> bool:
        """Start a kernel as the first time: looking at all arguments again takes Triton longer than a product."""
        known = self._launches.get(key)
        if known is not None:
            known[0](*tensors, *known[1])
        return known is not None

    def first(
        self, key: Hashable, kernel: Any, grid: tuple[int, int, int], tensors: Sequence[Tensor | None],
        numbers: tuple[int, ...], settings: dict[str, int], **options: object,
    ) -> None:  # fmt: skip
        """Start a kernel, and remember how under a key that says everything it was compiled for; None: do not."""
        constants = self.constants | settings
        compiled = kernel[grid](*tensors, *numbers, **constants, **options)
        if compiled is not None and key is not None:  # the interpreter compiles nothing
            self._launches[key] = compiled[grid], (*numbers, *constants.values())

    @staticmethod
    def fits(packed: Packed) -> bool:
        """Whether rows are eights of columns, each under one scale."""
        numbers, stored = packed.numbers, packed.values_Z
        if packed.fmt != FULL or not numbers.compiled or packed.scales_N is None or not 2 <= packed.bits <= 8:
            return False
        aligned = stored.data_ptr() % 16 == 0 and stored.nbytes % 4 == 0
        return aligned and packed.shape[1] % EIGHT == 0 and (numbers.scale_group or EIGHT) % EIGHT == 0


@cache
def _levels(name: str, device: torch.device) -> Tensor:
    """The number of every code, or place, as float32. The table does not cross a multiple of its size."""
    numbers = values_named(name)
    half = 0 if numbers.memory else len(numbers.levels) // 2  # codes have a sign: those above the half come first

    def table() -> Tensor:
        levels = torch.tensor(numbers.levels[half:] + numbers.levels[:half], dtype=torch.float32)
        room = torch.empty(2 * levels.numel(), dtype=torch.float32, device=device)
        before = -room.data_ptr() % levels.nbytes // levels.itemsize
        return room[before : before + levels.numel()].copy_(levels)

    return made_apart(table)


def _history(history: tuple[tuple[int, ...], ...], bits: int) -> int:
    """What every bit of the codes above adds to a place, 8 bits each, those of the row next above lowest."""
    added = [above[1 << bit] for above in history for bit in range(bits)]
    return sum(mask << 8 * at for at, mask in enumerate(added))


def takes(tokens: int, dtype: torch.dtype) -> bool:
    """Whether ``multiply`` takes so many: of float32, in which matrix units are not exact, those of threads only."""
    return 0 < tokens <= (FEW_TOKENS_OF_LARGE if dtype == torch.float32 else MOST_TOKENS)


def multiply(x: Tensor, packed: Packed, matrix: WordMatrix, bias_N: Tensor | None) -> Tensor:
    r""":math:`y = x S^\top + b` of 1 to ``MOST_TOKENS`` tokens (..., K) side by side; sums are float32."""
    rows, cols = packed.shape
    tokens = x.numel() // cols
    y = x.new_empty(*x.shape[:-1], rows)
    if tokens <= (FEW_TOKENS if rows < LARGE_ROWS else FEW_TOKENS_OF_LARGE):
        _multiply_few(x, packed, matrix, bias_N, y, tokens)
    else:
        _multiply_many(x, packed, matrix, bias_N, y, tokens)
    return y


def _multiply_few(x: Tensor, packed: Packed, matrix: WordMatrix, bias: Tensor | None, y: Tensor, tokens: int) -> None:
    tensors = (x, *_stored(packed, matrix, bias), y)
    key = _key("few", tokens, x, bias)
    if not matrix.again(key, tensors):
        rows, cols = packed.shape
        settings = {"BIASED": bias is not None, "TOKENS": triton.next_power_of_2(tokens), "ROWS": ROWS}
        matrix.first(
            key, _few_kernel, (triton.cdiv(rows, ROWS), 1, 1), tensors,
            (tokens, rows, cols, matrix.pitch, matrix.words.numel()), settings | {"EIGHTS": 32 * WARPS},
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def _multiply_many(x: Tensor, packed: Packed, matrix: WordMatrix, bias: Tensor | None, y: Tensor, tokens: int) -> None:
    rows, cols = packed.shape
    tiles, steps = triton.cdiv(rows, TILE_ROWS), triton.cdiv(matrix.pitch, TILE_EIGHTS)
    splits = max(1, min(MOST_SPLITS, steps, PROGRAMS * _processors(x.device) // tiles))
    split_eights = triton.cdiv(steps, splits) * TILE_EIGHTS
    splits = triton.cdiv(matrix.pitch, split_eights)
    sums = y if splits == 1 else x.new_empty(splits, tokens, rows, dtype=torch.float32)
    tensors = (x, *_stored(packed, matrix, bias), sums)
    key = _key("many", tokens, x, bias)
    if not matrix.again(key, tensors):
        crowded = packed.numbers.memory and tokens > 32  # more numbers than four warps have registers for
        settings = {
            "BIASED": bias is not None, "ALONE": splits == 1, "WIDE": not x.is_cuda,
            "TOKENS": max(16, triton.next_power_of_2(tokens)), "ROWS": TILE_ROWS, "EIGHTS": TILE_EIGHTS,
        }  # fmt: skip  # WIDE is for the interpreter, whose dot product knows no bfloat16
        matrix.first(
            key, _many_kernel, (tiles, splits, 1), tensors,
            (tokens, rows, cols, matrix.pitch, matrix.words.numel(), split_eights), settings,
            num_warps=2 * TILE_WARPS if crowded else TILE_WARPS, num_stages=1,
        )  # fmt: skip
    if splits > 1:
        add_splits(sums, packed.scales_N, bias, y.view(tokens, rows))


def _key(kernel: str, tokens: int, x: Tensor, bias: Tensor | None) -> Hashable:
    """What a program was compiled for; None where something begins at an address of its own."""
    if x.data_ptr() % 16 or (bias is not None and bias.data_ptr() % 16):
        return None
    return kernel, tokens, x.dtype, None if bias is None else bias.dtype


def add_splits(sums_STN: Tensor, scales_N: Tensor | None, bias_N: Tensor | None, y_TN: Tensor) -> None:
    """The sums of all splits, in their order, times the scales of the rows and plus the bias."""
    tokens, rows = y_TN.shape
    _finish_kernel[(triton.cdiv(tokens * rows, 1024),)](
        sums_STN, y_TN if scales_N is None else scales_N, y_TN if bias_N is None else bias_N, y_TN, tokens * rows, rows,
        len(sums_STN), SCALED=scales_N is not None, BIASED=bias_N is not None, BLOCK=1024,
    )  # fmt: skip


def decode(packed: Packed, matrix: WordMatrix, dtype: torch.dtype) -> Tensor:
    """S as a dense (N, K) matrix, in the columns it is stored in; numbers are multiplied by their scales in float32."""
    rows, cols = packed.shape
    dense = torch.empty(rows, cols, dtype=dtype, device=matrix.words.device)
    tensors = (*_stored(packed, matrix, None)[:-1], dense)
    if not matrix.again(("decode", dtype), tensors):
        lanes = 32 * DECODING_WARPS
        matrix.first(
            ("decode", dtype), _written_kernel, (triton.cdiv(rows, DECODED_ROWS), triton.cdiv(matrix.pitch, lanes), 1),
            tensors, (rows, cols, matrix.pitch, matrix.words.numel()), {"ROWS": DECODED_ROWS, "EIGHTS": lanes},
            num_warps=DECODING_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return dense


def _stored(packed: Packed, matrix: WordMatrix, bias_N: Tensor | None) -> tuple[Tensor | None, ...]:
    """Words, scales, group scales, levels and bias; in the place of what there is not, something that is not read."""
    groups, unused = packed.group_scales, matrix.words
    return (
        matrix.words, packed.scales_N, unused if groups is None else groups, matrix.levels,
        unused if bias_N is None else bias_N,
    )  # fmt: skip


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


if triton is not None:

    @triton.jit
    def _shifted(word, after, BY: tl.constexpr) -> Any:
        """The 32 bits from bit BY of a word on, those behind it from the word after."""
        if BY == 0:
            return word
        else:
            return (word >> BY) | (after << (32 - BY))

    @triton.jit
    def _codes(words, eight, mask, count, BITS: tl.constexpr) -> Any:
        """The codes of eight columns, one behind the other from the lowest bit on, in two words."""
        if BITS == 4:
            low = tl.load(words + eight, mask=mask, other=0).to(tl.uint32, bitcast=True)
            high = low
        elif BITS == 8:
            low = tl.load(words + 2 * eight, mask=mask, other=0).to(tl.uint32, bitcast=True)
            high = tl.load(words + (2 * eight + 1), mask=mask, other=0).to(tl.uint32, bitcast=True)
        else:
            at, behind = (eight * BITS) >> 2, ((eight * BITS) & 3).to(tl.uint32) * 8
            low = tl.load(words + at, mask=mask, other=0).to(tl.uint32, bitcast=True)
            high = tl.load(words + (at + 1), mask=mask & (at + 1 < count), other=0).to(tl.uint32, bitcast=True)
            both = ((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> behind
            low = both.to(tl.uint32)
            if BITS == 7:
                last = tl.load(words + (at + 2), mask=mask & (at + 2 < count), other=0).to(tl.uint32, bitcast=True)
                high = (((last.to(tl.uint64) << 32) | high.to(tl.uint64)) >> behind).to(tl.uint32)
            else:
                high = (both >> 32).to(tl.uint32)
        return low, high

    @triton.jit
    def _integer(low, high, AT: tl.constexpr, BITS: tl.constexpr) -> Any:
        """The two's complement number at bit AT as float32.

        The bits become the lower ones of a float whose last of them counts 1, with the highest turned over, which adds
        half of their range; that, and what the exponent stands for, is taken away.
        """
        MASK: tl.constexpr = (1 << BITS) - 1
        SIGN: tl.constexpr = 1 << (BITS - 1)
        HERE: tl.constexpr = AT if AT < 32 else AT - 32  # in its word
        CUT: tl.constexpr = HERE + BITS > 32
        SHIFT: tl.constexpr = HERE if HERE + BITS <= 22 else HERE - 16 if HERE >= 16 and not CUT else 0
        if CUT:
            bits = _shifted(low, high, AT)
        elif AT < 32:
            bits = low >> (HERE - SHIFT)
        else:
            bits = high >> (HERE - SHIFT)
        BASE: tl.constexpr = (150 - SHIFT) << 23
        found = ((bits & (MASK << SHIFT)) ^ ((SIGN << SHIFT) | BASE)).to(tl.float32, bitcast=True)
        return found - (float(1 << (23 - SHIFT)) + SIGN)

    @triton.jit
    def _looked_up(levels, code, AT: tl.constexpr, BITS: tl.constexpr) -> Any:
        """The entry of a table of which BITS bits of ``code``, from AT on, say the place.

        The table does not cross a multiple of its size, so that the higher half of its addresses is one and the same.
        """
        offset = ((code >> AT) << 2) & (((1 << BITS) - 1) << 2)
        return tl.load((levels.to(tl.uint64) | offset.to(tl.uint64)).to(levels.dtype))

    @triton.jit
    def _places(
        words, eight, pitch, row, mask, count, FIRST: tl.constexpr, EVERY: tl.constexpr, BITS: tl.constexpr,
        PLACE_BITS: tl.constexpr, MEMORY: tl.constexpr, HISTORY: tl.constexpr, RUN: tl.constexpr,
    ) -> Any:  # fmt: skip
        """Places of codes in the table, one in every EVERY bits, that of the column FIRST in the lowest."""
        ROOM: tl.constexpr = 8 * BITS // EVERY + (1 if 8 * BITS % EVERY else 0)
        EACH: tl.constexpr = ((1 << (EVERY * ROOM)) - 1) // ((1 << EVERY) - 1)
        found = tl.zeros(mask.shape, dtype=tl.uint32)
        for k in tl.static_range(PLACE_BITS):
            bit = tl.zeros(mask.shape, dtype=tl.uint32)
            for back in tl.static_range(MEMORY + 1):
                codes, _ = _codes(words, eight - back * pitch, mask & (row % RUN >= back), count, BITS)
                for b in tl.static_range(BITS):
                    if back == 0:
                        if b == k:
                            bit ^= codes >> b
                    elif (HISTORY >> (8 * ((back - 1) * BITS + b) + k)) & 1:
                        bit ^= codes >> b
            found |= ((bit >> (BITS * FIRST)) & EACH) << k
        return found

    @triton.jit
    def _number(
        words, levels, eight, pitch, row, mask, count, J: tl.constexpr, BITS: tl.constexpr, PLACE_BITS: tl.constexpr,
        MEMORY: tl.constexpr, HISTORY: tl.constexpr, RUN: tl.constexpr,
    ) -> Any:  # fmt: skip
        """The number of column J of eight as float32, without its scale."""
        AT: tl.constexpr = J * BITS
        if MEMORY > 0:
            EVERY: tl.constexpr = (PLACE_BITS + BITS - 1) // BITS * BITS
            FIRST: tl.constexpr = J % (EVERY // BITS)
            places = _places(
                words, eight, pitch, row, mask, count, FIRST, EVERY, BITS, PLACE_BITS, MEMORY, HISTORY, RUN
            )  # fmt: skip
            found = _looked_up(levels, places, BITS * (J - FIRST), PLACE_BITS)
        else:
            low, high = _codes(words, eight, mask, count, BITS)
            if PLACE_BITS == 0:
                found = _integer(low, high, AT, BITS)
            elif AT >= 32:
                found = _looked_up(levels, high, AT - 32, PLACE_BITS)
            elif AT + BITS > 32:
                found = _looked_up(levels, _shifted(low, high, AT), 0, PLACE_BITS)
            else:
                found = _looked_up(levels, low, AT, PLACE_BITS)
        return found

    @triton.jit
    def _eight(
        words, levels, row, q, pitch, mask, count, BITS: tl.constexpr, PLACE_BITS: tl.constexpr, MEMORY: tl.constexpr,
        HISTORY: tl.constexpr, RUN: tl.constexpr,
    ) -> Any:  # fmt: skip
        """The numbers of eight columns, without their scales, (..., 8)."""
        at = row * pitch + q  # entries are fewer than 2^31
        a = _number(words, levels, at, pitch, row, mask, count, 0, BITS, PLACE_BITS, MEMORY, HISTORY, RUN)
        b = _number(words, levels, at, pitch, row, mask, count, 1, BITS, PLACE_BITS, MEMORY, HISTORY, RUN)
        c = _number(words, levels, at, pitch, row, mask, count, 2, BITS, PLACE_BITS, MEMORY, HISTORY, RUN)
        d = _number(words, levels, at, pitch, row, mask, count, 3, BITS, PLACE_BITS, MEMORY, HISTORY, RUN)
        e = _number(words, levels, at, pitch, row, mask, count, 4, BITS, PLACE_BITS, MEMORY, HISTORY, RUN)
        f = _number(words, levels, at, pitch, row, mask, count, 5, BITS, PLACE_BITS, MEMORY, HISTORY, RUN)
        g = _number(words, levels, at, pitch, row, mask, count, 6, BITS, PLACE_BITS, MEMORY, HISTORY, RUN)
        h = _number(words, levels, at, pitch, row, mask, count, 7, BITS, PLACE_BITS, MEMORY, HISTORY, RUN)
        even = tl.join(tl.join(a, e), tl.join(c, g))  # a join adds the fastest axis: 0 1 of the first, 0 2 of the next
        odd = tl.join(tl.join(b, f), tl.join(d, h))
        return tl.reshape(tl.join(even, odd), even.shape[:-2] + [8])  # noqa: RUF005 - Triton unpacks no lists

    @triton.jit
    def _scale_of(group_scales, row, q, cols, mask, SCALE_GROUP: tl.constexpr) -> Any:
        """Group scales of eights of columns as float32; 1 without."""
        if SCALE_GROUP == 0:
            return tl.full(mask.shape, 1.0, tl.float32)
        else:
            at = row * ((cols + SCALE_GROUP - 1) // SCALE_GROUP) + q * 8 // SCALE_GROUP
            byte = tl.load(group_scales + at, mask=mask, other=0).to(tl.uint32)
            return (byte | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0

    @triton.jit(do_not_specialize=["pitch"])  # reads of several words would tear apart what a thread multiplies
    def _few_kernel(
        x_ptr, words, scales, group_scales, levels, bias, y_ptr, tokens, rows, cols, pitch, count, BITS: tl.constexpr,
        SCALE_GROUP: tl.constexpr, PLACE_BITS: tl.constexpr, MEMORY: tl.constexpr, HISTORY: tl.constexpr,
        RUN: tl.constexpr, BIASED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr,
    ) -> None:  # fmt: skip
        i = tl.arange(0, ROWS * EIGHTS)
        row = tl.program_id(0) * ROWS + i // EIGHTS
        t = tl.arange(0, TOKENS)[:, None, None]
        total = tl.zeros((TOKENS, ROWS, EIGHTS), dtype=tl.float32)
        for q0 in range(0, pitch, EIGHTS):
            q = q0 + i % EIGHTS
            mask = (row < rows) & (q < pitch)
            q_x = (q0 + tl.arange(0, EIGHTS))[None, :, None]
            x_at = x_ptr + t * cols + q_x * 8 + tl.arange(0, 8)[None, None, :]
            x = tl.load(x_at, mask=(t < tokens) & (q_x < pitch), other=0).to(tl.float32)
            numbers = _eight(words, levels, row, q, pitch, mask, count, BITS, PLACE_BITS, MEMORY, HISTORY, RUN)
            part = tl.sum(tl.reshape(numbers, (1, ROWS, EIGHTS, 8)) * x[:, None, :, :], axis=3)
            if SCALE_GROUP > 0:
                scale = _scale_of(group_scales, row, q, cols, mask, SCALE_GROUP)
                part *= tl.reshape(scale, (1, ROWS, EIGHTS))
            total += part
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        y = tl.sum(total, axis=2) * tl.load(scales + n, mask=n < rows, other=0).to(tl.float32)[None, :]
        if BIASED:
            y += tl.load(bias + n, mask=n < rows, other=0).to(tl.float32)[None, :]
        t_y = tl.arange(0, TOKENS)[:, None]
        y_at = y_ptr + t_y * rows + n[None, :]
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=(t_y < tokens) & (n[None, :] < rows))

    @triton.jit(do_not_specialize=["tokens", "pitch"])
    def _many_kernel(
        x_ptr, words, scales, group_scales, levels, bias, y_ptr, tokens, rows, cols, pitch, count, split_eights,
        BITS: tl.constexpr, SCALE_GROUP: tl.constexpr, PLACE_BITS: tl.constexpr, MEMORY: tl.constexpr,
        HISTORY: tl.constexpr, RUN: tl.constexpr, BIASED: tl.constexpr, ALONE: tl.constexpr, WIDE: tl.constexpr,
        TOKENS: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr,
    ) -> None:  # fmt: skip
        i = tl.arange(0, ROWS * EIGHTS)
        row = tl.program_id(0) * ROWS + i // EIGHTS
        split = tl.program_id(1)
        t = tl.arange(0, TOKENS)[None, :]
        total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
        for q0 in range(split * split_eights, min(pitch, (split + 1) * split_eights), EIGHTS):
            q = q0 + i % EIGHTS
            mask = (row < rows) & (q < pitch)
            k = (q0 * 8 + tl.arange(0, EIGHTS * 8))[:, None]
            x = tl.load(x_ptr + t * cols + k, mask=(t < tokens) & (k < cols), other=0)
            numbers = _eight(words, levels, row, q, pitch, mask, count, BITS, PLACE_BITS, MEMORY, HISTORY, RUN)
            numbers *= _scale_of(group_scales, row, q, cols, mask, SCALE_GROUP)[:, None]
            weights = tl.reshape(numbers, (ROWS, EIGHTS * 8)).to(x.dtype)
            if WIDE:
                weights, x = weights.to(tl.float32), x.to(tl.float32)
            total = tl.dot(weights, x, total)
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        if ALONE:
            total *= tl.load(scales + n, mask=n < rows, other=0).to(tl.float32)
            if BIASED:
                total += tl.load(bias + n, mask=n < rows, other=0).to(tl.float32)
        y_at = y_ptr + (split.to(tl.int64) * tokens + t) * rows + n
        tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=(n < rows) & (t < tokens))

    @triton.jit
    def _finish_kernel(
        sums, scales, bias, y_ptr, size, rows, splits, SCALED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr
    ) -> None:
        """Adds the sums of all splits, in their order."""
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        place = sums + at
        for _ in range(splits):
            total += tl.load(place, mask=inside, other=0.0)
            place += size
        if SCALED:
            total *= tl.load(scales + at % rows, mask=inside, other=0.0).to(tl.float32)
        if BIASED:
            total += tl.load(bias + at % rows, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["pitch"])
    def _written_kernel(
        words, scales, group_scales, levels, dense, rows, cols, pitch, count, BITS: tl.constexpr,
        SCALE_GROUP: tl.constexpr, PLACE_BITS: tl.constexpr, MEMORY: tl.constexpr, HISTORY: tl.constexpr,
        RUN: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr,
    ) -> None:  # fmt: skip
        i = tl.arange(0, ROWS * EIGHTS)
        row = tl.program_id(0) * ROWS + i // EIGHTS
        q = tl.program_id(1) * EIGHTS + i % EIGHTS
        mask = (row < rows) & (q < pitch)
        scale = tl.load(scales + row, mask=mask, other=0).to(tl.float32)
        scale *= _scale_of(group_scales, row, q, cols, mask, SCALE_GROUP)
        numbers = _eight(words, levels, row, q, pitch, mask, count, BITS, PLACE_BITS, MEMORY, HISTORY, RUN)
        at = (row * cols + q * 8)[:, None] + tl.arange(0, 8)[None, :]
        tl.store(dense + at, (numbers * scale[:, None]).to(dense.dtype.element_ty), mask=mask[:, None])
