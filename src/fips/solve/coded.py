"""Columns rounded to a value format, whether its entries are coded each for itself or together.

Shape legend: N stored rows, J columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fips.formats.trellis import Trellis
from fips.formats.values import Values
from fips.kernels import cpu

__all__ = ["relative", "rounded", "searches_fast", "slow_because"]

MOST_WEIGHT = 200.0
"""Of a row beside the mean of all, so that the integers of the search can tell costs apart."""


def relative(weight_N: Tensor) -> Tensor:
    """Weights of rows beside their mean, for ``rounded``; those of all rows may be 0."""
    mean = weight_N.mean()
    return (weight_N / torch.where(mean > 0, mean, 1.0)).clamp_max(MOST_WEIGHT)


def rounded(values: Values, wanted: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor | None]:
    """Numbers of the grid for columns (..., N) in units of their steps, and their codes (int8) where those are found
    together.

    Where entries are coded each for itself, the nearest; else those of the way through the rows with the least squared
    error, rows weighted as ``relative`` has made them. Codes of rows that weigh nothing, their step being 0, are any
    that the others can follow.
    """
    if not isinstance(values, Trellis):
        return values.nearest(wanted), None
    wanted_JN = wanted.reshape(-1, wanted.shape[-1])
    codes_JN, found_JN = _search(values, wanted_JN, weight_N.expand_as(wanted_JN))
    return found_JN.to(wanted.dtype).reshape(wanted.shape), codes_JN.reshape(wanted.shape)


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


def slow_because() -> str:
    """Why it is not there, in words; empty if it is."""
    return cpu.unavailable_reason()
