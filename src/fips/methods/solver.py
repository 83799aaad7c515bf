"""The default method: measure what an error costs, choose structure and size of every group, solve, train, pack."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fips.calibration.moments import LayerMoments, moment_bytes
from fips.config import CompressionConfig
from fips.formats.patterns import DENSE
from fips.layers.linear import FactoredLinear, SharedBasis
from fips.methods.workbench import MAX_ERROR_BATCHES, CompressedGroup, Workbench, measured, pack_group
from fips.models import LinearSite
from fips.plan.footprint import LayerStorage, itemsize
from fips.plan.plan import CompressionPlan, GroupPlan, solved_plan, target_bytes
from fips.solve.alternate import Factorization
from fips.solve.problems import LayerProblem
from fips.solve.reorder import neighbour_order
from fips.solve.search import SIZES, WORTH_SHARING, Choice, GroupSearch, Point, Pricing, allocate, expected_total
from fips.solve.supports import Reduction
from fips.training.distill import distill_
from fips.training.factors import TrainableGroup, swapped
from fips.training.reconstruct import BlockError, calibrate_

__all__ = ["compress_by_solver", "site_problem"]

ENOUGH = 2
"""Gradients per output of a layer from which their second moment is taken as it is. With 24 and 128 examples, 80
outputs and a head of two classes mixing made the error of the logits 8 and 3 times smaller."""
N16 = ("2:16", "4:16", "8:16")

Split = Sequence[tuple[Choice, float]]
"""Structure and bytes of a group: of all its layers together where they share a basis, else of each."""


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
    packed = [pack_group(item.trainable, item.plan, item.storages) for item in solved]  # before anything else can fail
    return [_finish(bench, item, *done) for item, done in zip(solved, packed, strict=True)]


def _solve_groups(bench: Workbench, plan: CompressionPlan) -> list[_Solved]:
    """Every group with the structure and size that the measured errors ask for."""
    metric = bench.config.metric
    chunks = list(_chunks(plan.groups, 0 if metric.propagate_errors else metric.memory))  # each behind the one before
    chosen, searches = _choose(bench, plan, chunks)
    found: list[_Solved] = []
    with ExitStack() as installed:
        for chunk in chunks:
            if not searches:
                moments = _measure(bench, chunk)
            for group in chunk:
                started = time.perf_counter()
                search = searches.pop(group.group.name, None) or _search(bench, group, moments)
                item = _solve(bench, group, search, chosen[group.group.name])
                item.seconds = time.perf_counter() - started
                found.append(item)
                if bench.config.metric.propagate_errors:
                    installed.enter_context(swapped(bench.model, item.trainable.modules))
    return found


def _choose(
    bench: Workbench, plan: CompressionPlan, chunks: Sequence[Sequence[GroupPlan]]
) -> tuple[dict[str, Split], dict[str, _Search]]:
    """Structure and bytes of every group by name, and the searches where all of them are still in memory."""
    config = bench.config
    units: list[list[Point]] = []
    sizes: dict[str, int] = {}
    searches: dict[str, _Search] = {}
    for chunk in chunks:
        moments = _measure(bench, chunk)
        searches.clear()
        for group in chunk:
            search = _search(bench, group, moments)
            with torch.autocast(bench.device.type, enabled=False):
                found = _trials(search, group, config)
            search.forget()
            units += found
            searches[group.group.name] = search
            sizes[group.group.name] = len(found)
            bench.report("solve", "trials", len(sizes), len(plan.groups))
    split = iter(allocate(units, sum(_share(group, config) for group in plan.groups)))
    chosen: dict[str, Split] = {name: [next(split) for _ in range(count)] for name, count in sizes.items()}
    keep = len(chunks) == 1 and not config.metric.propagate_errors
    return chosen, searches if keep else {}


def _trials(search: _Search, plan: GroupPlan, config: CompressionConfig) -> list[list[Point]]:
    """Measured errors of one group: one curve for every layer, or one for all of them where they share a basis."""
    share, choices = _share(plan, config), _choices(plan, config)
    shared = [choice._replace(shared=True) for choice in choices if choice.free]
    if config.sharing == "always" and len(plan.group.sites) > 1:
        return [search.group.trials(shared, share)]
    parts = [site.columns / plan.group.columns for site in plan.group.sites]
    alone = [one.trials(choices, part * share) for one, part in zip(search.layers, parts, strict=True)]
    if config.sharing != "auto" or len(plan.group.sites) < 2 or not shared:
        return alone
    best = min(shared, key=lambda choice: search.group.expected(choice, share))
    ratio = search.group.sharing_ratio(best, share, expected_total(alone, share))
    if ratio >= WORTH_SHARING:
        return alone
    sizes = [factor * share for factor in SIZES if search.group.expected(best, factor * share) < math.inf]
    return [[Point(best, size, ratio * expected_total(alone, size)) for size in sizes]]


@dataclass(slots=True)
class _Search:
    """The searches of one group, with what is needed to go back from their columns to the model's."""

    group: GroupSearch
    layers: list[GroupSearch]
    """One for every site."""
    moments: Mapping[str, LayerMoments]
    orders: list[Tensor]
    """For every site the original column at every place."""

    def solve(self, split: Split) -> tuple[list[Choice], Factorization]:
        """The factors of all sites, and the choice of each."""
        if len(split) == 1 and len(self.layers) > 1:
            return [split[0][0]] * len(self.layers), self.group.solve(*split[0])
        found = [layer.solve(*one) for layer, one in zip(self.layers, split, strict=True)]
        steps = [step for one in found for step in one.steps or ()]
        return [choice for choice, _ in split], Factorization(
            None,
            [factor for one in found for factor in one.factors_RF],
            [mask for one in found for mask in one.masks_RF],
            [sum(one.losses[-1] for one in found)],
            steps or None,
            [wanted for one in found for wanted in one.wanted_RF or ()] or None,
        )

    def forget(self) -> None:
        """Drop solved factorizations; the problems stay."""
        for search in (self.group, *self.layers):
            search.forget()


