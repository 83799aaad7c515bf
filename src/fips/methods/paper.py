r"""The recipe of the paper: SVD start, magnitude sparsity, joint block-wise AdamW.

The matrices of a group side by side are factored as :math:`W \approx B C` with one basis B of a rank R and factors C of
a fixed sparsity s; both then follow from the size. Basis and factors are trained together, block outputs on the
original activations as the target, while the supports follow a schedule.

Reference: FiPS, arXiv 2411.09816.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fips.calibration.record import ActivationSpool
from fips.config import ReconstructionConfig, SparseConfig
from fips.errors import BudgetError
from fips.formats.patterns import BITMASK, FULL
from fips.methods.keeping import kept_group
from fips.methods.registry import Method, register
from fips.methods.workbench import CompressedGroup, Needs, Workbench, measured, pack_group
from fips.models import LayerGroup
from fips.plan.footprint import LayerStorage, factored_footprint, itemsize
from fips.plan.groups import GroupPlan, byte_target
from fips.plan.least import BYTES_PER_BIT, EPS
from fips.plan.plan import CompressionPlan
from fips.plan.planner import check_inputs
from fips.solve.patterns import num_kept
from fips.solve.svd import shared_svd
from fips.training.factors import TrainableGroup, swapped
from fips.training.reconstruct import BlockError, Records, reconstruct_

__all__ = ["Paper", "PaperConfig", "grow_rank", "rank_for_budget"]

DEFAULT_SPARSITY = 0.75


class PaperReconstructionConfig(ReconstructionConfig):
    """Block-wise reconstruction as in the paper."""

    steps: int = Field(default=600, ge=0)
    """Optimizer steps per group; 0 keeps the SVD, pruned."""
    learning_rate: float = Field(default=4e-4, gt=0)
    """Peak learning rate of AdamW."""


class PaperConfig(SparseConfig):
    """Sparsity, threshold, schedule and training; the rank follows from the size."""

    method: Literal["fips-paper"] = "fips-paper"
    sparsity: float | None = Field(default=None, ge=0, lt=1)
    """Fraction of zeros in the factors; default 1 - N/M when `pattern` is N:M, else 0.75."""
    threshold_scope: Literal["group", "layer"] = "group"
    """One magnitude threshold over all factors of a group, or one per layer."""
    schedule: Literal["static", "gmp", "rigl"] = "gmp"
    """How the support changes while training: not, by gradual magnitude pruning, or by prune-and-regrow."""
    growth_tau: float = Field(default=32.0, gt=0)
    """Rows added when the rank exceeds the width are copies of the first rows divided by this."""
    reconstruction: PaperReconstructionConfig = PaperReconstructionConfig()

    layers: Literal["mlp", "blocks", "all"] = "mlp"
    """As for other methods; the paper compresses MLPs."""

    recipe: ClassVar[str] = "paper"

    def check(self) -> None:
        super().check()
        if self.pattern == "auto" or (self.nm is None and self.format.name != BITMASK):
            raise ValueError(f"`pattern: {self.pattern}` needs `method: fips`, got `{self.method}`")
        if self.nm is not None and self.sparsity is not None and abs(self.sparsity - self.factor_sparsity) > 1e-9:
            raise ValueError(
                f"`sparsity` {self.sparsity} contradicts `pattern` {self.pattern!r} (sparsity "
                f"{self.factor_sparsity:g}); give only one of them"
            )

    @property
    def factor_sparsity(self) -> float:
        """The fraction of zeros the factors end with."""
        if self.nm is not None:
            return 1 - self.nm[0] / self.nm[1]
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity


@register
class Paper(Method[PaperConfig]):
    settings = PaperConfig
    needs = Needs.ACTIVATIONS

    @property
    def trains_blocks(self) -> bool:
        return self.config.reconstruction.steps > 0

    def check(self, group: LayerGroup) -> None:
        """Up layers sum along the rank, which is made to fit; down layers along their inputs."""
        for site in group.sites:
            if not site.role.reads_stream:
                check_inputs(site, self.config.format)

    def plan(self, blank: GroupPlan) -> GroupPlan:
        config, group = self.config, blank.group
        rank = self._rank(group, blank.dtype)
        fmt = config.format.name if config.factor_sparsity > 0 else FULL
        sizes = [rank * site.hidden for site in group.sites]
        if config.threshold_scope == "group":
            sizes = [sum(sizes)]
        kept = sum(num_kept(size=size, sparsity=config.factor_sparsity) for size in sizes)
        factored = factored_footprint(group, rank=rank, kept=kept, fmt=fmt, itemsize=itemsize(blank.dtype))
        return replace(blank, rank=rank, kept=kept, fmt=fmt, factored=factored)

    def smallest_size(self, group: LayerGroup, dtype: torch.dtype) -> float:
        """The smallest rank with an entry for every hidden feature."""
        if self.config.nm is not None:
            least = self.config.nm[1]
        else:
            least = math.ceil(1 / (1 - self.config.factor_sparsity) - EPS)
        if self.config.budget is not None:
            density = 1 - self.config.factor_sparsity
            return least * (group.width + density * group.hidden) / (group.width * group.hidden)
        return least * self._vector_bytes(group, dtype) / (BYTES_PER_BIT * group.width * group.hidden)

    def compress(self, bench: Workbench, plan: CompressionPlan) -> list[CompressedGroup]:
        """Every group on its own: record, factorize, train, pack."""
        return [kept_group(bench, group, partial(_compress_group, bench, group, self.config)) for group in plan.groups]

    def _vector_bytes(self, group: LayerGroup, dtype: torch.dtype) -> float:
        """What one vector of the basis takes, with the entries of the factors that belong to it."""
        config, item = self.config, itemsize(dtype)
        layout = config.format
        pattern = layout.group_bits / layout.group / 8 if config.factor_sparsity > 0 else 0.0
        return group.width * item + group.hidden * ((1 - config.factor_sparsity) * item + pattern)

    def _rank(self, group: LayerGroup, dtype: torch.dtype) -> int:
        config = self.config
        multiple = config.format.align
        budget = config.budget
        if budget is None:
            rank = int(byte_target(group, config) / self._vector_bytes(group, dtype)) // multiple * multiple
            budget = rank * (group.width + (1 - config.factor_sparsity) * group.hidden) / (group.width * group.hidden)
        return rank_for_budget(
            budget=budget, width=group.width, hidden=group.hidden, sparsity=config.factor_sparsity, multiple=multiple
        )


def grow_rank(
    basis_DR: Tensor, factors_RF: Sequence[Tensor], *, rank: int, tau: float = 32.0
) -> tuple[Tensor, list[Tensor]]:
    r"""Extend a factorization to a larger rank without changing its product.

    Zero columns are appended to the basis and copies of the first factor rows, divided by ``tau``, to the factors:
    :math:`B' = [B | 0]`, :math:`C' = [C; C_{:k} / \tau]`, so that :math:`B' C' = B C` and the new columns of B receive
    gradients from the first step. Rows are reused cyclically when more than R are added.

    The paper's tau is 32.
    """
    current = basis_DR.shape[1]
    extra = rank - current
    if extra <= 0:
        return basis_DR, list(factors_RF)
    rows = torch.arange(extra, device=basis_DR.device) % current
    grown_DR = torch.cat([basis_DR, basis_DR.new_zeros(basis_DR.shape[0], extra)], dim=1)
    return grown_DR, [torch.cat([factor_RF, factor_RF[rows] / tau]) for factor_RF in factors_RF]


def rank_for_budget(*, budget: float, width: int, hidden: int, sparsity: float, multiple: int = 1) -> int:
    r"""Largest rank whose basis and factors fit a budget.

    .. math:: R = \left\lfloor \frac{b\, D\, P}{D + (1 - s) P} \right\rfloor

    with budget ``b`` (fraction of the ``D P`` dense parameters), width ``D``, ``P`` hidden features of all
    matrices of the group together and sparsity ``s`` of the factors, rounded down to a ``multiple``. The rank may
    exceed ``D``.

    Raises ``BudgetError`` if not even ``multiple`` vectors fit.
    """
    cost = width + (1 - sparsity) * hidden
    rank = int(budget * width * hidden / cost + EPS) // multiple * multiple
    if rank < 1:
        least = multiple * cost / (width * hidden)
        vectors = "one basis vector" if multiple == 1 else f"{multiple} basis vectors"
        raise BudgetError(
            f"`budget` {budget:g} is below the cost of {vectors} in a group of width {width} and {hidden} hidden "
            f"features; the smallest budget for it is {math.ceil(least * 1e4) / 1e4:g}"
        )
    return rank


def _compress_group(bench: Workbench, plan: GroupPlan, config: PaperConfig) -> CompressedGroup:
    started = time.perf_counter()
    blocks, steps = bench.blocks(plan.group), config.reconstruction.steps
    with bench.recorded(plan.group) as (records, spool):
        group = _factorize(bench, plan, config)
        with swapped(bench.model, group.modules):
            start = measured(
                f"the block errors of group {plan.group.name} before training",
                lambda: _errors_of_start(bench, plan, group, records, spool),
            )
            losses = reconstruct_(
                group, blocks, records, spool, bench.device,
                lambda step, loss: bench.report("reconstruct", plan.group.name, step + 1, steps, loss),
            )  # fmt: skip
            if not losses:
                group.prune(config.factor_sparsity)
        storages = [LayerStorage(int(mask.sum()), plan.fmt) for mask in group.masks]
        bases, layers = pack_group(group.found(), group.sites, group.stored_biases(), plan, storages)
        final = measured(
            f"the block errors of group {plan.group.name}",
            lambda: bench.errors_with(plan.group, layers, records, spool),
        )
    return CompressedGroup(plan, bases, layers, start or (), final or (), tuple(losses), time.perf_counter() - started)


def _factorize(bench: Workbench, plan: GroupPlan, config: PaperConfig) -> TrainableGroup:
    """U and S V^T of all matrices side by side, grown beyond D where the budget allows."""
    sites = plan.group.sites
    basis_DR, factors_RF = shared_svd(bench.weights(sites), rank=plan.rank)
    basis_DR, factors_RF = grow_rank(basis_DR, factors_RF, rank=plan.rank, tau=config.growth_tau)
    biases = [bench.bias(site) for site in sites]
    return TrainableGroup(
        basis_DR, factors_RF, sites, biases, config, config.factor_sparsity, scope=config.threshold_scope
    )


def _errors_of_start(
    bench: Workbench, plan: GroupPlan, group: TrainableGroup, records: Records, spool: ActivationSpool
) -> tuple[BlockError, ...]:
    """The start pruned to the final sparsity at once; only masks change, and they are put back."""
    before = group.masks
    assert group.sparsity is not None
    try:
        group.set_masks(group.choose_masks(group.sparsity))
        return bench.errors_with(plan.group, {}, records, spool)
    finally:
        group.set_masks(before)
