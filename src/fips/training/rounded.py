"""Numbers and steps of a grid while they are trained: rounded as they will be stored, gradients pass the rounding.

Reference: Bengio et al., arXiv 1308.3432 (straight-through estimator); Esser et al., arXiv 1902.08153 (trained steps).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fips.formats.values import Values

__all__ = ["INTEGER_RATE", "STEP_RATE", "rounded_numbers", "rounded_steps"]

INTEGER_RATE = 200.0
"""Learning rate of integers, in distances between neighbours of their grid, relative to that of free numbers: at 1e-4
at most a fiftieth of a step at a time, so that single gradients flip nothing; 0.1 was too much where it was tried."""
STEP_RATE = 30.0
"""Learning rate of a step, as a share of it, relative to that of free numbers."""


def rounded_numbers(wanted: Tensor, values: Values) -> Tensor:
    """The nearest numbers of a value format, in units of its steps, with the gradient of what is ``wanted``."""
    return _straight_through(wanted.clamp(-values.largest, values.largest), values.nearest)


def rounded_steps(wanted_N: Tensor, dtype: torch.dtype) -> Tensor:
    """The steps as their type has them, with the gradient of those that are wanted."""
    return _straight_through(wanted_N, lambda steps_N: steps_N.to(dtype).to(steps_N.dtype))


def _straight_through(wanted: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``change(wanted)`` with the gradient of ``wanted``."""
    return wanted + (change(wanted.detach()) - wanted.detach())
