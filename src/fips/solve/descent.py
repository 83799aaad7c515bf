r"""A matrix on a grid made better in place: entry after entry, and step after step, to where it costs least.

What ``fips.solve.feedback`` leaves is not the best that its grid holds: a column is never looked at again. With W the
matrix, Q what stands for it and H the metric, :math:`R = (W - Q) H`, the best an entry can be while all others stay is

.. math:: q_{nk} + R_{nk} / H_{kk},

rounded to its grid, and the best step of a group of entries with numbers c, metric among them :math:`H_{gg}`, is

.. math:: s + \frac{\sum_k R_{nk} c_k}{c H_{gg} c^\top},

rounded to what can be stored. Neither ever makes the loss larger. Two sweeps over all columns take a tenth off the loss
of the pass before them, and about as much off the KL of a model; more take little more.

Everything is laid out (K, N), so that a column is contiguous, and what a run of columns changes reaches all others by
one product.

Shape legend: N stored rows, K stored columns, J columns of a run, G groups of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fips.formats.values import Values
from fips.solve.coded import relative, rounded
from fips.solve.grids import Stored
from fips.solve.rounding import inverse_of

__all__ = ["descend"]

RUN = 64
"""Columns whose changes are told to all others together."""


def descend(
    matrix_NK: Tensor,
    start: Stored,
    values: Values,
    metric_KK: Tensor,
    *,
    damping: float = 0.0,
    mask_NK: Tensor | None = None,
    rows_N: Tensor | None = None,
    sweeps: int = 2,
) -> Stored:
    """The matrix after some sweeps over its columns; entries outside the mask stay 0.

    Where the entries of a column are coded together, all of it moves at once, its rows weighted by ``rows_N``.

    ``damping`` is added to the metric, relative to its mean diagonal. Steps of groups change, in what they are stored
    in; where the format has none, the step of a row does, once, before the sweeps.
    """
    return _Descent(matrix_NK, start, values, metric_KK, damping, mask_NK, rows_N).after(sweeps)


class _Descent:
    def __init__(
        self,
        matrix_NK: Tensor,
        start: Stored,
        values: Values,
        metric_KK: Tensor,
        damping: float,
        mask_NK: Tensor | None,
        rows_N: Tensor | None,
    ) -> None:
        self.values, self.metric_KK = values, metric_KK
        self.weight_N = matrix_NK.new_ones(len(matrix_NK)) if rows_N is None else rows_N
        self.extra = damping * metric_KK.diagonal().mean()
        self.mask_KN = None if mask_NK is None else mask_NK.T.contiguous()
        self.rows_N = start.steps_N
        self.wide_N = start.steps_N.float()
        self.found_KN = values.dequantize(*start).T.contiguous()
        self.codes_KN = start.codes_NK.T.contiguous() if values.memory else None
        self.group = values.scale_group or len(metric_KK)
        if start.group_steps is None:
            self.steps_GN = self.wide_N.unsqueeze(0)
            self._fit_rows(matrix_NK)
        else:
            self.steps_GN = start.group_steps.view(len(matrix_NK), -1).T * self.wide_N
        error_KN = matrix_NK.T - self.found_KN
        self.rest_KN = metric_KK @ error_KN + self.extra * error_KN

    def _fit_rows(self, matrix_NK: Tensor) -> None:
        """The best step of every row for its numbers as they are."""
        answered_KN = self.metric_KK @ self.found_KN + self.extra * self.found_KN
        own_N = (self.found_KN * answered_KN).sum(0)
        ratio_N = (matrix_NK.T * answered_KN).sum(0) / own_N
        ratio_N = torch.where((own_N > 0) & (ratio_N > 0), ratio_N, 1.0)
        before_N, self.rows_N = self.wide_N, (self.wide_N * ratio_N).to(self.rows_N.dtype)
        self.wide_N = self.rows_N.float()
        self.found_KN *= torch.where(before_N > 0, self.wide_N / before_N, 1.0)
        self.steps_GN = self.wide_N.unsqueeze(0)

    def after(self, sweeps: int) -> Stored:
        run = max(RUN, self.values.scale_group or 1)
        for _ in range(sweeps):
            for first in range(0, len(self.found_KN), run):
                self._run(slice(first, min(first + run, len(self.found_KN))))
        grouped = self.values.scale_group is not None
        group_steps = self._stored_steps(self.steps_GN).T.flatten() if grouped else None
        found_NK = self.found_KN.T.contiguous()
        if self.codes_KN is not None:
            return Stored(self.codes_KN.T.contiguous(), self.rows_N, group_steps)
        return Stored(self.values.quantize(found_NK, self.rows_N, group_steps), self.rows_N, group_steps)

    def _stored_steps(self, steps_GN: Tensor) -> Tensor:
        return self.values.group_scales(steps_GN, self.wide_N.unsqueeze(0))

    def _run(self, run: slice) -> None:
        found_JN, rest_JN = self.found_KN[run], self.rest_KN[run]
        before_JN, metric_JJ = found_JN.clone(), self.metric_KK[run, run].clone()
        metric_JJ.diagonal().add_(self.extra)
        for start in range(0, len(found_JN), self.group):
            own = slice(start, min(start + self.group, len(found_JN)))
            place = (run.start + start) // self.group
            if self.values.scale_group is not None:
                self._fit_group(place, found_JN, rest_JN, metric_JJ, own)
            step_N = self.steps_GN[place]
            inverse_N, weight_N = inverse_of(step_N), relative(self.weight_N * step_N.square())
            for column in range(own.start, own.stop):
                gap_N = rest_JN[column] / metric_JJ[column, column]
                wanted_N = found_JN[column] + gap_N
                best_N, codes_N = rounded(self.values, wanted_N * inverse_N, weight_N)
                best_N = best_N * step_N
                if self.mask_KN is not None:
                    best_N *= self.mask_KN[run.start + column]
                better_N = self._is_better(wanted_N - best_N, gap_N)
                change_N = (best_N - found_JN[column]) * better_N
                if self.codes_KN is not None and codes_N is not None:
                    own_N = self.codes_KN[run.start + column]
                    self.codes_KN[run.start + column] = torch.where(better_N, codes_N, own_N)
                rest_JN.addr_(metric_JJ[:, column], change_N, alpha=-1)
                found_JN[column] += change_N
        change_JN = found_JN - before_JN
        for others in (slice(0, run.start), slice(run.stop, len(self.found_KN))):
            self.rest_KN[others].addmm_(self.metric_KK[others, run], change_JN, alpha=-1)

    def _is_better(self, left_N: Tensor, gap_N: Tensor) -> Tensor:
        """Where to move: neither `nearest` between two levels nor the integers of a search are exact."""
        if not self.values.memory:
            return left_N.abs() < gap_N.abs()
        return (left_N.square() * self.weight_N).sum() < (gap_N.square() * self.weight_N).sum()

    def _fit_group(self, place: int, found_JN: Tensor, rest_JN: Tensor, metric_JJ: Tensor, own: slice) -> None:
        """Give a group the best step that can be stored, its numbers as they are."""
        step_N = self.steps_GN[place]
        numbers_JN = found_JN[own] * inverse_of(step_N)
        power_N = ((metric_JJ[own, own] @ numbers_JN) * numbers_JN).sum(0)
        wanted_N = step_N + torch.where(power_N > 0, (rest_JN[own] * numbers_JN).sum(0) / power_N, 0.0)
        wanted_N = torch.where((wanted_N > 0) & (step_N > 0), wanted_N, step_N)
        self.steps_GN[place] = self._stored_steps(wanted_N.unsqueeze(0)).squeeze(0) * self.wide_N
        fitted_JN = numbers_JN * self.steps_GN[place]
        rest_JN.addmm_(metric_JJ[:, own], fitted_JN - found_JN[own], alpha=-1)
        found_JN[own] = fitted_JN
