"""The paper's recipe: SVD start, magnitude sparsity, joint block-wise AdamW. Reference: arXiv 2411.09816."""

from __future__ import annotations

import time

from fips.calibration.record import ActivationSpool
from fips.methods.workbench import CompressedGroup, Workbench, measured, pack_group
from fips.plan.footprint import LayerStorage
from fips.plan.plan import CompressionPlan, GroupPlan
from fips.solve.svd import grow_rank, shared_svd
from fips.training.factors import TrainableGroup, swapped
from fips.training.reconstruct import BlockError, Records, calibrate_

__all__ = ["compress_by_paper"]


def compress_by_paper(bench: Workbench, plan: CompressionPlan) -> list[CompressedGroup]:
    """Every group on its own: record, factorize, calibrate, pack."""
    return [_compress_group(bench, group) for group in plan.groups]


def _compress_group(bench: Workbench, plan: GroupPlan) -> CompressedGroup:
    started = time.perf_counter()
    blocks, steps = bench.blocks(plan.group), bench.config.calibration_steps
    with bench.recorded(plan.group) as (records, spool):
        group = _factorize(bench, plan)
        with swapped(bench.model, group.modules):
            start = measured(
                f"the block errors of group {plan.group.name} before training",
                lambda: _errors_of_start(bench, plan, group, records, spool),
            )
            losses = calibrate_(
                group, blocks, records, spool, bench.device,
                lambda step, loss: bench.report("calibrate", plan.group.name, step + 1, steps, loss),
            )  # fmt: skip
            if not losses:
                group.prune(bench.config.factor_sparsity)
        storages = [LayerStorage(int(mask.sum()), plan.fmt) for mask in group.masks]
        bases, layers = pack_group(group.found(), group.sites, group.biases, plan, storages)
        final = measured(
            f"the block errors of group {plan.group.name}",
            lambda: bench.errors_with(plan.group, layers, records, spool),
        )
    return CompressedGroup(plan, bases, layers, start or (), final or (), tuple(losses), time.perf_counter() - started)


def _factorize(bench: Workbench, plan: GroupPlan) -> TrainableGroup:
    """U and S V^T of all matrices side by side, grown beyond D where the budget allows."""
    sites = plan.group.sites
    basis_DR, factors_RF = shared_svd(bench.weights(sites), rank=plan.rank)
    basis_DR, factors_RF = grow_rank(basis_DR, factors_RF, rank=plan.rank, tau=bench.config.growth_tau)
    biases = [bench.bias(site) for site in sites]
    return TrainableGroup(basis_DR, factors_RF, sites, biases, bench.config, bench.config.factor_sparsity)


def _errors_of_start(
    bench: Workbench, plan: GroupPlan, group: TrainableGroup, records: Records, spool: ActivationSpool
) -> tuple[BlockError, ...]:
    """The start pruned to the final sparsity at once; only masks change, and they are put back."""
    before = group.masks
    try:
        group.set_masks(group.choose_masks(bench.config.factor_sparsity))
        return bench.errors_with(plan.group, {}, records, spool)
    finally:
        group.set_masks(before)
