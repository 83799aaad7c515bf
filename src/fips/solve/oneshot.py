"""One layer pruned and rounded in one pass with error feedback (``fips.solve.feedback``), under every structure.

The metric is the second moment of the layer's inputs; the gradients of its outputs only say how much its rows count
beside each other and beside other layers. That is GPTQ and SparseGPT, with the choice of the structure on top.

Shape legend: D width, F hidden features, N stored rows, K stored columns, J columns of one run, I inputs, O outputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fips.errors import BudgetError
from fips.formats.patterns import Pattern
from fips.formats.values import Values
from fips.solve.alternate import Factorization
from fips.solve.feedback import RUN, Chooser, diagonal, inverse_root, with_feedback
from fips.solve.moments import usable_diagonal, usable_moment
from fips.solve.rounding import Grid, row_steps
from fips.solve.structures import Choice, Point, Pricing, Structures
from fips.solve.supports import Reduction

__all__ = ["OneShot"]

DAMPING = 0.05
"""Added to a moment, relative to its mean diagonal: few examples tell directions worse than sizes. Of 0.01, 0.05 and
0.1 the last two were as good on ViT-Tiny, and the first a tenth worse."""
ROW_SHARE = 0.5
"""Share of a row's weight that follows its gradients; the rest is the same for all rows of a layer."""
SAMPLE = 256
"""Stored rows that stand for all of them when structures are tried; rows do not touch each other's errors."""


