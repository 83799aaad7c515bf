"""A rounded matrix made better in place: every change is the best one, and what comes out is what is stored."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fips.formats.values import Values, values_named
from fips.solve.descent import descend
from fips.solve.feedback import inverse_root, with_feedback
from fips.solve.grids import GridRounding, Stored, grid_for

DAMPING = 0.02
FORMATS = ["nl3g64", "nl4", "int4g32", "int3", "nl2g128", "int8"]


def problem(values: Values, *, rows: int = 12, columns: int = 144) -> tuple[Tensor, Tensor, Stored]:
    """A matrix, a metric in which columns are correlated, and what one pass with error feedback leaves."""
    generator = torch.Generator().manual_seed(0)
    matrix_NK = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(200, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    metric_KK = inputs.T @ inputs / 200
    rounding = grid_for(values, matrix_NK, metric_KK.diagonal(), torch.bfloat16)
    found_NK, _ = with_feedback(matrix_NK, inverse_root(metric_KK, DAMPING), rounding)
    assert isinstance(rounding, GridRounding)
    return matrix_NK, metric_KK, rounding.stored(found_NK)


def loss(matrix_NK: Tensor, stored: Stored, values: Values, metric_KK: Tensor) -> Tensor:
    """Of every row, in float64."""
    damped_KK = metric_KK.double()
    damped_KK.diagonal().add_(DAMPING * damped_KK.diagonal().mean())
    error_NK = (matrix_NK - values.dequantize(*stored)).double()
    return ((error_NK @ damped_KK) * error_NK).sum(1)


@pytest.mark.parametrize("name", FORMATS)
def test_every_sweep_makes_the_loss_of_every_row_smaller(name: str) -> None:
    values = values_named(name)
    matrix_NK, metric_KK, start = problem(values)
    losses = [loss(matrix_NK, start, values, metric_KK)]
    for sweeps in (1, 2, 4):
        found = descend(matrix_NK, start, values, metric_KK, damping=DAMPING, sweeps=sweeps)
        losses.append(loss(matrix_NK, found, values, metric_KK))
    for before, after in pairwise(losses):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert float(losses[1].sum() / losses[0].sum()) < 0.97


@pytest.mark.parametrize("name", ["int3", "nl3g64"])
def test_at_the_end_no_other_code_of_a_single_entry_is_better(name: str) -> None:
    values = values_named(name)
    matrix_NK, metric_KK, start = problem(values, rows=4, columns=80)
    found = descend(matrix_NK, start, values, metric_KK, damping=DAMPING, sweeps=60)
    least = loss(matrix_NK, found, values, metric_KK)
    half = 1 << ((values.bits or 0) - 1)
    codes = range(-half, half) if values.levels else range(-half + 1, half)
    for column in range(80):
        for code in codes:
            other = found.codes_NK.clone()
            other[:, column] = code
            assert bool(
                (loss(matrix_NK, found._replace(codes_NK=other), values, metric_KK) >= least * (1 - 1e-5)).all()
            )


def test_entries_outside_the_mask_stay_zero_and_rows_of_zeros_too() -> None:
    values = values_named("int4")
    matrix_NK, metric_KK, start = problem(values)
    mask_NK = torch.rand(matrix_NK.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    steps_N = start.steps_N.clone()
    steps_N[3] = 0
    kept = Stored(start.codes_NK * mask_NK, steps_N, None)
    found = descend(matrix_NK, kept, values, metric_KK, damping=DAMPING, mask_NK=mask_NK)
    assert not bool(found.codes_NK[~mask_NK].any())
    assert not bool(values.dequantize(*found)[3].any())
    before, after = (loss(matrix_NK, one, values, metric_KK) for one in (kept, found))
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum() / before.sum()) < 0.9
