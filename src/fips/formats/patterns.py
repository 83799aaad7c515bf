"""Patterns of kept entries: how many bits say which they are, how they are chosen, packed and unpacked.

A packed matrix has shape (rows, cols) with the *reduction* along the columns, as the weight of a linear layer has:
the factor of an ``up`` layer is stored transposed, (F, R), that of a ``down`` layer as it is, (R, F). The patterns:

``full``     all values, no pattern
``bitmask``  1 bit per entry, row-major, least significant bit first
``N:M``      per group of M consecutive entries the rank of its N-subset in colexicographic order,
             ``ceil(log2(binomial(M, N)))`` bits each, bits packed like a bitmask: 4:16 costs 11 bits per 16 entries
``block4``,  1 bit per block of 4 (8) neighbours along ``block_axis``: 0 joins entries of one column, 1 entries of one
``block8``   row; the bits of all blocks row-major. Hidden neurons lie on axis 0 of ``up`` and on axis 1 of ``down``

Values are the kept entries in row-major order; of block patterns the kept blocks in row-major order, the entries of a
block together (for ``block_axis`` 1 this is the row-major order of the entries).

A further pattern is a subclass of ``Pattern`` with ``PATTERNS.register`` above it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from fips.errors import ConfigError
from fips.formats.masks import block_masks, nm_mask, top_masks
from fips.formats.registry import Registry

__all__ = ["BITMASK", "FULL", "PATTERNS", "BlockAxis", "Pattern", "pattern_for", "pattern_in_file", "pattern_named"]

FULL, BITMASK = "full", "bitmask"
FILE_NAMES = {FULL: "dense"}
"""Words of files of layout version 1 that are not the name of the pattern."""
BlockAxis = Literal[0, 1]


class Pattern:
    """Where entries are kept. Every ``group`` entries cost ``group_bits`` bits and keep ``group_kept`` of them.

    This class is a pattern of free size that stores a mask of bits; subclasses say what differs.
    """

    known: ClassVar[tuple[str, ...]] = ()
    """Names of the class."""
    group: int = 1
    """Entries under one code of the pattern."""
    group_bits: int = 1
    """Bits of one code."""
    group_kept: int | None = None
    """Kept entries of every group, where the pattern fixes them and with them the size; else None."""
    block: int = 1
    """Neighbouring hidden neurons that are kept or removed together, and reordered for it."""
    choosable: bool = True
    """Whether settings may ask for it by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The pattern of this name, None where it belongs to another class."""
        return cls(name) if name in cls.known else None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def file_name(self) -> str:
        """What files of layout version 1 call it."""
        return FILE_NAMES.get(self.name, self.name)

    @property
    def density(self) -> float | None:
        """Share of entries kept, where the pattern fixes it."""
        return None if self.group_kept is None else self.group_kept / self.group

    @property
    def align(self) -> int:
        """What the length summed along must be a multiple of."""
        return 1 if self.group_kept is None else self.group

    def code(self, block_axis: BlockAxis) -> int | None:
        """Its number in ``kernels/csrc/formats.h``; None for a pattern without a compiled reader."""
        return None

    def bits(self, size: int) -> int:
        """Bits of the packed pattern of a matrix with ``size`` entries."""
        return -(-size // self.group) * self.group_bits

    def nbytes(self, size: int) -> int:
        """Bytes of the packed pattern of a matrix with ``size`` entries."""
        return -(-self.bits(size) // 8)

    def kept(self, size: int) -> int | None:
        """Entries kept of ``size``, where the pattern fixes them; None where its bits say it.

        Raises ``ValueError`` if the entries do not fill its groups.
        """
        if self.group_kept is None:
            return None
        if size % self.group:
            raise ValueError(f"{size} entries do not fill the groups of {self.name}")
        return size // self.group * self.group_kept

    def choose(self, scores_RF: Sequence[Tensor], count: int) -> list[Tensor]:
        """Masks of the ``count`` entries with the largest scores over all tensors; for patterns of free size."""
        return top_masks(scores_RF, count=count)

    def choose_fixed(self, score_RF: Tensor, *, axis: int, density: float = 0.0) -> Tensor:
        """The mask of the largest scores, or of a share of them if that is more than the pattern keeps.

        For patterns that fix their size; ``axis`` is the one the layer sums along.
        """
        raise NotImplementedError

    def pack(self, matrix: Tensor, mask: Tensor, block_axis: BlockAxis = 1) -> tuple[Tensor, Tensor]:
        """``(values, pattern)`` of a matrix on a support; the pattern is uint8, and empty if it costs no bits.

        ``block_axis`` matters to blocks only. Raises ``ValueError`` if the mask does not have the structure of the
        pattern.
        """
        return matrix[mask], _pack_bits(mask.flatten())

    def unpack(self, values: Tensor, pattern: Tensor, shape: tuple[int, int], block_axis: BlockAxis = 1) -> Tensor:
        """The dense matrix; differentiable in ``values``. Exact inverse of ``pack``."""
        mask = self.unpack_mask(pattern, shape, block_axis)
        return values.new_zeros(shape).masked_scatter(mask, values)

    def unpack_mask(self, pattern: Tensor, shape: tuple[int, int], block_axis: BlockAxis = 1) -> Tensor:
        """The boolean support of a packed matrix."""
        return _unpack_bits(pattern, shape[0] * shape[1]).view(shape)

    def count(self, pattern: Tensor, shape: tuple[int, int], block_axis: BlockAxis = 1) -> int:
        """Entries that a packed pattern keeps."""
        return int(self.unpack_mask(pattern, shape, block_axis).count_nonzero())

    def gather(self, matrix: Tensor, pattern: Tensor, block_axis: BlockAxis = 1) -> Tensor:
        """Entries of a dense matrix on the support, in stored order."""
        rows, cols = matrix.shape
        return matrix[self.unpack_mask(pattern, (rows, cols), block_axis)]


PATTERNS: Registry[Pattern] = Registry("packed format")


def pattern_named(name: str) -> Pattern:
    """The pattern of this name. Raises ``ConfigError`` for an unknown one."""
    return PATTERNS.named(name)


def pattern_in_file(word: str) -> Pattern:
    """The pattern that files of layout version 1 call so. Raises ``ConfigError`` for a word they do not have."""
    names = {FILE_NAMES.get(name, name): name for name in PATTERNS.known()}
    found = None if word in FILE_NAMES else PATTERNS.find(names.get(word, word))
    if found is None:
        raise PATTERNS.unknown(word, list(names))
    return found


def pattern_for(setting: str) -> Pattern:
    """The pattern that a setting asks for: ``unstructured`` is any entries, under a bitmask. Raises ``ConfigError``."""
    if setting == "unstructured":
        return PATTERNS.named(BITMASK)
    found = PATTERNS.find(setting)
    if found is None:
        choices = [name for cls in PATTERNS.classes if cls.choosable for name in cls.known if name != BITMASK]
        raise PATTERNS.unknown(setting, ["unstructured", *choices])
    if not found.choosable:
        raise ConfigError(f"{setting!r} is a way to store entries, not to choose them; ask for 'unstructured'")
    return found


@PATTERNS.register
class _Full(Pattern):
    known = (FULL,)
    group_bits, group_kept, choosable = 0, 1, False

    def code(self, block_axis: BlockAxis) -> int:
        return 0

    def pack(self, matrix: Tensor, mask: Tensor, block_axis: BlockAxis = 1) -> tuple[Tensor, Tensor]:
        if not bool(mask.all()):
            raise ValueError(f"format {self.name} needs a full mask, got {int(mask.sum())} of {mask.numel()} entries")
        return matrix[mask], mask.new_empty(0, dtype=torch.uint8)

    def unpack(self, values: Tensor, pattern: Tensor, shape: tuple[int, int], block_axis: BlockAxis = 1) -> Tensor:
        return values.view(shape)

    def unpack_mask(self, pattern: Tensor, shape: tuple[int, int], block_axis: BlockAxis = 1) -> Tensor:
        return torch.ones(shape, dtype=torch.bool, device=pattern.device)

    def count(self, pattern: Tensor, shape: tuple[int, int], block_axis: BlockAxis = 1) -> int:
        return shape[0] * shape[1]

    def gather(self, matrix: Tensor, pattern: Tensor, block_axis: BlockAxis = 1) -> Tensor:
        return matrix.flatten()


@PATTERNS.register
class _Bitmask(Pattern):
    known = (BITMASK,)
    choosable = False

    def code(self, block_axis: BlockAxis) -> int:
        return 1


@PATTERNS.register
class _Blocks(Pattern):
    known = ("block4", "block8")

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.group = self.block = int(name.removeprefix("block"))

    def code(self, block_axis: BlockAxis) -> int:
        return 3 if block_axis == 0 else 4

    def choose(self, scores_RF: Sequence[Tensor], count: int) -> list[Tensor]:
        return block_masks(scores_RF, count=count, size=self.block)

    def pack(self, matrix: Tensor, mask: Tensor, block_axis: BlockAxis = 1) -> tuple[Tensor, Tensor]:
        blocks, mask = self._to_blocks(matrix, block_axis), self._to_blocks(mask, block_axis)
        if not torch.equal(mask.all(2), mask.any(2)):
            raise ValueError(f"the mask splits a block of {self.block} neighbours along axis {block_axis}")
        return blocks[mask.all(2)].flatten(), _pack_bits(mask.all(2).flatten())

    def unpack(self, values: Tensor, pattern: Tensor, shape: tuple[int, int], block_axis: BlockAxis = 1) -> Tensor:
        mask = self._kept_blocks(pattern, shape, block_axis)
        blocks = values.new_zeros(*mask.shape, self.block).masked_scatter(mask.unsqueeze(2), values)
        return _from_blocks(blocks, shape, block_axis)

    def unpack_mask(self, pattern: Tensor, shape: tuple[int, int], block_axis: BlockAxis = 1) -> Tensor:
        mask = self._kept_blocks(pattern, shape, block_axis)
        return _from_blocks(mask.unsqueeze(2).expand(*mask.shape, self.block), shape, block_axis)

    def gather(self, matrix: Tensor, pattern: Tensor, block_axis: BlockAxis = 1) -> Tensor:
        rows, cols = matrix.shape
        return self._to_blocks(matrix, block_axis)[self._kept_blocks(pattern, (rows, cols), block_axis)].flatten()

    def _to_blocks(self, matrix: Tensor, block_axis: BlockAxis) -> Tensor:
        """(rows, cols) as (block rows, block cols, entries of a block)."""
        rows, cols = matrix.shape
        size = self.block
        if matrix.shape[block_axis] % size:
            raise ValueError(f"format {self.name} needs a multiple of {size} along axis {block_axis}, got {rows, cols}")
        return matrix.view(rows // size, size, cols).transpose(1, 2) if block_axis == 0 else matrix.view(rows, -1, size)

    def _kept_blocks(self, pattern: Tensor, shape: tuple[int, int], block_axis: BlockAxis) -> Tensor:
        """One boolean per block, (block rows, block cols)."""
        rows, cols = shape
        grid = (rows // self.block, cols) if block_axis == 0 else (rows, cols // self.block)
        return _unpack_bits(pattern, grid[0] * grid[1]).view(grid)


@PATTERNS.register
class _NM(Pattern):
    known = ("N:M with 0 < N < M <= 32",)
    group_kept: int

    def __init__(self, name: str, n: int, m: int) -> None:
        super().__init__(name)
        self.group_kept, self.group = n, m
        self.group_bits = (math.comb(m, n) - 1).bit_length()

    @classmethod
    def parse(cls, name: str) -> Self | None:
        n, colon, m = name.partition(":")
        if not (colon and name.isascii() and n.isdigit() and m.isdigit() and len(name) < 6):
            return None
        return cls(name, int(n), int(m)) if 0 < int(n) < int(m) <= 32 else None

    def code(self, block_axis: BlockAxis) -> int:
        return 2

    def bits(self, size: int) -> int:
        return size // self.group * self.group_bits

    def choose_fixed(self, score_RF: Tensor, *, axis: int, density: float = 0.0) -> Tensor:
        kept = max(self.group_kept, round(density * self.group))
        return nm_mask(score_RF, n=kept, m=self.group, dim=axis)

    def pack(self, matrix: Tensor, mask: Tensor, block_axis: BlockAxis = 1) -> tuple[Tensor, Tensor]:
        n, m = self.group_kept, self.group
        groups = mask.reshape(-1, m)
        if not bool((groups.sum(1) == n).all()):
            raise ValueError(f"the mask does not keep exactly {n} of every {m} consecutive entries")
        return matrix[mask], _pack_bits(_codes_to_bits(_rank_subsets(groups, n, m), self.group_bits))

    def unpack_mask(self, pattern: Tensor, shape: tuple[int, int], block_axis: BlockAxis = 1) -> Tensor:
        groups = shape[0] * shape[1] // self.group
        bits = _unpack_bits(pattern, groups * self.group_bits).view(groups, -1)
        return _unrank_subsets(_bits_to_codes(bits), self.group_kept, self.group).view(shape)


def _from_blocks(blocks: Tensor, shape: tuple[int, int], block_axis: BlockAxis) -> Tensor:
    return (blocks.transpose(1, 2) if block_axis == 0 else blocks).reshape(shape)


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
