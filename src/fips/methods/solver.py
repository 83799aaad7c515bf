"""The default method: measure what an error costs, choose structure and size of every group, solve, train, pack."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fips.accounting import LayerStorage, itemsize
from fips.calibrate import BlockError, TrainableGroup, calibrate_, swapped
from fips.config import CompressionConfig
from fips.distill import distill_
from fips.methods.workbench import MAX_ERROR_BATCHES, CompressedGroup, Workbench, pack_group
from fips.plan import CompressionPlan, GroupPlan, solved_plan, target_bytes
from fips.solve.alternate import Factorization
from fips.solve.problems import LayerProblem
from fips.solve.reorder import neighbour_order
from fips.solve.search import Choice, GroupSearch, Point, Pricing, allocate
from fips.solve.supports import Reduction
from fips.statistics import LayerMoments, moment_bytes
from fips.storage.packing import BITMASK, DENSE, block_size, code_bits
from fips.structure import LinearSite

__all__ = ["compress_by_solver", "site_problem"]

N16 = ("2:16", "4:16", "8:16")


@dataclass(slots=True)
class _Solved:
    """A group between solving and packing."""

    plan: GroupPlan
    storages: list[LayerStorage]
    trainable: TrainableGroup
    start: tuple[BlockError, ...]
    losses: list[float]
    seconds: float


def compress_by_solver(bench: Workbench, plan: CompressionPlan) -> list[CompressedGroup]:
    """Solve all groups, train them together if asked to, pack them and measure what they lost."""
    solved = _solve_groups(bench, plan)
    if bench.config.distill.steps:
        blocks = [block for item in solved for block in bench.blocks(item.plan.group).values()]
        losses = distill_(
            bench.model, [item.trainable for item in solved], blocks, bench.batches, bench.config, bench.run,
            lambda step, loss: bench.report("distill", "all", step + 1, bench.config.distill.steps, loss),
        )  # fmt: skip
        for item in solved:
            item.losses += losses
    return [_finish(bench, item) for item in solved]


def _solve_groups(bench: Workbench, plan: CompressionPlan) -> list[_Solved]:
    """Every group with the structure and size that the measured errors ask for."""
    chunks = list(_chunks(plan.groups, bench.config.metric.memory))
    chosen, searches = _choose(bench, plan, chunks)
    found: list[_Solved] = []
    with ExitStack() as installed:
        for chunk in chunks:
            if not searches:
                moments = _measure(bench, chunk)
            for group in chunk:
                started = time.perf_counter()
                search = searches.pop(group.group.name, None) or _search(bench, group, moments)
                item = _solve(bench, group, search, *chosen[group.group.name])
                item.seconds = time.perf_counter() - started
                found.append(item)
                if bench.config.metric.propagate_errors:
                    installed.enter_context(swapped(bench.model, item.trainable.modules))
    return found


def _choose(
    bench: Workbench, plan: CompressionPlan, chunks: Sequence[Sequence[GroupPlan]]
) -> tuple[dict[str, tuple[Choice, float]], dict[str, _Search]]:
    """Structure and bytes of every group by name, and the searches where all of them are still in memory."""
    config = bench.config
    shares = [_share(group, config) for group in plan.groups]
    trials: list[list[Point]] = []
    searches: dict[str, _Search] = {}
    for chunk in chunks:
        moments = _measure(bench, chunk)
        searches.clear()
        for group in chunk:
            search = _search(bench, group, moments)
            with torch.autocast(bench.device.type, enabled=False):
                trials.append(search.search.trials(_choices(group, config), shares[len(trials)]))
            search.search.forget()
            searches[group.group.name] = search
            bench.report("solve", "trials", len(trials), len(plan.groups))
    names = [group.group.name for group in plan.groups]
    keep = len(chunks) == 1 and not config.metric.propagate_errors
    return dict(zip(names, allocate(trials, sum(shares)), strict=True)), searches if keep else {}


@dataclass(slots=True)
class _Search:
    """The search of one group with what is needed to go back from its columns to the model's."""

    search: GroupSearch
    moments: Mapping[str, LayerMoments]
    orders: list[Tensor]
    """For every site the original column at every place."""


