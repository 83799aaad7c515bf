r"""Values on a grid of few bits: one step per stored row, every rounding error made up for by what is rounded later.

A factor is stored as rows n along whose K entries the layer sums. With the metric H of that axis, the rows share

.. math:: \ell(Q) = \sum_n (x_n - q_n) H (x_n - q_n)^\top,

and rounding column after column, each error spread over the columns still free by the inverse of H, is the best
feedback whatever the metric of the other axis. Entries outside the support stay 0; what they would have taken up is an
error like any other.

Shape legend: N stored rows, K stored columns, J columns of one run.

Reference: Frantar et al., arXiv 2210.17323.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fips.formats.rotation import rotate
from fips.formats.trellis import Trellis
from fips.formats.values import Values
from fips.solve.feedback import inverse_root
from fips.solve.problems import DAMPING, LayerProblem

__all__ = ["Grid", "best_steps", "grid_steps", "in_steps", "inverse_of", "round_factor", "round_rows"]

RATIOS = tuple(1.0 - 0.04 * index for index in range(16))
"""Clipped maxima tried for every row, relative to its largest magnitude."""
RUN = 128


@dataclass(frozen=True, slots=True)
class Grid:
    """A factor as numbers of a value format times one step per stored row, as it is stored."""

    codes_RF: Tensor
    """int8, 0 outside the support; of integers they are the numbers themselves."""
    steps_N: Tensor
    """In the type they are stored in."""
    values: Values
    axis: int
    """The one that a step spans: 0 where the stored rows are the hidden features F, 1 where they are the rank R."""
    wanted_RF: Tensor | None = None
    """What was rounded, in units of the steps."""
    group_steps: Tensor | None = None
    """A byte for every group of a stored row, where the format has them: what its step is multiplied by."""
    rotation: int = 1
    """Entries along ``axis`` of a block that is stored turned, see ``fips.formats.rotation``."""

    def factor(self) -> Tensor:
        """The factor (R, F), float32."""
        return self.turned(self.numbers() * self.spread(self.steps_N.float()))

    def turned(self, factor_RF: Tensor) -> Tensor:
        """What is stored as the layer has it, or the other way round."""
        return rotate(factor_RF, self.rotation, self.axis)

    def spread(self, steps_N: Tensor) -> Tensor:
        """What every entry of the factor is multiplied by, for steps of the stored rows; one axis may be 1."""
        steps = self.values.steps(steps_N, self.group_steps, self.codes_RF.shape[self.axis])
        return steps.T if self.axis == 0 else steps

    def numbers(self) -> Tensor:
        """The factor in units of its steps."""
        return self.values.decode(self.codes_RF.T).T if self.axis == 0 else self.values.decode(self.codes_RF)


def round_factor(
    problem: LayerProblem, factor_RF: Tensor, mask_RF: Tensor, *, axis: int, values: Values, dtype: torch.dtype
) -> Grid:
    """A factor on a grid with steps in ``dtype``, for the basis the problem is prepared for.

    ``axis`` is the one the layer sums along: 0 for ``up`` layers, whose stored rows are the hidden features, 1 for
    ``down`` layers.
    """
    scale_K, metric_KK = problem.axis(axis)
    matrix_NK, mask_NK = (factor_RF.T, mask_RF.T) if axis == 0 else (factor_RF, mask_RF)
    steps_N, group_steps = grid_steps(matrix_NK, scale_K.square(), values=values, dtype=dtype)
    spread = values.steps(steps_N.float(), group_steps, matrix_NK.shape[1])
    numbers_NK, wanted_NK = round_rows(matrix_NK, mask_NK, metric_KK, scale_K, spread, values=values)
    codes_RF, wanted_RF = (
        matrix.T.contiguous() if axis == 0 else matrix for matrix in (values.encode(numbers_NK), wanted_NK)
    )
    return Grid(codes_RF, steps_N, values, axis, wanted_RF, group_steps)


def grid_steps(
    matrix_NK: Tensor, weight_K: Tensor, *, values: Values, dtype: torch.dtype, room: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Steps in ``dtype``, and group steps, as they are stored, with the least plain rounding error.

    Columns are weighted by ``weight_K``. ``room`` times the largest step of a row can be stored beside it.
    """
    groups = values.in_groups(matrix_NK)
    weights = values.in_groups(weight_K.unsqueeze(0))
    return values.stored_scales(best_steps(groups, weights, values=values), dtype, room=room)


def best_steps(matrix: Tensor, weight: Tensor, *, values: Values, dim: int = -1) -> Tensor:
    """Step for every line along ``dim`` with the least weighted rounding error, among a few clipped maxima.

    Where entries are coded together, the one that makes the line as wide as the numbers the code is for.
    """
    if isinstance(values, Trellis):
        return values.best_steps(matrix, dim)
    peaks = matrix.abs().amax(dim, keepdim=True) / values.largest
    numbers = in_steps(matrix, peaks)  # errors of a line count in its largest step
    best = torch.full_like(peaks, torch.inf)
    ratios = torch.ones_like(peaks)
    for ratio in RATIOS:
        error = values.nearest(numbers / ratio).mul_(ratio).sub_(numbers)
        loss = error.square_().mul_(weight).sum(dim, keepdim=True)
        better = loss < best
        best = torch.where(better, loss, best)
        ratios = torch.where(better, ratio, ratios)
    return (peaks * ratios).squeeze(dim)


def round_rows(
    matrix_NK: Tensor, mask_NK: Tensor, metric_KK: Tensor, scale_K: Tensor, steps: Tensor, *, values: Values
) -> tuple[Tensor, Tensor]:
    """Numbers that stand for the matrix on its grid, 0 outside the mask, with error feedback; and what was rounded to
    them.

    The metric of columns is ``metric_KK`` between columns multiplied by ``scale_K``. ``steps`` are (N, K), or (N, 1).
    """
    upper_KK = inverse_root(metric_KK, DAMPING)
    rest_NK = matrix_NK * scale_K
    numbers_NK, wanted_NK = torch.empty_like(rest_NK), torch.empty_like(rest_NK)
    columns = rest_NK.shape[1]
    for start in range(0, columns, RUN):
        run = slice(start, min(start + RUN, columns))
        part_NJ, factor_JJ = rest_NK[:, run].clone(), upper_KK[run, run]
        errors_NJ = torch.empty_like(part_NJ)
        for place in range(part_NJ.shape[1]):
            column = start + place
            grid_N = steps[:, column if steps.shape[1] > 1 else 0] * scale_K[column]
            wanted_NK[:, column] = in_steps(part_NJ[:, place], grid_N)
            found_N = values.nearest(wanted_NK[:, column]) * mask_NK[:, column]
            errors_NJ[:, place] = (part_NJ[:, place] - found_N * grid_N) / factor_JJ[place, place]
            part_NJ[:, place + 1 :] -= torch.outer(errors_NJ[:, place], factor_JJ[place, place + 1 :])
            numbers_NK[:, column] = found_N
        rest_NK[:, run.stop :] -= errors_NJ @ upper_KK[run, run.stop :]
    return numbers_NK, wanted_NK


def inverse_of(steps: Tensor) -> Tensor:
    """One over steps; 0 for 0."""
    return torch.where(steps == 0, 0.0, 1 / steps)


def in_steps(values: Tensor, steps: Tensor) -> Tensor:
    """Values in units of steps; 0 where the step is 0."""
    return torch.where(steps == 0, 0.0, values / steps)
