"""Sparse matrices as values plus a packed pattern; exact inverses, no pickle, any device.

A packed matrix has shape (rows, cols) with the *reduction* along the columns, as the weight of a linear layer has:
the factor of an ``up`` layer is stored transposed, (F, R), that of a ``down`` layer as it is, (R, F). The formats:

``dense``    all values, no pattern
``bitmask``  1 bit per entry, row-major, least significant bit first
``N:M``      per group of M consecutive entries the rank of its N-subset in colexicographic order,
             ``ceil(log2(binomial(M, N)))`` bits each, bits packed like a bitmask: 4:16 costs 11 bits per 16 entries
``block4``,  1 bit per block of 4 (8) neighbours along ``block_axis``: 0 joins entries of one column, 1 entries of one
``block8``   row; the bits of all blocks row-major. Hidden neurons lie on axis 0 of ``up`` and on axis 1 of ``down``

Values are the kept entries in row-major order; of block formats the kept blocks in row-major order, the entries of a
block together (for ``block_axis`` 1 this is the row-major order of the entries).

Integers of 2 to 8 bits stand for ``value * scale[row]``, one scale per stored row, symmetric: 4 bits are [-7, 7].
``int8`` values are stored as they are, narrower ones as a stream of two's complement numbers, least significant bit
first: 8 values of b bits fill b bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "BITMASK",
    "BLOCKS",
    "DENSE",
    "BlockAxis",
    "ValueKind",
    "block_size",
    "code_bits",
    "dequantize_rows",
    "largest_integer",
    "pack",
    "pack_integers",
    "packed_length",
    "parse_nm",
    "pattern_bits",
    "pattern_bytes",
    "quantize_rows",
    "row_scales",
    "unpack",
    "unpack_integers",
    "unpack_mask",
    "value_bits",
    "value_kind",
    "values_kept",
]

DENSE, BITMASK = "dense", "bitmask"
BLOCKS = {"block4": 4, "block8": 8}
BlockAxis = Literal[0, 1]
ValueKind = Literal["float", "int8", "int7", "int6", "int5", "int4", "int3", "int2"]
"""How kept entries are stored: in a floating type, or as integers of some bits with one scale per row."""


def parse_nm(fmt: str) -> tuple[int, int] | None:
    """``(N, M)`` of an ``N:M`` format, None for the others; raises ``ValueError`` for an unknown one."""
    if fmt in (DENSE, BITMASK) or fmt in BLOCKS:
        return None
    n, colon, m = fmt.partition(":")
    if not (colon and fmt.isascii() and n.isdigit() and m.isdigit() and len(fmt) < 6 and 0 < int(n) < int(m) <= 32):
        known = ", ".join((DENSE, BITMASK, *BLOCKS))
        raise ValueError(f"unknown packed format {fmt!r}; known: {known}, N:M with 0 < N < M <= 32")
    return int(n), int(m)


def block_size(fmt: str) -> int:
    """Entries under one mask bit; 1 for formats without blocks."""
    return BLOCKS.get(fmt, 1)


def code_bits(n: int, m: int) -> int:
    """Bits of the code of one N:M group."""
    return (math.comb(m, n) - 1).bit_length()


def pattern_bits(*, size: int, fmt: str) -> int:
    """Bits of the packed pattern of a matrix with ``size`` entries."""
    nm = parse_nm(fmt)
    if nm is not None:
        return size // nm[1] * code_bits(*nm)
    return 0 if fmt == DENSE else -(-size // block_size(fmt))


def pattern_bytes(*, size: int, fmt: str) -> int:
    """Bytes of the packed pattern of a matrix with ``size`` entries."""
    return -(-pattern_bits(size=size, fmt=fmt) // 8)


def values_kept(*, size: int, fmt: str) -> int | None:
    """Entries kept of ``size``, where the format says it; None where the pattern does.

    Raises ``ValueError`` if the entries do not fill the groups of an N:M format.
    """
    nm = parse_nm(fmt)
    if nm is None:
        return size if fmt == DENSE else None
    if size % nm[1]:
        raise ValueError(f"{size} entries do not fill the groups of {fmt}")
    return size // nm[1] * nm[0]


def pack(matrix: Tensor, mask: Tensor, *, fmt: str, block_axis: BlockAxis = 1) -> tuple[Tensor, Tensor]:
    """``(values, pattern)`` of a matrix on a support; the pattern is uint8 and empty for ``dense``.

    ``block_axis`` matters to block formats only. Raises ``ValueError`` if the mask does not have the structure the
    format promises.
    """
    nm = parse_nm(fmt)
    if fmt in BLOCKS:
        blocks, kept = _to_blocks(matrix, fmt, block_axis), _to_blocks(mask, fmt, block_axis)
        if not torch.equal(kept.all(2), kept.any(2)):
            raise ValueError(f"the mask splits a block of {BLOCKS[fmt]} neighbours along axis {block_axis}")
        return blocks[kept.all(2)].flatten(), _pack_bits(kept.all(2).flatten())
    if fmt == DENSE and not bool(mask.all()):
        raise ValueError(f"format dense needs a full mask, got {int(mask.sum())} of {mask.numel()} entries")
    if nm is not None:
        groups = mask.reshape(-1, nm[1])
        if not bool((groups.sum(1) == nm[0]).all()):
            raise ValueError(f"the mask does not keep exactly {nm[0]} of every {nm[1]} consecutive entries")
        pattern = _pack_bits(_codes_to_bits(_rank_subsets(groups, *nm), code_bits(*nm)))
    else:
        pattern = _pack_bits(mask.flatten()) if fmt == BITMASK else mask.new_empty(0, dtype=torch.uint8)
    return matrix[mask], pattern


def unpack(values: Tensor, pattern: Tensor, *, shape: tuple[int, int], fmt: str, block_axis: BlockAxis = 1) -> Tensor:
    """The dense matrix; differentiable in ``values``. Exact inverse of ``pack``."""
    if fmt == DENSE:
        return values.view(shape)
    if fmt in BLOCKS:
        mask = _unpack_blocks(pattern, shape, fmt, block_axis)
        blocks = values.new_zeros(*mask.shape, BLOCKS[fmt]).masked_scatter(mask.unsqueeze(2), values)
        return _from_blocks(blocks, shape, block_axis)
    dense = values.new_zeros(shape)
    return dense.masked_scatter(unpack_mask(pattern, shape=shape, fmt=fmt), values)


def unpack_mask(pattern: Tensor, *, shape: tuple[int, int], fmt: str, block_axis: BlockAxis = 1) -> Tensor:
    """The boolean support of a packed matrix."""
    nm = parse_nm(fmt)
    size = shape[0] * shape[1]
    if fmt in BLOCKS:
        mask = _unpack_blocks(pattern, shape, fmt, block_axis)
        return _from_blocks(mask.unsqueeze(2).expand(*mask.shape, BLOCKS[fmt]), shape, block_axis)
    if nm is None:
        if fmt == DENSE:
            return torch.ones(shape, dtype=torch.bool, device=pattern.device)
        return _unpack_bits(pattern, size).view(shape)
    groups = size // nm[1]
    bits = _unpack_bits(pattern, groups * code_bits(*nm)).view(groups, -1)
    return _unrank_subsets(_bits_to_codes(bits), *nm).view(shape)


def value_bits(kind: ValueKind) -> int | None:
    """Bits of one stored value; None for floating ones, whose type says it."""
    return None if kind == "float" else int(kind.removeprefix("int"))


def value_kind(bits: int | None) -> ValueKind:
    """The kind with as many bits. Raises ``KeyError`` for other numbers than 2 to 8."""
    kinds: dict[int | None, ValueKind] = {value_bits(kind): kind for kind in get_args(ValueKind)}
    return kinds[bits]


def largest_integer(bits: int) -> int:
    """Of a symmetric grid: 7 for 4 bits."""
    return (1 << (bits - 1)) - 1


def row_scales(matrix: Tensor, mask: Tensor, *, bits: int = 8) -> Tensor:
    """Scale per row that maps its largest kept magnitude to the largest integer; 0 for a row that keeps nothing."""
    return (matrix * mask).abs().amax(1) / largest_integer(bits)


def quantize_rows(matrix: Tensor, scales: Tensor, *, bits: int = 8) -> Tensor:
    """Nearest multiples of one scale per row as int8, clipped to the integers of ``bits``; rows of scale 0 become 0."""
    limit = largest_integer(bits)
    scales_1 = scales.to(matrix.dtype).unsqueeze(1)
    multiples = torch.where(scales_1 == 0, torch.zeros_like(matrix), matrix / scales_1)
    return multiples.round().clamp(-limit, limit).to(torch.int8)


def dequantize_rows(quantized: Tensor, scales: Tensor) -> Tensor:
    """``quantized[i, j] * scales[i]`` in float32, or in the type of the scales if that is wider."""
    wide = scales.to(torch.promote_types(scales.dtype, torch.float32))
    return quantized.to(wide.dtype) * wide.unsqueeze(1)


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
    bytes_ = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits).long()
    words = (bytes_ << 8 * torch.arange(bits, device=packed.device)).sum(1, keepdim=True)
    fields = words >> bits * torch.arange(8, device=packed.device) & ((1 << bits) - 1)
    sign = 1 << (bits - 1)
    return ((fields ^ sign) - sign).to(torch.int8).flatten()[:count]


def _to_blocks(matrix: Tensor, fmt: str, block_axis: BlockAxis) -> Tensor:
    """(rows, cols) as (block rows, block cols, entries of a block)."""
    rows, cols = matrix.shape
    size = BLOCKS[fmt]
    if matrix.shape[block_axis] % size:
        raise ValueError(f"format {fmt} needs a multiple of {size} along axis {block_axis}, got {(rows, cols)}")
    return matrix.view(rows // size, size, cols).transpose(1, 2) if block_axis == 0 else matrix.view(rows, -1, size)


def _from_blocks(blocks: Tensor, shape: tuple[int, int], block_axis: BlockAxis) -> Tensor:
    return (blocks.transpose(1, 2) if block_axis == 0 else blocks).reshape(shape)


def _unpack_blocks(pattern: Tensor, shape: tuple[int, int], fmt: str, block_axis: BlockAxis) -> Tensor:
    """One boolean per block, (block rows, block cols)."""
    rows, cols = shape
    size = BLOCKS[fmt]
    grid = (rows // size, cols) if block_axis == 0 else (rows, cols // size)
    return _unpack_bits(pattern, grid[0] * grid[1]).view(grid)


def _pack_bits(bits: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` bits as booleans: each byte looked up as 8 of them."""
    bytes_ = torch.arange(256, device=packed.device)
    bits = (bytes_.unsqueeze(1) >> torch.arange(8, device=packed.device) & 1).to(torch.uint8)
    eights = bits.view(torch.int64).squeeze(1)  # 8 bytes of 0 or 1 in one word, in memory order
    return eights.index_select(0, packed.int()).view(torch.bool)[:count]