def _search(bench: Workbench, plan: GroupPlan, moments: Mapping[str, LayerMoments]) -> _Search:
    config, sites = bench.config, plan.group.sites
    orders = [torch.arange(site.columns, device=bench.device) for site in sites]
    search = _group_search(bench, plan, moments, orders)
    block = block_size(config.resolved_pattern)
    if block > 1:
        with torch.autocast(bench.device.type, enabled=False):
            free = search.solve(Choice(False, "unstructured"), _share(plan, config))
        orders = _neighbours(plan, dict(zip([site.name for site in sites], free.masks_RF, strict=True)), block)
        search = _group_search(bench, plan, moments, orders)
    return _Search(search, moments, orders)


def _group_search(
    bench: Workbench, plan: GroupPlan, moments: Mapping[str, LayerMoments], orders: Sequence[Tensor]
) -> GroupSearch:
    config, sites = bench.config, plan.group.sites
    with torch.autocast(bench.device.type, enabled=False):
        problems = [
            site_problem(weight_DF.float()[:, order], site, moments[site.name], order)
            for weight_DF, site, order in zip(bench.weights(sites), sites, orders, strict=True)
        ]
    reductions: list[Reduction] = [0 if site.role == "up" else 1 for site in sites]
    codes = {
        pattern: code_bits(*nm) for pattern in (*N16, config.resolved_pattern) if (nm := Choice(False, pattern).nm)
    }
    return GroupSearch(problems, reductions, _pricing(plan, config), codes)


def site_problem(weight_DF: Tensor, site: LinearSite, moments: LayerMoments, order_F: Tensor) -> LayerProblem:
    """The error of one layer in the metric of the output, hidden neurons in the order given."""
    if site.role == "up":
        return LayerProblem(weight_DF, moments.inputs_DD, moments.gradients_OO[order_F][:, order_F])
    return LayerProblem(weight_DF, moments.gradients_OO, moments.inputs_DD[order_F][:, order_F])


def _neighbours(plan: GroupPlan, masks_RF: Mapping[str, Tensor], block: int) -> list[Tensor]:
    """One order per MLP, the same for all its matrices; the halves of a fused gate and up alike."""
    orders = []
    for mlp in plan.group.mlps:
        columns = min(site.columns for site in mlp.sites)
        halves = [half for site in mlp.sites for half in masks_RF[site.name].split(columns, dim=1)]
        order_F = neighbour_order(halves, size=block)
        orders += [torch.cat([order_F + start for start in range(0, site.columns, columns)]) for site in mlp.sites]
    return orders


def _solve(bench: Workbench, plan: GroupPlan, search: _Search, choice: Choice, size: float) -> _Solved:
    config, sites = bench.config, plan.group.sites
    with torch.autocast(bench.device.type, enabled=False):
        found = search.search.solve(choice, size)
    storages = [_storage(mask, choice, config) for mask in found.masks_RF]
    rank = 0 if found.basis_DR is None else found.basis_DR.shape[1]
    plan = solved_plan(plan, rank=rank, layers=storages)
    biases = [
        _moved_bias(bench, site, problem, factor, found, search.moments[site.name], order)
        for site, problem, factor, order in zip(
            sites, search.search.problems, found.factors_RF, search.orders, strict=True
        )
    ]
    group = TrainableGroup(found.basis_DR, found.factors_RF, sites, biases, config, None)
    group.set_masks(found.masks_RF)
    search.search.forget()
    if not config.calibration_steps and not config.distill.steps:
        return _Solved(plan, storages, group, (), [], 0.0)
    limit = None if config.calibration_steps else MAX_ERROR_BATCHES
    with bench.recorded(plan.group, limit=limit) as (records, spool):
        start = bench.errors_with(plan.group, group.modules, records, spool)
        with swapped(bench.model, group.modules):
            steps = config.calibration_steps
            losses = calibrate_(
                group, bench.blocks(plan.group), records, spool, bench.device,
                lambda step, loss: bench.report("calibrate", plan.group.name, step + 1, steps, loss),
            )  # fmt: skip
    return _Solved(plan, storages, group, start, losses, 0.0)


