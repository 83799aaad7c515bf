"""Fewer bits for all weights: rounding with error feedback (GPTQ).

Takes a weight as a linear layer has it, (O, I), and returns it on a grid with one step per output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fips.formats.values import Values
from fips.solve.moments import usable_moment
from fips.solve.rounding import round_rows, row_steps

__all__ = ["gptq"]


def gptq(weight_OI: Tensor, moment_II: Tensor, *, values: Values, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rounded weight and its steps, these in ``dtype``. Reference: Frantar et al., arXiv 2210.17323.

    Steps are those of the least plain squared error of each row, as in implementations that search them.
    """
    moment_II = usable_moment(moment_II)
    ones_I = torch.ones_like(weight_OI[0])
    steps_O = row_steps(weight_OI, ones_I, values=values).to(dtype)
    scale_I = moment_II.diagonal().clamp_min(1e-6 * float(moment_II.diagonal().mean())).sqrt()
    metric_II = moment_II / torch.outer(scale_I, scale_I)
    kept_OI = torch.ones_like(weight_OI, dtype=torch.bool)
    integers_OI, _ = round_rows(weight_OI, kept_OI, metric_II, scale_I, steps_O.float(), values=values)
    return integers_OI * steps_O.float().unsqueeze(1), steps_O
