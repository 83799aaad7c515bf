r"""Coordinates in which rows look normal: blocks of neighbouring columns turned by a Walsh-Hadamard matrix.

:math:`H_b`, symmetric and its own inverse, has entries :math:`\pm 1 / \sqrt b`. A matrix whose columns are turned,
:math:`S' = S (I \otimes H_b)`, times inputs that are turned alike is S times the inputs. Every new entry is a sum of b
old ones: single large weights are spread over their block, so that a grid of few bits serves all. It costs no bytes and
b additions in :math:`\log_2 b` steps for every b inputs.

References: Tseng et al., arXiv 2402.04396; Ashkboos et al., arXiv 2404.00456, who turn whole rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fips.formats.constants import kept

__all__ = ["ROTATIONS", "rotate", "rotate_moment", "rotation_fits", "widest_rotation"]

ROTATIONS = (1, 4, 16, 64)
"""Columns of a block; 1 turns nothing. Square roots of the others are powers of 2: entries are exact in every type."""


def rotation_fits(columns: int, block: int) -> bool:
    """Whether blocks are of a width that there is, and fill so many columns."""
    return block in ROTATIONS and columns % block == 0


def widest_rotation(columns: int) -> int:
    """The widest block that fills so many columns."""
    return max(block for block in ROTATIONS if rotation_fits(columns, block))


_matrices: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def _hadamard(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return kept(_matrices, (block, dtype, device), lambda: _matrix(block).to(device=device, dtype=dtype))


def _matrix(block: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    unit: Tensor = matrix / block**0.5
    return unit


def rotate(numbers: Tensor, block: int, dim: int = -1) -> Tensor:
    """Blocks of neighbouring entries along ``dim`` turned; twice is as before, up to rounding.

    The number of entries along ``dim`` must be a multiple of ``block``.
    """
    if block == 1:
        return numbers
    matrix = _hadamard(block, numbers.dtype, numbers.device)
    if dim == -1:
        turned: Tensor = numbers.reshape(-1, block) @ matrix
        return turned.view(numbers.shape)
    return rotate(numbers.movedim(dim, -1), block).movedim(-1, dim)


def rotate_moment(moment_KK: Tensor, block: int) -> Tensor:
    """A second moment, or its diagonal (K,), of inputs that are turned; one tensor more than the moment at any time.

    Of a diagonal it is the diagonal: the mean of every block.
    """
    if block == 1:
        return moment_KK
    if moment_KK.dim() == 1:
        means = moment_KK.view(-1, block).mean(1, keepdim=True)
        return means.expand(-1, block).flatten()
    turned, matrix = rotate(moment_KK, block), _hadamard(block, moment_KK.dtype, moment_KK.device)
    for rows in turned.split(block):
        rows.copy_(matrix @ rows)
    return turned
