"""Sparse matrices as values plus a packed pattern; exact inverses, no pickle, any device.

A packed matrix has shape (rows, cols) with the *reduction* along the columns, as the weight of a linear layer has:
the factor of an ``up`` layer is stored transposed, (F, R), that of a ``down`` layer as it is, (R, F). Three formats:

``dense``    all values, no pattern
``bitmask``  1 bit per entry, row-major, least significant bit first
``N:M``      per group of M consecutive entries the rank of its N-subset in colexicographic order,
             ``ceil(log2(binomial(M, N)))`` bits each, bits packed like a bitmask: 4:16 costs 11 bits per 16 entries

Values are the kept entries in row-major order in all formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["code_bits", "pack", "parse_nm", "pattern_bytes", "unpack", "unpack_mask"]

DENSE, BITMASK = "dense", "bitmask"


def parse_nm(fmt: str) -> tuple[int, int] | None:
    """``(N, M)`` of an ``N:M`` format, None for the other two; raises ``ValueError`` for an unknown one."""
    if fmt in (DENSE, BITMASK):
        return None
    n, colon, m = fmt.partition(":")
    if not (colon and n.isdigit() and m.isdigit() and 0 < int(n) < int(m) <= 32):
        raise ValueError(f"unknown packed format {fmt!r}; known: dense, bitmask, N:M with 0 < N < M <= 32")
    return int(n), int(m)


def code_bits(n: int, m: int) -> int:
    """Bits of the code of one N:M group."""
    return (math.comb(m, n) - 1).bit_length()


def pattern_bytes(*, size: int, fmt: str) -> int:
    """Bytes of the packed pattern of a matrix with ``size`` entries."""
    nm = parse_nm(fmt)
    if nm is not None:
        return -(-(size // nm[1] * code_bits(*nm)) // 8)
    return 0 if fmt == DENSE else -(-size // 8)


def pack(matrix: Tensor, mask: Tensor, *, fmt: str) -> tuple[Tensor, Tensor]:
    """``(values, pattern)`` of a matrix on a support; the pattern is uint8 and empty for ``dense``.

    Raises ``ValueError`` if the mask does not have the structure the format promises.
    """
    nm = parse_nm(fmt)
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


def unpack(values: Tensor, pattern: Tensor, *, shape: tuple[int, int], fmt: str) -> Tensor:
    """The dense matrix; differentiable in ``values``. Exact inverse of ``pack``."""
    if fmt == DENSE:
        return values.view(shape)
    dense = values.new_zeros(shape)
    return dense.masked_scatter(unpack_mask(pattern, shape=shape, fmt=fmt), values)


def unpack_mask(pattern: Tensor, *, shape: tuple[int, int], fmt: str) -> Tensor:
    """The boolean support of a packed matrix."""
    nm = parse_nm(fmt)
    size = shape[0] * shape[1]
    if nm is None:
        if fmt == DENSE:
            return torch.ones(shape, dtype=torch.bool, device=pattern.device)
        return _unpack_bits(pattern, size).view(shape)
    groups = size // nm[1]
    bits = _unpack_bits(pattern, groups * code_bits(*nm)).view(groups, -1)
    return _unrank_subsets(_bits_to_codes(bits), *nm).view(shape)


def _pack_bits(bits: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor, count: int) -> Tensor:
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1).bitwise_and(weights) != 0).flatten()[:count]


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
