r"""Pruning and rounding of a matrix in one pass, column after column, each error made up for by the columns behind it.

A matrix W is stored as N rows along whose K columns its layer sums. With the second moment H of what meets the columns,
all rows share the loss

.. math:: \ell(Q) = \sum_n (w_n - q_n) H (w_n - q_n)^\top .

With :math:`U^\top U = H^{-1}`, U upper triangular, the best answer of the columns still free to the error
:math:`e = (w_{nj} - q_{nj}) / U_{jj}` of column j is :math:`w_{nk} \leftarrow w_{nk} - e\, U_{jk}`. A removed entry is
an error like a rounded one, and removing it costs :math:`w_{nj}^2 / U_{jj}^2`.

Everything is laid out (K, N), so that a column is contiguous, and runs of columns are answered for by one product.

Shape legend: N stored rows, K stored columns, J columns of one run.

References: Frantar & Alistarh, arXiv 2208.11580; Frantar et al., arXiv 2210.17323; Frantar & Alistarh, arXiv
2301.00774.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Chooser", "Rounding", "diagonal", "inverse_root", "with_feedback"]

RUN, SHORT = 128, 16
"""Columns whose errors are spread together over all behind them, and over those of their own run."""
LEAF = 128
"""Columns of a triangular matrix that is inverted as one."""
MOST_DAMPING = 1e9
Chooser = Callable[[Tensor, int], Tensor]
"""``(costs_JN, start)``: the entries of the run of columns from ``start`` to keep, given what removing each costs."""


class Rounding:
    """What columns become; here what they are. Subclasses have a grid."""

    group: int | None = None
    """Columns of a group, which it wants to see together before the first of them is rounded."""

    def begin(self, rest_JN: Tensor, start: int) -> None:
        """A group begins at column ``start``: this and the columns behind it as they are now, removed entries zero."""

    def nearest(self, columns: Tensor) -> Tensor:
        """What columns (..., N) of the group become."""
        return columns


def inverse_root(moment_KK: Tensor, damping: float) -> Tensor:
    r"""U for the moment plus ``damping`` times its mean diagonal; on failure damping grows tenfold until it succeeds.

    Of a moment given as its diagonal (K,), the diagonal of U. Inputs that hardly vary about their mean have a moment
    that is all rounding errors, with negative directions as large as the positive ones: the damping then ends far above
    1, where no column makes up for another, as without data. Raises ``LinAlgError`` for what is not finite.

    With rows and columns in reverse, the lower factor of Cholesky is an upper one R of :math:`H = R R^\top`, and U its
    inverse: H itself is never inverted.
    """
    if moment_KK.dim() == 1:
        tiny = torch.finfo(moment_KK.dtype).tiny
        return (moment_KK + damping * moment_KK.mean()).clamp_min(tiny).rsqrt()
    mean = moment_KK.diagonal().mean().clamp_min(torch.finfo(moment_KK.dtype).tiny)
    while True:
        work_KK = moment_KK.flip(0, 1)  # one name for what follows: each is dropped when the next is there
        work_KK.diagonal().add_(damping * mean)
        work_KK, failed = torch.linalg.cholesky_ex(work_KK)
        if not failed:
            work_KK = work_KK.flip(0, 1)
            _invert_upper(work_KK)
            if bool(work_KK.isfinite().all()):
                upper_KK: Tensor = work_KK
                return upper_KK
        if not bool(moment_KK.isfinite().all()) or not damping <= MOST_DAMPING:  # or NaN
            raise torch.linalg.LinAlgError("the metric of a layer is not finite")  # type: ignore[attr-defined]
        damping = max(10 * damping, 1e-6)


def _invert_upper(upper_KK: Tensor) -> None:
    """Invert an upper triangular matrix in place, halves of halves, so that nearly all of the work is in products."""
    size = len(upper_KK)
    if size <= LEAF:
        eye_KK = torch.eye(size, dtype=upper_KK.dtype, device=upper_KK.device)
        upper_KK.copy_(torch.linalg.solve_triangular(upper_KK, eye_KK, upper=True))
        return
    half = size // 2
    first, last = upper_KK[:half, :half], upper_KK[half:, half:]
    _invert_upper(first)
    _invert_upper(last)
    upper_KK[:half, half:] = -(first @ upper_KK[:half, half:]) @ last


def diagonal(upper_KK: Tensor) -> Tensor:
    """Of U, or U itself where it is given as its diagonal (K,)."""
    return upper_KK if upper_KK.dim() == 1 else upper_KK.diagonal()


def with_feedback(
    matrix_NK: Tensor,
    upper_KK: Tensor,
    rounding: Rounding,
    choose: Chooser | None = None,
    *,
    run_length: int = RUN,
) -> tuple[Tensor, Tensor | None]:
    """A matrix of rounded numbers, of zeros where ``choose`` keeps nothing, and the mask of the kept.

    Without ``choose`` all entries are kept and the mask is None. In a metric without correlations, ``upper_KK`` its
    diagonal (K,), no column can make up for another. Groups of ``rounding`` must fill runs.
    """
    rest_KN = matrix_NK.T.contiguous().clone()
    mask_KN = None if choose is None else torch.empty(rest_KN.shape, dtype=torch.bool, device=rest_KN.device)
    roots_K = diagonal(upper_KK)
    if upper_KK.dim() == 1:
        if choose is not None and mask_KN is not None:
            costs_KN = (rest_KN / roots_K.unsqueeze(1)).square()
            for start in range(0, len(rest_KN), run_length):
                mask_KN[start : start + run_length] = choose(costs_KN[start : start + run_length], start)
            rest_KN *= mask_KN
        group = rounding.group or len(rest_KN)
        for start in range(0, len(rest_KN), group):
            rounding.begin(rest_KN[start:], start)
            rest_KN[start : start + group] = rounding.nearest(rest_KN[start : start + group])
        return rest_KN.T, None if mask_KN is None else mask_KN.T
    for start in range(0, len(rest_KN), run_length):
        run = slice(start, min(start + run_length, len(rest_KN)))
        part_JN, errors_JN = rest_KN[run], torch.empty_like(rest_KN[run])
        if choose is not None and mask_KN is not None:
            mask_KN[run] = choose(part_JN.square() / roots_K[run].square().unsqueeze(1), start)
        for first in range(0, len(part_JN), SHORT):
            last = min(first + SHORT, len(part_JN))
            for place in range(first, last):
                row_K = upper_KK[start + place]
                if rounding.group is not None and (start + place) % rounding.group == 0:
                    left = slice(start + place, run.stop)
                    rounding.begin(part_JN[place:] if mask_KN is None else part_JN[place:] * mask_KN[left], left.start)
                found_N = rounding.nearest(part_JN[place])
                if mask_KN is not None:
                    found_N = found_N * mask_KN[start + place]
                torch.sub(part_JN[place], found_N, out=errors_JN[place])
                errors_JN[place] /= row_K[start + place]
                part_JN[place] = found_N
                behind = slice(start + place + 1, start + last)
                part_JN[place + 1 : last].addr_(row_K[behind], errors_JN[place], alpha=-1)
            answered = upper_KK[start + first : start + last, start + last : run.stop]
            part_JN[last:].addmm_(answered.T, errors_JN[first:last], alpha=-1)
        rest_KN[run.stop :].addmm_(upper_KK[run, run.stop :].T, errors_JN, alpha=-1)
    return rest_KN.T, None if mask_KN is None else mask_KN.T
