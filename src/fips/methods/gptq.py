r"""Fewer bits for all weights: rounding with error feedback.

All entries of a group get as many bits as its bytes allow, 2 to 8, on a grid with one step per output.

Reference: Frantar et al., GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

from typing import Literal

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
from fips.solve.moments import usable_moment
from fips.solve.rounding import row_steps

__all__ = ["Gptq", "GptqConfig", "gptq"]


DAMPING = 0.01
"""Added to the moment, relative to its mean diagonal, as in the paper."""


class GptqConfig(InputsConfig):
    """The width of the integers follows from `bits`."""

    method: Literal["gptq"] = "gptq"

    def check(self) -> None:
        if self.bits is None:
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
        size = group.width * group.hidden
        return (size / 4 + _scale_bytes(group, dtype)) / (BYTES_PER_BIT * size)

    def store(self, weight_OI: Tensor, moment_II: Tensor | None, plan: GroupPlan) -> StoredMatrix:
        assert moment_II is not None
        values = integers(self._bits(plan))
        integers_OI, steps_O = gptq(weight_OI, moment_II, values=values, dtype=plan.dtype)
        mask_OI = torch.ones_like(integers_OI, dtype=torch.bool)
        return StoredMatrix(integers_OI, mask_OI, FULL, values.name, steps_O)

    def _bits(self, plan: GroupPlan) -> int:
        size = plan.group.width * plan.group.hidden
        allowed = byte_target(plan.group, self.config) - _scale_bytes(plan.group, plan.dtype)
        bits = min(int(8 * allowed / size + EPS), 8)
        if bits < 2:
            raise BudgetError(
                f"{allowed:.0f} bytes are less than 2 bits for each of {size} entries; ask for more bytes"
            )
        return bits


def _scale_bytes(group: LayerGroup, dtype: torch.dtype) -> int:
    return sum(site.outputs for site in group.sites) * itemsize(dtype)


def gptq(weight_OI: Tensor, moment_II: Tensor, *, values: Values, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Integers (int8) and the step of every row in ``dtype``.

    Steps are those of the least plain squared error of each row, as in implementations that search them.
    """
    steps_O = row_steps(weight_OI, torch.ones_like(weight_OI[0]), values=values).to(dtype)
    wide_O = steps_O.float()
    inverse_O = torch.where(wide_O == 0, 0.0, 1 / wide_O)
    found_OI, _ = with_feedback(
        weight_OI,
        inverse_root(usable_moment(moment_II), DAMPING),
        lambda column_O: values.nearest(column_O * inverse_O) * wide_O,
    )
    return values.encode(values.nearest(found_OI * inverse_O.unsqueeze(1))), steps_O
