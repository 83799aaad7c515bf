"""Columns rounded to a value format, whether its entries are coded each for itself or together.

Shape legend: N stored rows, J columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fips.formats.trellis import Trellis
from fips.formats.values import Values
from fips.kernels import cpu

__all__ = ["rounded", "searches_fast"]

MOST_WEIGHT = 200.0
"""Of a row beside the mean of all, so that the integers of the search can tell costs apart."""


def rounded(values: Values, wanted: Tensor, weight_N: Tensor) -> Tensor:
    """Numbers of the grid for columns (..., N) in units of their steps.

    Where entries are coded each for itself, the nearest; else those of the way through the rows with the least squared
    error, rows weighted.
    """
    if not isinstance(values, Trellis):
        return values.nearest(wanted)
    wanted_JN = wanted.reshape(-1, wanted.shape[-1])
    mean = weight_N.mean()
    relative_N = (weight_N / torch.where(mean > 0, mean, 1.0)).clamp_max(MOST_WEIGHT)
    weight_JN = relative_N.expand_as(wanted_JN)
    if not searches_fast():
        found_JN = values.decode(values.search(wanted_JN, weight_JN).T).T
        return found_JN.to(wanted.dtype).reshape(wanted.shape)
    on_cpu = [one.to("cpu", torch.float32).contiguous() for one in (wanted_JN, weight_JN)]
    _, found_JN = cpu.search_paths(values, *on_cpu)
    return found_JN.to(wanted).reshape(wanted.shape)


def searches_fast() -> bool:
    """Whether the search is there in compiled code; in torch it takes a hundred times as long."""
    return cpu.available()
