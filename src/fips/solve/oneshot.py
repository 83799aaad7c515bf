"""One layer pruned and rounded in one pass with error feedback (``fips.solve.feedback``), under every structure.

The metric is the second moment of the layer's inputs; the gradients of its outputs only say how much its rows count
beside each other and beside other layers. That is GPTQ and SparseGPT, with the choice of the structure on top.

Shape legend: D width, F hidden features, N stored rows, K stored columns, J columns of one run, I inputs, O outputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fips.errors import BudgetError
from fips.formats.rotation import rotate, rotate_moment
from fips.formats.values import Values
from fips.solve.alternate import Factorization
from fips.solve.descent import descend
from fips.solve.feedback import RUN, Chooser, Rounding, diagonal, inverse_root, with_feedback
from fips.solve.grids import GridRounding, grid_for, side_by_side
from fips.solve.moments import usable_diagonal, usable_moment
from fips.solve.rounding import Grid
from fips.solve.structures import Choice, Point, Pricing, Structures
from fips.solve.supports import Reduction

__all__ = ["OneShot", "damping_for"]

LEAST_DAMPING, MOST_DAMPING = 1e-3, 0.5
UNKNOWN_NOISE = 0.02
"""Where too few parts of the data were seen to tell it."""
ROW_SHARE = 0.5
"""Share of a row's weight that follows its gradients; the rest is the same for all rows of a layer."""
SAMPLE = 256
"""Stored rows that stand for all of them when structures are tried; rows do not touch each other's errors."""


