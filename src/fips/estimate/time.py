r"""How many floating-point operations a compression block by block takes, and how long they would last here.

Forward passes, the products of the moments and the backward passes of a few examples are counted as torch sees them,
on the meta device. Of a layer with I inputs and O outputs the solver takes :math:`\frac{4}{3} I^3` for every root of a
moment (two Cholesky factorisations and an inverse), and :math:`3 R I^2` to round R rows with error feedback and to
tell what is left; R is O, and for every structure tried the sample of rows. Where rounded matrices are made better in s
sweeps that are :math:`2 (1 + s) O I^2` in products. The three run at very different speeds, which ``Speed.measured``
looks at on matrices of moderate size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fips.calibration.inputs import CalibrationData
from fips.calibration.precision import resolve_precision
from fips.config import CompressionConfig
from fips.estimate.memory import Answers, on_meta
from fips.methods.registry import method_of
from fips.methods.sweep import blocks_of, bytes_beside
from fips.methods.workbench import Needs, Workbench
from fips.models.experts import experts_apart
from fips.plan.plan import CompressionPlan
from fips.solve.feedback import Rounding, inverse_root, with_feedback

__all__ = ["Operations", "Speed", "operations", "timed_dtype"]

log = logging.getLogger(__name__)

SIZE, ROWS = 1024, 512
"""Of the matrices that are timed."""


@dataclass(frozen=True, slots=True)
class Operations:
    """Floating-point operations by the speed they run at, a multiplication with its addition counted as two."""

    products: float
    """Forward and backward passes, moments, and sweeps over rounded matrices."""
    roots: float
    rounding: float

    @property
    def total(self) -> float:
        return self.products + self.roots + self.rounding


@dataclass(frozen=True, slots=True)
class Speed:
    """Operations per second of a device."""

    products: float
    roots: float
    rounding: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype = torch.float32) -> Speed:
        """Within about a second; ``dtype`` is that of forward passes."""
        generator = torch.Generator().manual_seed(0)
        square = torch.randn(SIZE, SIZE, generator=generator).to(device)
        moment = square @ square.T / SIZE
        upper = inverse_root(moment, 0.01)
        typed, rows = square.to(dtype), square[:ROWS]
        return cls(
            2 * SIZE**3 / _seconds(lambda: typed @ typed, device),
            root_operations(SIZE) / _seconds(lambda: inverse_root(moment, 0.01), device),
            rounding_operations(ROWS, SIZE) / _seconds(lambda: _round(rows, upper, moment), device),
        )

    def seconds(self, work: Operations) -> float:
        """How long the work would last, data and files left out."""
        return work.products / self.products + work.roots / self.roots + work.rounding / self.rounding


def root_operations(inputs: int) -> float:
    return 4 / 3 * inputs**3


def rounding_operations(rows: int, inputs: int) -> float:
    return 3 * rows * inputs**2


def _product(_: Sequence[int], left: Sequence[int], right: Sequence[int], **__: Any) -> int:
    """Of a product that is added in place, from the shapes: torch counts it only where it makes a new tensor."""
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: _product}
"""What moments are summed with."""


def operations(
    model: nn.Module,
    plan: CompressionPlan,
    config: CompressionConfig,
    examples: Callable[[int], Any],
    *,
    count: int,
    device: torch.device,
) -> Operations | None:
    """Of compressing a model, given on the meta device, with ``count`` examples; ``examples`` makes up so many there.

    None where it cannot be told: methods that do not go block by block, code that looks at numbers.
    """
    method = method_of(config)
    if not method.by_block:
        return None
    twin = on_meta(model)
    groups = [group.group for group in plan.groups]
    blocks = blocks_of(plan)
    passes = 2 if method.holds_out and bytes_beside(blocks, method.moment_memory) is None else 1

    def products_of(work: Callable[[Workbench], Any]) -> float:
        """Operations that one example more takes."""
        found = []
        for batch in (examples(1), examples(2)):
            data = CalibrationData(twin, [batch], seed=config.seed)
            bench = Workbench(twin, config, data, torch.device("meta"), method.needs, influence_examples=2)
            with Answers(), FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:  # type: ignore[no-untyped-call]
                work(bench)
            found.append(counter.get_total_flops())
        return float(found[1] - found[0])

    products = 0.0
    try:
        with experts_apart(twin):
            if Needs.INPUTS in method.needs:
                products += passes * count * products_of(lambda bench: bench.input_moments("time", groups))
            if Needs.INFLUENCE in method.needs:
                examined = min(count, method.influence_examples)
                products += examined * products_of(lambda bench: bench.shared_influence(groups))
    except Exception as error:
        log.debug("operations of %s cannot be counted: %s", type(model).__name__, error)
        return None
    roots = rounding = 0.0
    if Needs.INPUTS in method.needs:
        sites = [site for group in groups for site in group.sites]
        for site in sites:
            roots += (1 + method.holds_out) * root_operations(site.inputs)
            rounding += rounding_operations(site.outputs + method.tried_rows, site.inputs)
            if method.sweeps:
                products += 2 * (1 + method.sweeps) * site.outputs * site.inputs**2
    return Operations(products, roots, rounding)


def timed_dtype(config: CompressionConfig, model: nn.Module, device: torch.device) -> torch.dtype:
    """In which forward passes run."""
    found: torch.dtype = getattr(torch, resolve_precision(config.precision, model, device))
    return found


class _Thirds(Rounding):
    def nearest(self, columns: torch.Tensor) -> torch.Tensor:
        return (columns * 3).round().clamp(-7, 7) / 3


def _round(rows_NK: torch.Tensor, upper_KK: torch.Tensor, moment_KK: torch.Tensor) -> float:
    found_NK, _ = with_feedback(rows_NK, upper_KK, _Thirds())
    error_NK = rows_NK - found_NK
    return float((error_NK @ moment_KK * error_NK).sum())


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Median of three runs after one that warms up."""
    taken = []
    for _ in range(4):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
    return median(taken[1:])
