"""The packed product in Triton: tiles of S are decoded in registers and multiplied at once, S is never stored.

One kernel serves all formats: the bits of a tile come from the mask, or from a table of N:M codes; their running sum
along the row is the place of every kept entry among the values. Integers of less than 8 bits are cut out of the bytes
they lie in. Triton is optional (``pip install fips[gpu]``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fips.errors import BackendError
from fips.kernels.reference import Packed
from fips.storage.packing import BITMASK, BLOCKS, DENSE, code_bits, parse_nm, unpack_mask

try:
    import triton
    import triton.language as tl
except ImportError as error:  # the reason is told when the kernel is asked for
    triton = None
    _missing = str(error)

__all__ = ["Prepared", "available", "multiply", "prepare", "supports"]

_FORMATS = {DENSE: 0, BITMASK: 1}
_NM, _BLOCK_ROWS, _BLOCK_COLS = 2, 3, 4


class Prepared:
    """A packed matrix with the index of every row's first value and, for N:M, the table of its codes."""

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self.key = _key(packed)
        rows, cols = packed.shape
        device = packed.values_Z.device
        nm = parse_nm(packed.fmt)
        self.format, self.unit, self.bits = _FORMATS.get(packed.fmt, 0), 1, 1
        self.table = torch.zeros(1, dtype=torch.int32, device=device)
        if nm is not None:
            self.format, self.unit, self.bits = _NM, nm[1], code_bits(*nm)
            self.table = _code_table(*nm).to(device)
            counts = torch.full((rows,), cols // nm[1] * nm[0], device=device)
        elif packed.fmt == DENSE:
            counts = torch.full((rows,), cols, device=device)
        else:
            mask = unpack_mask(packed.pattern, shape=packed.shape, fmt=packed.fmt, block_axis=packed.block_axis)
            counts = mask.sum(1)
            if packed.fmt in BLOCKS:
                self.format = _BLOCK_ROWS if packed.block_axis == 0 else _BLOCK_COLS
                self.unit = BLOCKS[packed.fmt]
        self.row_start = (counts.cumsum(0) - counts).to(torch.int32)
        if self.format == _BLOCK_ROWS:  # the rows of a block take turns in its values
            turn = torch.arange(rows, device=device, dtype=torch.int32) % self.unit
            self.row_start = self.row_start[:: self.unit].repeat_interleave(self.unit) + turn

    @property
    def extra_bytes(self) -> int:
        """Memory beyond the stored tensors."""
        return 4 * (self.row_start.numel() + self.table.numel())

    def is_current(self, packed: Packed) -> bool:
        """Whether ``packed`` still lies where this was prepared for, with the same pattern."""
        return self.key == _key(packed)


def _key(packed: Packed) -> tuple[int, ...]:
    pattern = packed.pattern
    return packed.values_Z.data_ptr(), pattern.data_ptr(), 0 if pattern.is_inference() else pattern._version


def available() -> bool:
    """Whether Triton is installed."""
    return triton is not None


def supports(packed: Packed, x_dtype: torch.dtype) -> bool:
    """Whether the kernel can multiply by this matrix on a GPU."""
    nm = parse_nm(packed.fmt)
    return (
        available()
        and packed.values_Z.device.type == "cuda"
        and x_dtype in (torch.float32, torch.bfloat16, torch.float16)
        and packed.kept < 2**31
        and (nm is None or (nm[1] in (2, 4, 8, 16) and packed.shape[1] % nm[1] == 0))
    )


def prepare(packed: Packed) -> Prepared:
    """What ``multiply`` needs, once per matrix. Raises ``BackendError`` without Triton."""
    if triton is None:
        raise BackendError(f"Triton is not installed ({_missing}); `pip install fips[gpu]`")
    return Prepared(packed)


def multiply(x_TK: Tensor, prepared: Prepared, bias_N: Tensor | None = None) -> Tensor:
    r""":math:`y = x S^\top + b` in the type of ``x``; sums in float32; no autograd."""
    packed = prepared.packed
    rows, cols = packed.shape
    x = x_TK.reshape(-1, cols)
    y = x.new_empty(x.shape[0], rows)
    if y.numel() == 0:
        return y.view(*x_TK.shape[:-1], rows)
    block_t = min(64, max(16, triton.next_power_of_2(x.shape[0])))
    block_n, block_k = 64, 64  # WIDE is for the interpreter, whose dot product knows no bfloat16
    grid = (triton.cdiv(rows, block_n), triton.cdiv(x.shape[0], block_t))
    empty = prepared.table
    _multiply_kernel[grid](
        x, packed.values_Z, packed.pattern if packed.pattern.numel() else empty, prepared.row_start, prepared.table,
        empty if packed.scales_N is None else packed.scales_N, empty if bias_N is None else bias_N, y,
        x.shape[0], rows, cols, x.stride(0), x.stride(1), packed.pattern.numel(), packed.values_Z.numel(),
        VALUE_BITS=packed.bits if packed.count else 0, FORMAT=prepared.format, UNIT=prepared.unit, BITS=prepared.bits,
        SCALED=packed.scales_N is not None, BIASED=bias_N is not None, WIDE=not x.is_cuda, BLOCK_T=block_t,
        BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
    return y.view(*x_TK.shape[:-1], rows)


def _code_table(n: int, m: int) -> Tensor:
    """The M-bit mask of every code of an N:M format, in code order."""
    masks = sorted(mask for mask in range(1 << m) if mask.bit_count() == n)  # colexicographic order of the subsets
    assert len(masks) == math.comb(m, n)
    return torch.tensor(masks, dtype=torch.int32)


if triton is not None:

    @triton.jit
    def _kept_bits(
        pattern, table, row, k, rows, cols: tl.constexpr, pattern_bytes,
        FORMAT: tl.constexpr, UNIT: tl.constexpr, BITS: tl.constexpr,
    ) -> Any:  # fmt: skip
        """1 where an entry of the tile is kept, from the packed pattern."""
        inside = (row < rows) & (k < cols)
        if FORMAT == 0:
            return inside.to(tl.int32)
        if FORMAT == 2:
            bit = ((row * cols + k) // UNIT).to(tl.int64) * BITS
            byte = bit // 8
            word = tl.load(pattern + byte, mask=inside, other=0).to(tl.int32)
            word |= tl.load(pattern + byte + 1, mask=inside & (byte + 1 < pattern_bytes), other=0).to(tl.int32) << 8
            word |= tl.load(pattern + byte + 2, mask=inside & (byte + 2 < pattern_bytes), other=0).to(tl.int32) << 16
            code = (word >> (bit % 8).to(tl.int32)) & ((1 << BITS) - 1)
            return (tl.load(table + code, mask=inside, other=0) >> (k % UNIT)) & inside.to(tl.int32)
        if FORMAT == 3:
            place = (row // UNIT).to(tl.int64) * cols + k
        elif FORMAT == 4:
            place = row.to(tl.int64) * (cols // UNIT) + k // UNIT
        else:
            place = row.to(tl.int64) * cols + k
        bits = tl.load(pattern + place // 8, mask=inside, other=0).to(tl.int32)
        return (bits >> (place % 8).to(tl.int32)) & inside.to(tl.int32)

    @triton.jit
    def _narrow(values, place, mask, value_bytes, BITS: tl.constexpr) -> Any:
        """Integers of BITS bits at their places in a stream of bytes."""
        bit = place.to(tl.int64) * BITS
        byte = bit // 8
        word = tl.load(values + byte, mask=mask, other=0).to(tl.int32)
        word |= tl.load(values + byte + 1, mask=mask & (byte + 1 < value_bytes), other=0).to(tl.int32) << 8
        field = (word >> (bit % 8).to(tl.int32)) & ((1 << BITS) - 1)
        return (field ^ (1 << (BITS - 1))) - (1 << (BITS - 1))

    @triton.jit
    def _multiply_kernel(
        x_ptr, values, pattern, row_start, table, scales, bias, y_ptr, tokens, rows, cols: tl.constexpr, stride_t,
        stride_k, pattern_bytes, value_bytes, VALUE_BITS: tl.constexpr, FORMAT: tl.constexpr, UNIT: tl.constexpr,
        BITS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ) -> None:  # fmt: skip
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
        first = tl.load(row_start + n, mask=n < rows, other=0)
        stride = UNIT if FORMAT == 3 else 1
        total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        for k0 in range(0, cols, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            kept = _kept_bits(pattern, table, n[:, None], k[None, :], rows, cols, pattern_bytes, FORMAT, UNIT, BITS)
            place = first[:, None] + (tl.cumsum(kept, axis=1) - kept) * stride
            first += tl.sum(kept, axis=1) * stride
            x_at = x_ptr + t[:, None].to(tl.int64) * stride_t + k[None, :] * stride_k
            x = tl.load(x_at, mask=(t[:, None] < tokens) & (k[None, :] < cols), other=0.0)
            if VALUE_BITS:
                stored = _narrow(values, place, kept != 0, value_bytes, VALUE_BITS) * kept
            else:
                stored = tl.load(values + place, mask=kept != 0, other=0)
            weights = stored.to(tl.float32).to(x.dtype)
            if WIDE:
                x, weights = x.to(tl.float32), weights.to(tl.float32)
            total += tl.dot(x, tl.trans(weights), input_precision="ieee")
        if SCALED:
            total *= tl.load(scales + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
        if BIASED:
            total += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
        y_at = y_ptr + t[:, None].to(tl.int64) * rows + n[None, :]
        tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=(t[:, None] < tokens) & (n[None, :] < rows))