def _codes_to_bits(codes: Tensor, width: int) -> Tensor:
    shifts = torch.arange(width, device=codes.device)
    return (codes.unsqueeze(1) >> shifts & 1).flatten().bool()


def _bits_to_codes(bits: Tensor) -> Tensor:
    shifts = torch.arange(bits.shape[1], device=bits.device)
    return (bits.long() << shifts).sum(1)


def _binomials(m: int, k: int, device: torch.device) -> Tensor:
    choose: Callable[[int, int], int] = math.comb
    return torch.tensor([choose(position, k) for position in range(m)], device=device)


def _rank_subsets(groups: Tensor, n: int, m: int) -> Tensor:
    """Colexicographic rank of the N-subset in each row: the sum of binomial(position_k, k) over its k-th members."""
    positions = groups.nonzero()[:, 1].view(-1, n)
    ranks = positions.new_zeros(positions.shape[0])
    for k in range(1, n + 1):
        ranks += _binomials(m, k, groups.device)[positions[:, k - 1]]
    return ranks


def _unrank_subsets(ranks: Tensor, n: int, m: int) -> Tensor:
    mask = torch.zeros(ranks.shape[0], m, dtype=torch.bool, device=ranks.device)
    rest = ranks.clone()
    for k in range(n, 0, -1):
        binomials = _binomials(m, k, ranks.device)
        position = torch.searchsorted(binomials, rest, right=True) - 1
        mask.scatter_(1, position.unsqueeze(1), True)
        rest -= binomials[position]
    return mask
