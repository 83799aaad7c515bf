r"""Fewer bits for all weights: rounding with error feedback.

All entries of a group get as many bits as its bytes allow, 2 to 8, on a grid with a step per output, or per group of
inputs of every output.

Reference: Frantar et al., GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from fips.config import InputsConfig
from fips.errors import BudgetError
from fips.formats.patterns import FULL
from fips.formats.values import Values, integers
from fips.methods.layerwise import MatrixMethod, StoredMatrix
from fips.methods.registry import register
from fips.methods.workbench import Needs
from fips.models import LayerGroup
from fips.plan.footprint import itemsize
from fips.plan.groups import GroupPlan, byte_target
from fips.plan.least import BYTES_PER_BIT, EPS
from fips.solve.feedback import inverse_root, with_feedback
from fips.solve.grids import grid_for
from fips.solve.moments import usable_moment

__all__ = ["Gptq", "GptqConfig", "gptq", "widest_that_fit"]

V = TypeVar("V", bound=Values)


DAMPING = 0.01
"""Added to the moment, relative to its mean diagonal, as in the paper."""


class GptqConfig(InputsConfig):
    """The width of the integers follows from `bits`."""

    packs_ends: ClassVar[bool] = True
    method: Literal["gptq"] = "gptq"
    scale_group: Literal["auto", "row", 128, 64, 32, 16] = "auto"
    """Weights along a row under one scale; `row`: all of them; `auto`: the fewest of 32, 64, 128 that fit beside the
    widest integers."""

    def check(self) -> None:
        if self.budget is not None:
            raise ValueError("`method: gptq` keeps all parameters in fewer bits: give `bits`, not `budget`")

    @property
    def has_integers(self) -> bool:
        return True


@register
class Gptq(MatrixMethod[GptqConfig]):
    settings = GptqConfig
    needs = Needs.INPUTS

    def smallest_size(self, group: LayerGroup, dtype: torch.dtype) -> float:
        """2 bits for every entry."""
        size, shapes = group.width * group.hidden, _shapes(group)
        least = min(size / 4 + _scale_bytes(shapes, values, dtype) for values in self._choices(2))
        return least / (BYTES_PER_BIT * size)

    def store(self, weight_OI: Tensor, moment_II: Tensor | None, plan: GroupPlan) -> StoredMatrix:
        assert moment_II is not None
        values = self._values(plan)
        codes_OI, steps_O, group_steps = gptq(weight_OI, moment_II, values=values, dtype=plan.dtype)
        mask_OI = torch.ones_like(codes_OI, dtype=torch.bool)
        return StoredMatrix(codes_OI, mask_OI, FULL, values.name, steps_O, group_steps)

    def _values(self, plan: GroupPlan) -> Values:
        return widest_that_fit(plan, byte_target(plan.group, self.config), self._choices)

    def _choices(self, bits: int) -> list[Values]:
        if self.config.scale_group != "auto":
            group = self.config.scale_group
            return [integers(bits, None if group == "row" else group)]
        return [integers(bits, group) for group in (32, 64, 128, None)]


def widest_that_fit(plan: GroupPlan, target: float, choices: Callable[[int], Sequence[V]]) -> V:
    """Of the value formats of 8 bits, 7 and so on, the finest scales first, the first whose bytes are no more than a
    target. Raises ``BudgetError`` if not even 2 bits are."""
    size, shapes = plan.group.width * plan.group.hidden, _shapes(plan.group)
    for bits in range(8, 1, -1):
        for values in choices(bits):
            if size * bits / 8 + _scale_bytes(shapes, values, plan.dtype) <= target * (1 + EPS):
                return values
    raise BudgetError(f"{target:.0f} bytes are less than 2 bits for each of {size} entries; ask for more bytes")


def _shapes(group: LayerGroup) -> Counter[tuple[int, int]]:
    """Outputs and inputs of the layers of a group, which may be a thousand experts of one shape."""
    return Counter((site.outputs, site.inputs) for site in group.sites)


def _scale_bytes(shapes: Mapping[tuple[int, int], int], values: Values, dtype: torch.dtype) -> float:
    item = itemsize(dtype)
    return sum(count * values.scale_bytes(rows, cols, item) for (rows, cols), count in shapes.items())


def gptq(
    weight_OI: Tensor, moment_II: Tensor, *, values: Values, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (int8), the step of every row in ``dtype``, and the group steps where the format has them.

    Steps are those of the least plain squared error of each row or group, as in implementations that search them.
    """
    grid = grid_for(values, weight_OI, torch.ones_like(weight_OI[0]), dtype)
    found_OI, _ = with_feedback(weight_OI, inverse_root(usable_moment(moment_II), DAMPING), grid)
    return grid.stored(found_OI)
