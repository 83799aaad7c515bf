"""Rounding of columns to grids of stored values (``fips.solve.feedback``), one grid or several side by side.

Shape legend: N stored rows, K stored columns, J columns of a run, G groups of columns.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fips.formats.values import Values
from fips.solve.coded import relative, rounded
from fips.solve.feedback import Rounding
from fips.solve.rounding import best_steps, grid_steps, in_steps, inverse_of

__all__ = ["GridRounding", "Stored", "grid_for", "side_by_side"]

ROOM, MORE_ROOM = 1.1, 1.3
"""The largest group step that can be stored, relative to the largest that the matrix calls for: errors that are made up
for let entries grow. The second where steps follow all entries of a group, not the largest of the row."""


class Stored(NamedTuple):
    """A matrix as it is stored: see ``fips.formats.values``."""

    codes_NK: Tensor
    steps_N: Tensor
    group_steps: Tensor | None


class GridRounding(Rounding):
    """A value format with a step for every row at a time. ``rows_N`` weighs the rows where they are coded together."""

    def __init__(self, values: Values, rows_N: Tensor | None = None) -> None:
        self.values, self.rows_N = values, rows_N
        self._weight_N = torch.empty(0)
        self._codes: list[Tensor] = []

    wide_N: Tensor
    """Steps, float32."""
    inverse_N: Tensor
    """One over them; 0 for 0."""

    def _set(self, wide_N: Tensor) -> None:
        self.wide_N, self.inverse_N = wide_N, inverse_of(wide_N)
        if self.values.memory:
            self._weight_N = relative(wide_N.square() if self.rows_N is None else self.rows_N * wide_N.square())

    def nearest(self, columns: Tensor) -> Tensor:
        numbers, codes = rounded(self.values, columns * self.inverse_N, self._weight_N)
        if codes is not None:
            self._codes.append(codes.reshape(-1, codes.shape[-1]))
        return numbers * self.wide_N

    def _codes_NK(self, found_NK: Tensor, steps_NK: Tensor) -> Tensor:
        """Of all columns, which have been rounded one after another."""
        if self.values.memory:
            return torch.cat(self._codes).T.contiguous()
        return self.values.encode(self.values.nearest(in_steps(found_NK, steps_NK)))

    @abstractmethod
    def stored(self, found_NK: Tensor) -> Stored:
        """A matrix that was rounded."""


class RowGrid(GridRounding):
    """One step per row, in the type it is stored in."""

    def __init__(self, values: Values, steps_N: Tensor, rows_N: Tensor | None = None) -> None:
        super().__init__(values, rows_N)
        self.steps_N = steps_N
        self._set(steps_N.float())

    def stored(self, found_NK: Tensor) -> Stored:
        return Stored(self._codes_NK(found_NK, self.wide_N.unsqueeze(1)), self.steps_N, None)


class GroupGrid(GridRounding):
    """A step for every group of columns, least in squared error of what errors before it have made of the group."""

    group: int

    def __init__(
        self,
        values: Values,
        matrix_NK: Tensor,
        weight_K: Tensor,
        dtype: torch.dtype,
        rows_N: Tensor | None = None,
    ) -> None:
        super().__init__(values, rows_N)
        assert values.scale_group is not None
        self.group = values.scale_group
        self._weight_K1 = weight_K.unsqueeze(1)
        if values.memory:  # of a group as wide as the numbers of the code, however large its largest
            most_N1 = best_steps(values.in_groups(matrix_NK), weight_K, values=values).amax(1, keepdim=True)
        else:
            most_N1 = matrix_NK.abs().amax(1, keepdim=True) / values.largest
        self.steps_N, _ = values.stored_scales(most_N1, dtype, room=MORE_ROOM if values.memory else ROOM)
        self._steps_N = self.steps_N.float()
        self._found: list[Tensor] = []

    def begin(self, rest_JN: Tensor, start: int) -> None:
        if start == 0:
            self._found, self._codes = [], []
        group_JN, weight_J1 = rest_JN[: self.group], self._weight_K1[start : start + self.group]
        steps_N = best_steps(group_JN, weight_J1, values=self.values, dim=0)
        self._found.append(self.values.group_scales(steps_N, self._steps_N))
        self._set(self._found[-1] * self._steps_N)

    def stored(self, found_NK: Tensor) -> Stored:
        group_steps = torch.stack(self._found, dim=1).flatten()
        steps_NK = self.values.steps(self._steps_N, group_steps, found_NK.shape[1])
        return Stored(self._codes_NK(found_NK, steps_NK), self.steps_N, group_steps)


def grid_for(
    values: Values, matrix_NK: Tensor, weight_K: Tensor, dtype: torch.dtype, rows_N: Tensor | None = None
) -> GridRounding:
    """The grid of a value format for a matrix, its columns weighted, and its rows where they are coded together; steps
    of rows are fixed by it, those of groups when their turn comes."""
    if values.scale_group is not None:
        return GroupGrid(values, matrix_NK, weight_K, dtype, rows_N)
    steps_N, _ = grid_steps(matrix_NK, weight_K, values=values, dtype=dtype)
    return RowGrid(values, steps_N, rows_N)


def side_by_side(parts: Sequence[Rounding], rows: int) -> Rounding:
    """Several roundings of matrices of so many rows each as one of a taller matrix."""
    found: list[tuple[Rounding, int]] = []
    for tabled, some in itertools.groupby(parts, _has_table):
        alike = list(some)
        if tabled:
            grids = [part for part in alike if isinstance(part, GridRounding)]
            found.append((_Together(grids, rows), len(grids) * rows))
        else:
            found += [(part, rows) for part in alike]
    return found[0][0] if len(found) == 1 else _Apart(found)


def _has_table(part: Rounding) -> bool:
    return isinstance(part, GridRounding) and part.values.table() is not None


class _Apart(Rounding):
    """Each, of so many rows, by itself."""

    def __init__(self, parts: Sequence[tuple[Rounding, int]]) -> None:
        self.parts, self.sizes = [part for part, _ in parts], [rows for _, rows in parts]
        groups = [part.group for part in self.parts if part.group is not None]
        self.group = min(groups) if groups else None  # powers of two: the smallest divides the others

    def begin(self, rest_JN: Tensor, start: int) -> None:
        for part, own_JN in zip(self.parts, rest_JN.split(self.sizes, dim=1), strict=True):
            if part.group is not None and start % part.group == 0:
                part.begin(own_JN, start)

    def nearest(self, columns: Tensor) -> Tensor:
        found = [part.nearest(own) for part, own in zip(self.parts, columns.split(self.sizes, dim=-1), strict=True)]
        return torch.cat(found, dim=-1)


class _Together(_Apart):
    """All at once: numbers are rounded to integers, and these looked up in the table of their grid."""

    def __init__(self, parts: Sequence[GridRounding], rows: int) -> None:
        super().__init__([(part, rows) for part in parts])
        tables = [table for part in parts if (table := part.values.table()) is not None]
        self.grids, self.tables = parts, torch.cat(tables)
        starts = len(tables[0]) * torch.arange(len(tables))
        self.middle_N = starts.repeat_interleave(rows) + 128.5  # behind it lie the positive integers
        self._steps_N: tuple[Tensor, Tensor] | None = None

    def begin(self, rest_JN: Tensor, start: int) -> None:
        super().begin(rest_JN, start)
        self._steps_N = None

    def nearest(self, columns: Tensor) -> Tensor:
        if self._steps_N is None:
            wide_N, inverse_N = (
                torch.cat([getattr(part, name) for part in self.grids]) for name in ("wide_N", "inverse_N")
            )
            self._steps_N = wide_N, inverse_N
            self.tables, self.middle_N = (one.to(wide_N.device) for one in (self.tables, self.middle_N))
        wide_N, inverse_N = self._steps_N
        places = (columns * inverse_N).clamp_(-128, 128).add_(self.middle_N).int().flatten()
        return self.tables.index_select(0, places).view(columns.shape) * wide_N
