"""Columns rounded to a value format, whether its entries are coded each for itself or together.

Shape legend: N stored rows, K stored columns, J columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fips.formats.trellis import Trellis
from fips.formats.values import Values
from fips.kernels import cpu
from fips.solve.rounding import in_steps

__all__ = ["codes_of", "rounded", "searches_fast"]

MOST_WEIGHT = 200.0
"""Of a row beside the mean of all, so that the integers of the search can tell costs apart."""


def rounded(values: Values, wanted: Tensor, weight_N: Tensor) -> Tensor:
    """Numbers of the grid for columns (..., N) in units of their steps.

    Where entries are coded each for itself, the nearest; else those of the way through the rows with the least squared
    error, rows weighted.
    """
    if not isinstance(values, Trellis):
        return values.nearest(wanted)
    mean = weight_N.mean()
    relative_N = (weight_N / torch.where(mean > 0, mean, 1.0)).clamp_max(MOST_WEIGHT)
    wanted_JN = wanted.reshape(-1, wanted.shape[-1])
    _, found_JN = _search(values, wanted_JN, relative_N.expand_as(wanted_JN))
    return found_JN.to(wanted.dtype).reshape(wanted.shape)


def codes_of(values: Values, found_NK: Tensor, steps_NK: Tensor) -> Tensor:
    """Codes (int8) of numbers of the grid times steps (N, K), or (N, 1). Where a step is 0 the number is not known, and
    any code will do that the others can follow."""
    numbers_NK = in_steps(found_NK, steps_NK)
    if not isinstance(values, Trellis):
        return values.encode(values.nearest(numbers_NK))
    codes_KN, _ = _search(values, numbers_NK.T, (steps_NK > 0).to(numbers_NK.dtype).expand_as(numbers_NK).T)
    return codes_KN.T.contiguous()


def _search(values: Trellis, wanted_JN: Tensor, weight_JN: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and their numbers."""
    if not searches_fast():
        codes_JN = values.search(wanted_JN, weight_JN)
        return codes_JN, values.decode(codes_JN.T).T
    on_cpu = [one.to("cpu", torch.float32).contiguous() for one in (wanted_JN, weight_JN)]
    codes_JN, found_JN = cpu.search_paths(values, *on_cpu)
    return codes_JN.to(wanted_JN.device), found_JN.to(wanted_JN.device)


def searches_fast() -> bool:
    """Whether the search is there in compiled code; in torch it takes a hundred times as long."""
    return cpu.available()