def _search(bench: Workbench, plan: GroupPlan, moments: Mapping[str, LayerMoments]) -> _Search:
    config, sites = bench.config, plan.group.sites
    orders = [torch.arange(site.columns, device=bench.device) for site in sites]
    search = _searches(bench, plan, moments, orders)
    block = config.format.block
    if block > 1:
        with torch.autocast(bench.device.type, enabled=False):
            free = Choice(False, "unstructured", config.value_choices[-1].name)
            size = max(
                _share(plan, config), search.group.least_bytes(free)
            )  # its pattern costs more than that of blocks
            masks = search.group.solve(free, size).masks_RF
        orders = _neighbours(plan, dict(zip([site.name for site in sites], masks, strict=True)), block)
        search = _searches(bench, plan, moments, orders)
    return search


def _searches(bench: Workbench, plan: GroupPlan, moments: Mapping[str, LayerMoments], orders: list[Tensor]) -> _Search:
    config, sites = bench.config, plan.group.sites
    with torch.autocast(bench.device.type, enabled=False):
        problems = [
            site_problem(weight_DF.float()[:, order], site, moments[site.name], order)
            for weight_DF, site, order in zip(bench.weights(sites), sites, orders, strict=True)
        ]
    reductions: list[Reduction] = [0 if site.role == "up" else 1 for site in sites]
    pricing = _pricing(plan, config)
    group = GroupSearch(problems, reductions, pricing, plan.dtype)
    layers = [
        GroupSearch([problem], [axis], pricing, plan.dtype) for problem, axis in zip(problems, reductions, strict=True)
    ]
    return _Search(group, layers, moments, orders)


def site_problem(weight_DF: Tensor, site: LinearSite, moments: LayerMoments, order_F: Tensor) -> LayerProblem:
    """The error of one layer in the metric of the output, hidden neurons in the order given.

    Without gradients it is the error of the layer's own outputs relative to their size.
    """
    gradients_OO, inputs_II = _gradient_metric(moments), moments.inputs_DD
    if site.role == "up":
        left_DD, right_FF = inputs_II, gradients_OO[order_F][:, order_F]
    else:
        left_DD, right_FF = gradients_OO, inputs_II[order_F][:, order_F]
    if moments.samples == 0:
        outputs = float(((left_DD @ weight_DF @ right_FF) * weight_DF).sum())
        left_DD = left_DD / outputs if outputs > 0 else left_DD
    return LayerProblem(weight_DF, left_DD, right_FF)