class OneShot(Structures):
    """The structures of a layer with weight (D, F); ``axis`` is the one it sums along.

    ``moment_II`` is that of its inputs, or its diagonal (I,) where correlations are not known: then no error is made up
    for. ``power_O`` is the mean square of the gradient at each output, summed over the tokens of an example; ``dtype``
    the type that steps of integers are stored in.
    """

    def __init__(
        self,
        weight_DF: Tensor,
        moment_II: Tensor,
        power_O: Tensor,
        axis: Reduction,
        pricing: Pricing,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__([(weight_DF.shape[0], weight_DF.shape[1])], [axis], pricing)
        self.axis: Reduction = axis
        self.dtype = dtype
        self.matrix_NK = weight_DF.T if axis == 0 else weight_DF
        self.moment_KK = usable_diagonal(moment_II) if moment_II.dim() == 1 else usable_moment(moment_II)
        self.weight_N = ROW_SHARE * power_O + (1 - ROW_SHARE) * power_O.mean()
        self._upper_KK: Tensor | None = None

    @property
    def upper_KK(self) -> Tensor:
        if self._upper_KK is None:
            self._upper_KK = inverse_root(self.moment_KK, DAMPING)
        return self._upper_KK

    def forget(self) -> None:
        self._upper_KK = None

    def solve(self, choice: Choice, size: float) -> Factorization:
        task = self._task(choice, size)
        found_NK, mask_NK = with_feedback(
            self.matrix_NK, self.upper_KK, task.nearest, task.choose, run_length=task.run_length
        )
        mask_NK = torch.ones_like(found_NK, dtype=torch.bool) if mask_NK is None else mask_NK
        loss = self.loss(found_NK)
        factor_RF, mask_RF = self._as_factor(found_NK), self._as_factor(mask_NK)
        if task.steps_N is None:
            return Factorization(None, [factor_RF], [mask_RF], [loss])
        values = task.values
        codes_RF = values.encode(values.nearest(_in_steps(found_NK, task.steps_N.float().unsqueeze(1))))
        grid = Grid(self._as_factor(codes_RF), task.steps_N, values, self.axis)
        return Factorization(None, [factor_RF], [mask_RF], [loss], [grid])

    def _task(self, choice: Choice, size: float) -> _Task:
        """Raises ``BudgetError`` if the choice does not fit into the size."""
        size = min(size, self.dense_bytes(choice))
        self.require_fit(choice, size)
        run_length = _run_length(choice.layout)
        choose = None if self._keeps_all(choice, size) else self._chooser(choice, size)
        return _Task(choice.numbers, run_length, choose, self._steps(choice.numbers, choose, run_length))

    def loss(self, found_NK: Tensor) -> float:
        """The second-order change of the model's output."""
        costs_N = self._costs(self.matrix_NK - found_NK)
        return max(float((costs_N * self.weight_N).sum(dtype=torch.float64)), 0.0)

    def _costs(self, error_NK: Tensor) -> Tensor:
        """Of the errors of every row (N,), its weight left out."""
        weighted_NK = error_NK * self.moment_KK if self.moment_KK.dim() == 1 else error_NK @ self.moment_KK
        return (weighted_NK * error_NK).sum(1)

    def trials(self, choices: Sequence[Choice], size: float) -> list[Point]:
        """Keeping all is cheap to try and is tried at every width; pruning where it is promising."""
        return self._tried(sorted({*self._whole(choices), *self.wanted(choices, size)}))

    def quick_trials(self, choices: Sequence[Choice], size: float) -> list[Point]:
        """Of keeping all, where several widths can be had; else as ``trials``."""
        whole = self._whole(choices)
        free = len(whole) > 1 and sum(bytes_ <= size for _, bytes_ in whole) > 0
        return self._tried(sorted(whole)) if free else self.trials(choices, size)

    def _whole(self, choices: Sequence[Choice]) -> set[tuple[Choice, float]]:
        return {(choice, self.dense_bytes(choice)) for choice in choices if choice.free}

    def _tried(self, sizes: Sequence[tuple[Choice, float]]) -> list[Point]:
        """What ``SAMPLE`` rows leave at those sizes that fit."""
        small, share = self._sample()
        tasks: list[tuple[Choice, float, _Task]] = []
        for choice, bytes_ in sizes:
            if self.expected(choice, bytes_) == math.inf:
                continue
            less = small.overhead(choice) + small.hidden * small.width / (self.hidden * self.width) * (
                bytes_ - self.overhead(choice)
            )
            with suppress(BudgetError):
                tasks.append((choice, bytes_, small._task(choice, less)))
        points: list[Point] = []
        for run_length in {task.run_length for *_, task in tasks}:
            some = [one for one in tasks if one[2].run_length == run_length]
            losses = small._losses([task for *_, task in some])
            points += [
                Point(choice, bytes_, loss / share) for (choice, bytes_, _), loss in zip(some, losses, strict=True)
            ]
        return points

    def _losses(self, tasks: Sequence[_Task]) -> list[float]:
        """Of several tasks with runs of one length, all at once: their rows are those of one taller matrix."""
        rows = len(self.matrix_NK)

        def choose(costs_JN: Tensor, start: int) -> Tensor:
            masks = [
                torch.ones_like(part, dtype=torch.bool) if task.choose is None else task.choose(part, start)
                for task, part in zip(tasks, costs_JN.split(rows, dim=1), strict=True)
            ]
            return torch.cat(masks, dim=1)

        found_NK, _ = with_feedback(
            self.matrix_NK.repeat(len(tasks), 1),
            self.upper_KK,
            _nearest_of(tasks, rows),
            choose if any(task.choose is not None for task in tasks) else None,
            run_length=tasks[0].run_length,
        )
        return [self.loss(part) for part in found_NK.split(rows)]

    def _sample(self) -> tuple[Self, float]:
        """The problem of ``SAMPLE`` rows, spread evenly over what rows weigh, and their share of the weight."""
        rows = len(self.matrix_NK)
        if rows <= SAMPLE:
            return self, 1.0
        worth_N = self._costs(self.matrix_NK) * self.weight_N
        places = (torch.arange(SAMPLE, device=worth_N.device) + 0.5) * (rows / SAMPLE)
        kept = worth_N.argsort()[places.long()].sort().values
        upper_KK = self.upper_KK
        small = copy.copy(self)
        shape = (self.width, SAMPLE) if self.axis == 0 else (SAMPLE, self.hidden)
        Structures.__init__(small, [shape], self.reductions, self.pricing)
        small.least = 0  # the whole layer decides what fits
        small._upper_KK = upper_KK
        small.matrix_NK, small.weight_N = self.matrix_NK[kept], self.weight_N[kept]
        total = float(worth_N.sum())
        return small, float(worth_N[kept].sum()) / total if total > 0 else SAMPLE / rows

    def _as_factor(self, matrix_NK: Tensor) -> Tensor:
        return matrix_NK.T.contiguous() if self.axis == 0 else matrix_NK.contiguous()

    def _steps(self, values: Values, choose: Chooser | None, run_length: int) -> Tensor | None:
        """One step per row, least in plain squared error of what will be kept, columns weighted by their moments."""
        if not values.scaled:
            return None
        matrix_NK = self.matrix_NK
        if choose is not None:
            roots_K = diagonal(self.upper_KK)
            costs_KN = (matrix_NK / roots_K).square().T
            masks = [choose(part, index * run_length) for index, part in enumerate(costs_KN.split(run_length))]
            matrix_NK = matrix_NK * torch.cat(masks).T
        return row_steps(matrix_NK, diagonal(self.moment_KK), values=values).to(self.dtype)

    def _chooser(self, choice: Choice, size: float) -> Chooser:
        """Entries to keep of each run of columns.

        How many of a run is decided by what removing them would cost before any error has moved; which ones, when its
        turn comes.
        """
        pattern, axis = choice.layout, self.axis

        def weighted(costs_JN: Tensor) -> Tensor:
            costs_JN = costs_JN * self.weight_N
            return costs_JN if axis == 0 else costs_JN.T

        def back(mask_RF: Tensor) -> Tensor:
            return mask_RF if axis == 0 else mask_RF.T

        if not choice.free:
            return lambda costs_JN, _: back(pattern.choose_fixed(weighted(costs_JN), axis=axis))
        left = size - self.overhead(choice) - self._pattern_bytes(choice)
        kept = int(left / self.pricing.entry(choice.numbers) + 1e-9)
        costs_KN = (self.matrix_NK / diagonal(self.upper_KK)).square().T
        (first_RF,) = pattern.choose([weighted(costs_KN)], min(kept, costs_KN.numel()))
        run_length = _run_length(pattern)
        counts = [int(part.sum()) for part in back(first_RF).split(run_length)]
        return lambda costs_JN, start: back(pattern.choose([weighted(costs_JN)], counts[start // run_length])[0])


def _run_length(pattern: Pattern) -> int:
    """Columns of a run, so many that no group of a pattern is cut."""
    return RUN // pattern.group * pattern.group


@dataclass(slots=True)
class _Task:
    """A structure at a size, ready to be solved."""

    values: Values
    run_length: int
    choose: Chooser | None
    """None keeps all."""
    steps_N: Tensor | None
    """None for floating values."""

    @property
    def nearest(self) -> Callable[[Tensor], Tensor]:
        """What columns (..., N) become."""
        if self.steps_N is None:
            return lambda column_N: column_N
        values, wide_N = self.values, self.steps_N.float()
        inverse_N = torch.where(wide_N == 0, 0.0, 1 / wide_N)
        return lambda column_N: values.nearest(column_N * inverse_N) * wide_N


def _nearest_of(tasks: Sequence[_Task], rows: int) -> Callable[[Tensor], Tensor]:
    """What columns of several tasks side by side become; at once where all grids are evenly spaced integers."""
    steps = [task.steps_N for task in tasks if type(task.values).nearest is Values.nearest]
    if len(steps) < len(tasks) or any(one is None for one in steps):
        apart = [task.nearest for task in tasks]
        return lambda column: torch.cat([f(part) for f, part in zip(apart, column.split(rows, -1), strict=True)], -1)
    wide_N = torch.cat([one.float() for one in steps if one is not None])
    inverse_N = torch.where(wide_N == 0, 0.0, 1 / wide_N)
    largest_N = torch.cat([torch.full_like(wide_N[:rows], task.values.largest) for task in tasks])
    return lambda column: (column * inverse_N).round().clamp(-largest_N, largest_N) * wide_N


def _in_steps(values: Tensor, steps: Tensor) -> Tensor:
    """Values in units of steps; 0 where the step is 0."""
    return torch.where(steps == 0, 0.0, values / steps)