def _moved_bias(
    bench: Workbench,
    site: LinearSite,
    problem: LayerProblem,
    factor_RF: Tensor,
    found: Factorization,
    moments: LayerMoments,
    order_F: Tensor,
) -> nn.Parameter | None:
    """A layer's bias plus the mean of what its new matrix loses, in the order of its neurons."""
    bias = bench.bias(site)
    if bias is None:
        return None
    error_DF = problem.weight_DF - (factor_RF if found.basis_DR is None else found.basis_DR @ factor_RF)
    if site.role == "up":
        return nn.Parameter((bias.detach()[order_F] + moments.mean_D @ error_DF).to(bias.dtype))
    return nn.Parameter((bias.detach() + error_DF @ moments.mean_D[order_F]).to(bias.dtype))


def _storage(mask_RF: Tensor, choice: Choice, config: CompressionConfig) -> LayerStorage:
    pattern = BITMASK if choice.pattern == "unstructured" else choice.pattern
    fmt = DENSE if bool(mask_RF.all()) else pattern
    return LayerStorage(int(mask_RF.sum()), fmt, config.value_kind, choice.shared)


def _finish(bench: Workbench, item: _Solved) -> CompressedGroup:
    bases, layers = pack_group(item.trainable, item.plan, item.storages)
    with bench.recorded(item.plan.group, limit=MAX_ERROR_BATCHES) as (records, spool):
        final = bench.errors_with(item.plan.group, layers, records, spool)
    return CompressedGroup(item.plan, bases, layers, item.start or final, final, tuple(item.losses), item.seconds)


def _measure(bench: Workbench, groups: Sequence[GroupPlan]) -> dict[str, LayerMoments]:
    sites = [site for group in groups for site in group.group.sites]
    name = groups[0].group.name if len(groups) == 1 else "all"
    return bench.moments(name, sites, floor=bench.config.metric.token_floor)


def _chunks(groups: Sequence[GroupPlan], memory: int) -> Iterator[list[GroupPlan]]:
    """Runs of groups whose moments fit into a number of bytes; at least one group each."""
    chunk: list[GroupPlan] = []
    used = 0
    for group in groups:
        need = 2 * moment_bytes(group.group.sites)  # the moments and the problems made of them
        if chunk and used + need > memory:
            yield chunk
            chunk, used = [], 0
        chunk.append(group)
        used += need
    if chunk:
        yield chunk


def _choices(plan: GroupPlan, config: CompressionConfig) -> list[Choice]:
    sharing = {"auto": (False, True), "always": (True,), "never": (False,)}[config.sharing]
    patterns = [config.resolved_pattern]
    if patterns == ["auto"]:
        patterns = ["unstructured"]
        if plan.group.width % 16 == 0 and all(site.columns % 16 == 0 for site in plan.group.sites):
            patterns += N16
    if len(plan.group.sites) < 2:
        sharing = (False,)
    return [Choice(shared, pattern) for shared in sharing for pattern in patterns if not (shared and pattern in N16)]


def _share(plan: GroupPlan, config: CompressionConfig) -> float:
    """Bytes, or numbers where the setting counts numbers, of an equal split."""
    if config.target_bytes is not None:
        return target_bytes(plan.group, config)
    assert config.budget is not None
    return config.budget * plan.group.width * plan.group.columns


def _pricing(plan: GroupPlan, config: CompressionConfig) -> Pricing:
    if config.target_bytes is None:
        return Pricing(value=1.0, basis_entry=1.0, pattern_bit=0.0)
    size = itemsize(plan.dtype)
    if config.value_kind == "int8":
        return Pricing(value=1.0, basis_entry=size, row_scale=size)
    return Pricing(value=size, basis_entry=size)