def _gradient_metric(moments: LayerMoments) -> Tensor:
    """The moment of the gradients, mixed with the identity where there are too few of them to tell all directions.

    A few gradients span a few directions, and errors in all others would be free: of a classifier's last block, only
    one token of every example has a gradient. With n of them and O outputs the share of the identity falls from 1 to 0
    at n = 2 O.
    """
    gradients_OO = moments.gradients_OO
    size = len(gradients_OO)
    share = max(0.0, 1 - moments.samples / (ENOUGH * size))
    if share == 0:
        return gradients_OO
    mean = gradients_OO.diagonal().mean() if moments.samples > 0 else gradients_OO.new_ones(())
    identity_OO = torch.eye(size, dtype=gradients_OO.dtype, device=gradients_OO.device)
    return (1 - share) * gradients_OO + share * mean * identity_OO


def _neighbours(plan: GroupPlan, masks_RF: Mapping[str, Tensor], block: int) -> list[Tensor]:
    """One order per MLP, the same for all its matrices; the halves of a fused gate and up alike."""
    orders = []
    for mlp in plan.group.mlps:
        columns = min(site.columns for site in mlp.sites)
        halves = [half for site in mlp.sites for half in masks_RF[site.name].split(columns, dim=1)]
        order_F = neighbour_order(halves, size=block)
        orders += [torch.cat([order_F + start for start in range(0, site.columns, columns)]) for site in mlp.sites]
    return orders


def _solve(bench: Workbench, plan: GroupPlan, search: _Search, split: Split) -> _Solved:
    config, sites = bench.config, plan.group.sites
    with torch.autocast(bench.device.type, enabled=False):
        choices, found = search.solve(split)
    storages = [_storage(mask, choice) for mask, choice in zip(found.masks_RF, choices, strict=True)]
    rank = 0 if found.basis_DR is None else found.basis_DR.shape[1]
    plan = solved_plan(plan, rank=rank, layers=storages)
    biases = [
        _moved_bias(bench, site, problem, factor, found, search.moments[site.name], order)
        for site, problem, factor, order in zip(
            sites, search.group.problems, found.factors_RF, search.orders, strict=True
        )
    ]
    group = TrainableGroup(found.basis_DR, found.factors_RF, sites, biases, config, None)
    group.set_masks(found.masks_RF)
    if found.steps is not None:
        group.set_grids(found.steps, [choice.numbers for choice in choices], found.wanted_RF)
    search.forget()
    if not config.calibration_steps and not config.distill.steps:
        return _Solved(plan, storages, group, (), [], 0.0)
    limit = None if config.calibration_steps else MAX_ERROR_BATCHES
    with bench.recorded(plan.group, limit=limit) as (records, spool):
        start = measured(
            f"the block errors of group {plan.group.name} before training",
            lambda: bench.errors_with(plan.group, group.modules, records, spool),
        )
        with swapped(bench.model, group.modules):
            steps = config.calibration_steps
            losses = calibrate_(
                group, bench.blocks(plan.group), records, spool, bench.device,
                lambda step, loss: bench.report("calibrate", plan.group.name, step + 1, steps, loss),
            )  # fmt: skip
    return _Solved(plan, storages, group, start or (), losses, 0.0)


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


def _storage(mask_RF: Tensor, choice: Choice) -> LayerStorage:
    fmt = DENSE if bool(mask_RF.all()) else choice.layout.name
    return LayerStorage(int(mask_RF.sum()), fmt, choice.values, choice.shared)


def _finish(
    bench: Workbench, item: _Solved, bases: dict[str, SharedBasis], layers: dict[str, FactoredLinear]
) -> CompressedGroup:
    final = bench.final_errors(item.plan.group, layers)
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
    """What a layer of the group may become without sharing."""
    patterns = [config.resolved_pattern]
    if patterns == ["auto"]:
        patterns = ["unstructured"]
        if plan.group.width % 16 == 0 and all(site.columns % 16 == 0 for site in plan.group.sites):
            patterns += N16
    return [Choice(False, pattern, values.name) for pattern in patterns for values in config.value_choices]


def _share(plan: GroupPlan, config: CompressionConfig) -> float:
    """Bytes, or numbers where the setting counts numbers, of an equal split."""
    if config.target_bytes is not None:
        return target_bytes(plan.group, config)
    assert config.budget is not None
    return config.budget * plan.group.width * plan.group.columns


def _pricing(plan: GroupPlan, config: CompressionConfig) -> Pricing:
    if config.target_bytes is None:
        return Pricing(value=1.0, basis_entry=1.0, pattern_bit=0.0, value_bit=1 / (config.value_choices[0].bits or 1))
    size = itemsize(plan.dtype)
    return Pricing(value=size, basis_entry=size, row_scale=0.0 if config.value_kind == "float" else size)