class OneShot(Structures):
    """The structures of a layer with weight (D, F); ``axis`` is the one it sums along.

    ``moment_II`` is that of its inputs, or its diagonal (I,) where correlations are not known: then no error is made up
    for. ``power_O`` is the mean square of the gradient at each output, summed over the tokens of an example; ``dtype``
    the type that steps of integers are stored in. With ``held_II``, the moment of other data, errors are told by that.

    ``damping`` is added to the moment, relative to its mean diagonal; see ``damping_for``. With a ``rotation`` b all of
    it is solved in columns turned in blocks of b (``fips.formats.rotation``). What is solved on a grid is made better
    in some ``sweeps`` (``fips.solve.descent``). With ``whole`` all entries are kept.
    """

    def __init__(
        self,
        weight_DF: Tensor,
        moment_II: Tensor,
        power_O: Tensor,
        axis: Reduction,
        pricing: Pricing,
        dtype: torch.dtype = torch.float32,
        held_II: Tensor | None = None,
        damping: float = 2 * UNKNOWN_NOISE,
        rotation: int = 1,
        sweeps: int = 0,
        *,
        whole: bool = False,
    ) -> None:
        super().__init__([(weight_DF.shape[0], weight_DF.shape[1])], [axis], pricing)
        self.axis: Reduction = axis
        self.dtype = dtype
        self.rotation = rotation
        self.matrix_NK = rotate(weight_DF.T if axis == 0 else weight_DF, rotation)
        usable_II = usable_diagonal(moment_II) if moment_II.dim() == 1 else usable_moment(moment_II)
        self.moment_KK = rotate_moment(usable_II, rotation)
        self.judge_KK = self.moment_KK if held_II is None else rotate_moment(usable_moment(held_II), rotation)
        self.weight_N = ROW_SHARE * power_O + (1 - ROW_SHARE) * power_O.mean()
        self.damping, self.sweeps, self.whole = damping, sweeps, whole
        self.overfit: float | None = None
        """After trials: error on data held out over that on the data fitted, of what is nearest to an equal share."""
        self._upper_KK: Tensor | None = None

    @property
    def upper_KK(self) -> Tensor:
        if self._upper_KK is None:
            self._upper_KK = inverse_root(self.moment_KK, self.damping)
        return self._upper_KK

    def forget(self) -> None:
        self._upper_KK = None

    def solve(self, choice: Choice, size: float) -> Factorization:
        task = self._task(choice, size)
        found_NK, mask_NK = with_feedback(
            self.matrix_NK, self.upper_KK, task.rounding, task.choose, run_length=task.run_length
        )
        stored = None
        if isinstance(task.rounding, GridRounding):
            stored = task.rounding.stored(found_NK)
            if self.sweeps and self.moment_KK.dim() == 2:
                self.forget()  # as large as the moment
                stored = descend(
                    self.matrix_NK, stored, choice.numbers, self.moment_KK, damping=self.damping, mask_NK=mask_NK,
                    rows_N=self.weight_N, sweeps=self.sweeps,
                )  # fmt: skip
                found_NK = choice.numbers.dequantize(*stored)
        mask_NK = torch.ones_like(found_NK, dtype=torch.bool) if mask_NK is None else mask_NK
        loss = self.loss(found_NK)
        factor_RF, mask_RF = self._as_factor(rotate(found_NK, self.rotation)), self._as_factor(mask_NK)
        if stored is None:
            return Factorization(None, [factor_RF], [mask_RF], [loss])
        grid = Grid(
            self._as_factor(stored.codes_NK), stored.steps_N, choice.numbers, self.axis,
            group_steps=stored.group_steps, rotation=self.rotation,
        )  # fmt: skip
        return Factorization(None, [factor_RF], [mask_RF], [loss], [grid])

    def _task(self, choice: Choice, size: float) -> _Task:
        """Raises ``BudgetError`` if the choice does not fit into the size."""
        size = min(size, self.dense_bytes(choice))
        self.require_fit(choice, size)
        run_length = _run_length(choice)
        choose = None if self._keeps_all(choice, size) else self._chooser(choice, size)
        return _Task(run_length, choose, self._rounding(choice.numbers, choose, run_length))

    def loss(self, found_NK: Tensor) -> float:
        """The second-order change of the model's output."""
        return self._loss(found_NK, self.judge_KK)

    def _loss(self, found_NK: Tensor, moment_KK: Tensor) -> float:
        costs_N = self._costs(self.matrix_NK - found_NK, moment_KK)
        return max(float((costs_N * self.weight_N).sum(dtype=torch.float64)), 0.0)

    def _costs(self, error_NK: Tensor, moment_KK: Tensor) -> Tensor:
        """Of the errors of every row (N,), its weight left out."""
        weighted_NK = error_NK * moment_KK if moment_KK.dim() == 1 else error_NK @ moment_KK
        return (weighted_NK * error_NK).sum(1)

    def trials(self, choices: Sequence[Choice], size: float) -> list[Point]:
        """Keeping all is cheap to try and is tried at every width; pruning where it is promising, unless all entries
        are kept."""
        pruned = [] if self.whole else self.wanted(choices, size)
        return self._tried(sorted({*self._whole(choices), *pruned}), size)

    def quick_trials(self, choices: Sequence[Choice], size: float) -> list[Point]:
        """Of keeping all, where several widths can be had; else as ``trials``."""
        whole = self._whole(choices)
        free = self.whole or (len(whole) > 1 and sum(bytes_ <= size for _, bytes_ in whole) > 0)
        return self._tried(sorted(whole), size) if free else self.trials(choices, size)

    def _whole(self, choices: Sequence[Choice]) -> set[tuple[Choice, float]]:
        return {(choice, self.dense_bytes(choice)) for choice in choices if choice.free}

    def _tried(self, sizes: Sequence[tuple[Choice, float]], share: float) -> list[Point]:
        """What ``SAMPLE`` rows leave at those sizes that fit; ``share`` bytes are an equal share."""
        small, weight = self._sample()
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
        near = min(tasks, key=lambda one: abs(one[1] - share), default=None)
        for run_length in {task.run_length for *_, task in tasks}:
            some = [one for one in tasks if one[2].run_length == run_length]
            found = small._found([task for *_, task in some])
            for one, part_NK in zip(some, found, strict=True):
                choice, bytes_, _ = one
                loss = small.loss(part_NK)
                points.append(Point(choice, bytes_, loss / weight))
                if one is near and self.judge_KK is not self.moment_KK:
                    fitted = small._loss(part_NK, self.moment_KK)
                    self.overfit = loss / fitted if fitted > 0 else None
        return points

    def _found(self, tasks: Sequence[_Task]) -> Sequence[Tensor]:
        """What several tasks with runs of one length make, all at once: their rows are those of one taller matrix."""
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
            side_by_side([task.rounding for task in tasks], rows),
            choose if any(task.choose is not None for task in tasks) else None,
            run_length=tasks[0].run_length,
        )
        parts: Sequence[Tensor] = found_NK.split(rows)
        return parts

    def _sample(self) -> tuple[Self, float]:
        """The problem of ``SAMPLE`` rows, spread evenly over what rows weigh, and their share of the weight."""
        rows = len(self.matrix_NK)
        if rows <= SAMPLE:
            return self, 1.0
        worth_N = self._costs(self.matrix_NK, self.moment_KK) * self.weight_N
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

    def _rounding(self, values: Values, choose: Chooser | None, run_length: int) -> Rounding:
        """Steps of rows are least in plain squared error of what will be kept, columns weighted by their moments.

        Those of groups are found when their turn comes, from what the errors before them have made of them.
        """
        if not values.scaled:
            return Rounding()
        matrix_NK = self.matrix_NK
        if choose is not None:
            roots_K = diagonal(self.upper_KK)
            costs_KN = (matrix_NK / roots_K).square().T
            masks = [choose(part, index * run_length) for index, part in enumerate(costs_KN.split(run_length))]
            matrix_NK = matrix_NK * torch.cat(masks).T
        return grid_for(values, matrix_NK, diagonal(self.moment_KK), self.dtype, self.weight_N)

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
        run_length = _run_length(choice)
        counts = [int(part.sum()) for part in back(first_RF).split(run_length)]
        return lambda costs_JN, start: back(pattern.choose([weighted(costs_JN)], counts[start // run_length])[0])


def damping_for(noise: float | None, bits: float) -> float:
    """What is added to a moment, relative to its mean diagonal.

    ``noise`` is the share of the moment that is noise (``LayerMoments.noise``). Beside it stands what the compressed
    layers before this one will change in its inputs, about :math:`4^{1-b}` of their power at b bits a weight. The
    dampings that were best on data held out lay between 0.003 and 0.3; on ViT-Tiny and two small language models at 3.2
    to 4.8 bits this rule did as well as the best fixed one of each (0.05 and 0.003), which were 4 and 40 % worse on the
    others.
    """
    noise = UNKNOWN_NOISE if noise is None else noise
    return min(max(2 * noise + 4 ** (1 - bits), LEAST_DAMPING), MOST_DAMPING)


def _run_length(choice: Choice) -> int:
    """Columns of a run, so many that neither groups of the pattern nor those of scales are cut."""
    unit = math.lcm(choice.layout.group, choice.numbers.scale_group or 1)
    return max(RUN // unit, 1) * unit


@dataclass(slots=True)
class _Task:
    """A structure at a size, ready to be solved."""

    run_length: int
    choose: Chooser | None
    """None keeps all."""
    rounding: Rounding
