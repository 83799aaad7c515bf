r"""What the field runs at 2 to 8 bits, to compare with: plain rounding, GPTQ and AWQ on grids with zero points.

Each is a method like those of fips, entered by importing this module: `rtn`, `field-gptq`, `awq`. All keep every weight
as an unsigned integer with a scale and a zero point per 128, 64 or 32 weights, the finest that fit:
:math:`(q - z)\, s`. Both are found by a search over clipped ranges that leaves the least squared error, columns
weighted by their moments, as the better implementations do. Stored are 8 bits a scale, beside one per row, and as many
bits a zero point as a weight has; the usual files take 16 bits a scale, so sizes here flatter these methods a little.

* `field-gptq` rounds the columns in the order of their power (act-order), with scales and zero points of groups
  fixed beforehand from the original weights (static groups), damping 1 % (arXiv 2210.17323).
* `awq` multiplies column k by :math:`(E x_k^2)^{\alpha / 2}` and rounds plainly, with the alpha of 0, 0.05 ... 1 that
  leaves the least error of the outputs (arXiv 2306.00978). The field folds these factors into the layer before, so
  they are stored here and not counted.

Shape legend: N rows (outputs), K columns (inputs), G groups of columns, J columns of a group.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from fips.config import InputsConfig
from fips.formats.patterns import FULL
from fips.formats.values import VALUES, Values, pack_integers, packed_length, unpack_integers, values_named
from fips.methods.gptq import DAMPING, widest_that_fit
from fips.methods.layerwise import MatrixMethod, StoredMatrix
from fips.methods.registry import register
from fips.methods.workbench import Needs
from fips.models import LayerGroup
from fips.plan.footprint import itemsize
from fips.plan.groups import GroupPlan, byte_target
from fips.plan.least import BYTES_PER_BIT
from fips.solve.feedback import Rounding, inverse_root, with_feedback
from fips.solve.moments import usable_moment

GROUPS = (32, 64, 128)
RATIOS = tuple(1.0 - 0.05 * index for index in range(13))
"""Clipped ranges tried, relative to the whole one."""
ALPHAS = tuple(0.05 * index for index in range(21))


@VALUES.register
class ZeroPoints(Values):
    """Unsigned integers with a scale and a zero point per group; with ``c`` a factor per column beside them."""

    known: ClassVar[tuple[str, ...]] = ("uintBgG and uintBgGc",)
    plain = False
    bits: int
    scale_group: int

    def __init__(self, name: str, bits: int, group: int, *, columns: bool) -> None:
        super().__init__(name)
        self.bits, self.scale_group, self.columns = bits, group, columns
        self.half = 1 << (bits - 1)
        self.largest = 2 * self.half - 1
        self.rounding_error = 0.3 * 4.0**-bits

    @classmethod
    def parse(cls, name: str) -> Self | None:
        found = re.fullmatch(r"uint([2-8])g(32|64|128)(c?)", name)
        return None if found is None else cls(name, int(found[1]), int(found[2]), columns=bool(found[3]))

    def num_scales_of(self, rows: int, cols: int) -> tuple[int, int]:
        groups = rows * -(-cols // self.scale_group)
        return rows + cols * self.columns, groups + packed_length(groups, self.bits)

    def scale_bytes(self, rows: int, cols: int, itemsize: float) -> float:
        scales, groups = self.num_scales_of(rows, cols)
        return (scales - cols * self.columns) * itemsize + groups

    def stored(self, steps_NG: Tensor, zeros_NG: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """``(scales_N, bytes, steps_NG)``: the tensors of the file, and the steps as they will be read."""
        scales_N, group_scales = self.stored_scales(steps_NG, dtype)
        assert group_scales is not None
        packed = pack_integers((zeros_NG - self.half).to(torch.int8).flatten(), bits=self.bits).view(torch.uint8)
        steps_NG = group_scales.view_as(steps_NG).float() * scales_N.float().unsqueeze(1)
        return scales_N, torch.cat([group_scales, packed]), steps_NG

    def scales_of(
        self, rows: slice, count: int, scales: Tensor, group_scales: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        assert group_scales is not None
        steps_NG = group_scales[: len(group_scales) * 8 // (8 + self.bits)].view(count, -1)
        packed = group_scales[steps_NG.numel() :].view(torch.int8 if self.bits == 8 else torch.uint8)
        zeros_NG = unpack_integers(packed, bits=self.bits, count=steps_NG.numel()).view(count, -1)
        again = pack_integers(zeros_NG[rows].flatten(), bits=self.bits).view(torch.uint8)
        return torch.cat([scales[:count][rows], scales[count:]]), torch.cat([steps_NG[rows].flatten(), again])

    def dequantize(self, codes: Tensor, scales: Tensor, group_scales: Tensor | None = None) -> Tensor:
        rows, cols = codes.shape
        assert group_scales is not None
        groups = -(-cols // self.scale_group)
        wide = scales.float()
        steps_NG = group_scales[: rows * groups].view(rows, groups).float() * wide[:rows].unsqueeze(1)
        packed = group_scales[rows * groups :].view(torch.int8 if self.bits == 8 else torch.uint8)
        zeros_NG = unpack_integers(packed, bits=self.bits, count=rows * groups).view(rows, groups)
        spread = [part.repeat_interleave(self.scale_group, 1)[:, :cols] for part in (zeros_NG.float(), steps_NG)]
        found = (codes.float() - spread[0]) * spread[1]
        return found * wide[rows:] if self.columns else found


def ranges(matrix_NK: Tensor, weight_K: Tensor, values: ZeroPoints) -> tuple[Tensor, Tensor]:
    """``(steps_NG, zeros_NG)`` of the clipped ranges with the least weighted squared error."""
    groups, weights = values.in_groups(matrix_NK), values.in_groups(weight_K.unsqueeze(0))
    high, low = (groups.amax(2, keepdim=True).clamp_min(0), groups.amin(2, keepdim=True).clamp_max(0))
    best = torch.full_like(high, torch.inf)
    steps, zeros = torch.zeros_like(high), torch.zeros_like(high)
    for ratio in RATIOS:
        step = ((high - low) * (ratio / values.largest)).clamp_min(1e-12)
        zero = (-low * ratio / step).round().clamp(0, values.largest)
        found = ((groups / step).round() + zero).clamp(0, values.largest)
        loss = (((found - zero) * step - groups).square() * weights).sum(2, keepdim=True)
        better = loss < best
        best, steps, zeros = (torch.where(better, *pair) for pair in ((loss, best), (step, steps), (zero, zeros)))
    return steps.squeeze(2), zeros.squeeze(2)


class _Columns(Rounding):
    """Column after column in some order, each on the grid of its group."""

    group = 1

    def __init__(self, values: ZeroPoints, steps_NG: Tensor, zeros_NG: Tensor, order_K: Tensor) -> None:
        self.values, self.steps_NG, self.zeros_NG, self.order_K = values, steps_NG, zeros_NG, order_K

    def begin(self, rest_JN: Tensor, start: int) -> None:
        place = int(self.order_K[start]) // self.values.scale_group
        self.step_N, self.zero_N = self.steps_NG[:, place], self.zeros_NG[:, place]

    def nearest(self, columns: Tensor) -> Tensor:
        codes = torch.where(self.step_N == 0, 0.0, columns / self.step_N).round() + self.zero_N
        return (codes.clamp(0, self.values.largest) - self.zero_N) * self.step_N


class FieldConfig(InputsConfig):
    """The width of the integers and the groups follow from `bits`."""

    packs_ends: ClassVar[bool] = True  # only to be merged: rows with zero points are not looked up

    def check(self) -> None:
        if self.budget is not None:
            raise ValueError(f"`method: {self.method}` keeps all parameters in fewer bits: give `bits`, not `budget`")

    @property
    def has_integers(self) -> bool:
        return True


class _FieldMethod(MatrixMethod[Any]):
    needs = Needs.INPUTS
    ending = ""

    def smallest_size(self, group: LayerGroup, dtype: torch.dtype) -> float:
        size = group.width * group.hidden
        least = min(size / 4 + _scale_bytes(group, values, dtype) for values in self._choices(2))
        return least / (BYTES_PER_BIT * size)

    def _choices(self, bits: int) -> list[ZeroPoints]:
        found = [values_named(f"uint{bits}g{group}{self.ending}") for group in GROUPS]
        return [one for one in found if isinstance(one, ZeroPoints)]

    def _values(self, plan: GroupPlan) -> ZeroPoints:
        return widest_that_fit(plan, byte_target(plan.group, self.config), self._choices)

    def _stored(
        self, found_NK: Tensor, values: ZeroPoints, steps_NG: Tensor, zeros_NG: Tensor, scales: Tensor, groups: Tensor
    ) -> StoredMatrix:
        spread = [
            part.repeat_interleave(values.scale_group, 1)[:, : found_NK.shape[1]] for part in (steps_NG, zeros_NG)
        ]
        codes = torch.where(spread[0] == 0, 0.0, found_NK / spread[0]).round() + spread[1]
        codes_NK = (codes.clamp(0, values.largest) - values.half).to(torch.int8)
        return StoredMatrix(codes_NK, torch.ones_like(codes_NK, dtype=torch.bool), FULL, values.name, scales, groups)


class RtnConfig(FieldConfig):
    method: Literal["rtn"] = "rtn"


@register
class Rtn(_FieldMethod):
    """Every weight to the nearest number of its grid."""

    settings = RtnConfig

    def store(self, weight_OI: Tensor, moment_II: Tensor | None, plan: GroupPlan) -> StoredMatrix:
        values = self._values(plan)
        steps_NG, zeros_NG = ranges(weight_OI, torch.ones_like(weight_OI[0]), values)
        scales_N, groups, steps_NG = values.stored(steps_NG, zeros_NG, plan.dtype)
        return self._stored(weight_OI, values, steps_NG, zeros_NG, scales_N, groups)


class FieldGptqConfig(FieldConfig):
    method: Literal["field-gptq"] = "field-gptq"
    act_order: bool = True
    """Columns of much power first."""


@register
class FieldGptq(_FieldMethod):
    settings = FieldGptqConfig

    def store(self, weight_OI: Tensor, moment_II: Tensor | None, plan: GroupPlan) -> StoredMatrix:
        assert moment_II is not None
        values, moment_KK = self._values(plan), usable_moment(moment_II)
        power_K = moment_KK.diagonal()
        steps_NG, zeros_NG = ranges(weight_OI, power_K, values)
        scales_N, groups, steps_NG = values.stored(steps_NG, zeros_NG, plan.dtype)
        order_K = power_K.argsort(descending=True) if self.config.act_order else torch.arange(len(power_K))
        upper_KK = inverse_root(moment_KK[order_K][:, order_K], DAMPING)
        rounding = _Columns(values, steps_NG, zeros_NG, order_K)
        found_NK = torch.empty_like(weight_OI)
        found_NK[:, order_K] = with_feedback(weight_OI[:, order_K], upper_KK, rounding)[0]
        return self._stored(found_NK, values, steps_NG, zeros_NG, scales_N, groups)


class AwqConfig(FieldConfig):
    method: Literal["awq"] = "awq"


@register
class Awq(_FieldMethod):
    settings = AwqConfig
    ending = "c"

    def store(self, weight_OI: Tensor, moment_II: Tensor | None, plan: GroupPlan) -> StoredMatrix:
        assert moment_II is not None
        values, moment_KK = self._values(plan), usable_moment(moment_II)
        power_K = moment_KK.diagonal().clamp_min(1e-12)
        best: tuple[float, StoredMatrix] | None = None
        for alpha in ALPHAS:
            factor_K = power_K.pow(alpha / 2)
            factor_K = factor_K / (factor_K.max() * factor_K.min()).sqrt()
            inverse_K = (1 / factor_K).to(plan.dtype)  # as it is stored
            scaled_NK = weight_OI / inverse_K.float()
            steps_NG, zeros_NG = ranges(scaled_NK, power_K * inverse_K.float().square(), values)
            scales_N, groups, steps_NG = values.stored(steps_NG, zeros_NG, plan.dtype)
            found = self._stored(scaled_NK, values, steps_NG, zeros_NG, torch.cat([scales_N, inverse_K]), groups)
            assert found.steps_O is not None
            error_NK = values.dequantize(found.entries_OI, found.steps_O, found.group_scales) - weight_OI
            loss = float(((error_NK @ moment_KK) * error_NK).sum())
            if best is None or loss < best[0]:
                best = loss, found
        assert best is not None
        return best[1]


def _scale_bytes(group: LayerGroup, values: Values, dtype: torch.dtype) -> float:
    return sum(values.scale_bytes(site.outputs, site.inputs, itemsize(dtype)) for site in group.sites)
