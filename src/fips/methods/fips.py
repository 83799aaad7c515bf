r"""The default method: measure what an error costs, choose structure and size of every group, solve, train, pack.

An error E of a matrix costs :math:`\mathrm{tr}(E^\top A E G)` with the second moments A of the layer's inputs and G of
the gradients of its outputs (``fips.calibration.moments``). Every group becomes a shared basis with sparse factors, or
sparse matrices alone, of floating values or integers, as this error, measured at a few sizes, asks for. Stages, each of
one group from what the stage before gave: ``_measure``, ``_trials`` (then ``allocate`` over all groups), ``_solve``,
``_train``, ``pack_group``.

References: arXiv 2411.09816 (shared basis, sparse factors); Martens & Grosse, arXiv 1503.05671 (the metric).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from fips.calibration.moments import LayerMoments, moment_bytes
from fips.config import InputMetricConfig, SparseConfig
from fips.errors import ConfigError
from fips.formats.patterns import DENSE, Pattern, pattern_for
from fips.formats.values import FLOAT, Values, automatic_values, values_named
from fips.layers.linear import FactoredLinear, SharedBasis
from fips.methods.registry import Method, register
from fips.methods.workbench import (
    MAX_ERROR_BATCHES,
    CompressedGroup,
    Needs,
    Workbench,
    dense_matrix,
    measured,
    pack_group,
)
from fips.models import LayerGroup, Site
from fips.plan.footprint import LayerStorage, factored_footprint, itemsize
from fips.plan.groups import GroupPlan, byte_target, solved_plan
from fips.plan.least import BYTES_PER_BIT
from fips.plan.plan import CompressionPlan
from fips.plan.planner import check_inputs, equal_layers
from fips.solve.alternate import Factorization
from fips.solve.problems import LayerProblem
from fips.solve.reorder import neighbour_order
from fips.solve.search import SIZES, WORTH_SHARING, Choice, GroupSearch, Point, Pricing, allocate, expected_total
from fips.solve.supports import Reduction
from fips.training.distill import DistillConfig, distill_
from fips.training.factors import TrainableGroup, swapped
from fips.training.reconstruct import BlockError, reconstruct_

__all__ = ["Fips", "FipsConfig", "MetricConfig", "site_problem"]

ENOUGH = 2
"""Gradients per output of a layer from which their second moment is taken as it is. With 24 and 128 examples, 80
outputs and a head of two classes mixing made the error of the logits 8 and 3 times smaller."""
N16 = ("2:16", "4:16", "8:16")

Split = Sequence[tuple[Choice, float]]
"""Structure and bytes of a group: of all its layers together where they share a basis, else of each."""


class MetricConfig(InputMetricConfig):
    """What an error costs: the second-order change of the model's output."""

    temperature: float = Field(default=2.0, gt=0)
    """Temperature of the softmax whose change counts; 1 is the KL divergence, large values treat logits alike."""
    token_floor: float = Field(default=0.4, ge=0, le=1)
    """Share of the weight that all tokens get alike; the rest goes by what a token does to the output."""
    propagate_errors: bool = False
    """Measure every group behind the compressed groups before it instead of behind the original ones."""


class FipsConfig(SparseConfig):
    """What each group may become, the metric, and training afterwards; structure and sparsity follow from the size."""

    method: Literal["fips"] = "fips"
    sharing: Literal["auto", "always", "never"] = "auto"
    """Whether the matrices of a group share a basis: as measured per group, always, or never (plain pruning)."""
    values: str | None = None
    """Type of the factor values: floating, integers of 2 to 8 bits with a scale per row (`int4`), or `auto`, 3 to 8
    bits as measured per layer. Default: `auto` with `bits`, else float."""
    pattern: str = "auto"
    """`unstructured`; `N:M`, N non-zeros in every M consecutive entries along the reduction; `block4` or `block8`, one
    mask bit for that many neighbouring hidden neurons, which are reordered for it; `auto`, unstructured or N:16 as
    measured per group."""
    schedule: Literal["static", "gmp", "rigl"] = "static"
    """Whether the support that was found stays (`static`) or changes while training (`rigl`)."""
    metric: MetricConfig = MetricConfig()
    distill: DistillConfig = DistillConfig()

    def check(self) -> None:
        super().check()
        if self.sharing == "always" and self.nm is not None:
            raise ValueError(
                "`sharing: always` needs a pattern of free size, got N:M; leave `pattern` or `sharing` out"
            )
        if self.values == "auto" and self.bits is None:
            raise ValueError("`values: auto` weighs bits against bytes: give `bits`, not `budget`")
        if self.schedule == "gmp":
            raise ValueError("`schedule: gmp` starts from dense factors; `method: fips` takes `static` or `rigl`")
        if self.schedule == "rigl" and self.pattern not in ("auto", "unstructured"):
            raise ValueError(f"`schedule: rigl` needs `pattern: unstructured`, got {self.pattern!r}")

    @field_validator("values")
    @classmethod
    def _known_values(cls, values: str | None) -> str | None:
        return values if values in (None, "auto") else values_named(values).name

    @property
    def has_integers(self) -> bool:
        return self.value_choices[0].scaled

    @property
    def value_choices(self) -> list[Values]:
        """The value formats that a layer may get, fewest bits first; by default `auto` where bytes are counted."""
        found = self.values or ("auto" if self.bits is not None else FLOAT)
        return automatic_values() if found == "auto" else [values_named(found)]

    @property
    def resolved_pattern(self) -> str:
        """``pattern``, where supports that change need a free one."""
        return "unstructured" if self.schedule == "rigl" else self.pattern

    @property
    def format(self) -> Pattern:
        return pattern_for("unstructured" if self.resolved_pattern == "auto" else self.resolved_pattern)


@register
class Fips(Method[FipsConfig]):
    settings = FipsConfig
    aliases: ClassVar = {"no-sharing": {"sharing": "never"}}

    @property
    def needs(self) -> Needs:
        return Needs.INPUTS | Needs.GRADIENTS | (Needs.ACTIVATIONS if self.trains_blocks else Needs.NOTHING)

    @property
    def temperature(self) -> float:
        return self.config.metric.temperature

    @property
    def moment_memory(self) -> int:
        return int(self.config.metric.memory)

    @property
    def trains_blocks(self) -> bool:
        return self.config.reconstruction.steps > 0

    @property
    def trains_model(self) -> bool:
        return self.config.distill.steps > 0

    @property
    def moves_neurons(self) -> bool:
        return self.config.format.block > 1

    def check(self, group: LayerGroup) -> None:
        pattern = self.config.format
        for site in group.sites:
            if site.columns % pattern.block:
                raise ConfigError(
                    f"`pattern` {self.config.pattern} needs hidden sizes that are a multiple of {pattern.block}, but "
                    f"`{site.name}` has {site.columns}; use `pattern: unstructured`"
                )
            check_inputs(site, pattern)

    def plan(self, blank: GroupPlan) -> GroupPlan:
        """Equal shares for all groups, no sharing, the widest values that fit where the width is to be measured."""
        for values in reversed(self.config.value_choices):
            layers, fits = self._equal_layers(blank.group, blank.dtype, values.name)
            if fits:
                break
        return solved_plan(blank, rank=0, layers=layers)

    def _equal_layers(self, group: LayerGroup, dtype: torch.dtype, kind: str) -> tuple[list[LayerStorage], bool]:
        config = self.config
        pattern = config.format
        if pattern.group_kept is None:
            return equal_layers(group, config, dtype, kind, fmt=pattern.name)
        n, m = pattern.group_kept, pattern.group
        layers = [
            LayerStorage(site.width * site.columns * n // m, pattern.name, kind, shared=False) for site in group.sites
        ]
        spent = factored_footprint(group, rank=0, itemsize=itemsize(dtype), layers=layers).bytes
        return layers, config.bits is None or spent <= byte_target(group, config)

    def smallest_size(self, group: LayerGroup, dtype: torch.dtype) -> float:
        """A shared basis if there must be one, and an entry for every row and column of every matrix."""
        item, unit = itemsize(dtype), BYTES_PER_BIT if self.config.budget is None else 1
        least = {site: _least(site, self.config, item) for site in group.sites}
        if self.config.sharing == "always" and len(group.sites) > 1:
            basis = group.width**2 * (item if self.config.budget is None else 1)
            return (basis + sum(least.values())) / (group.columns * group.width * unit)
        return max(size / (site.columns * group.width * unit) for site, size in least.items())

    def compress(self, bench: Workbench, plan: CompressionPlan) -> list[CompressedGroup]:
        """Solve all groups, train them together if asked to, pack them and measure what they lost."""
        config = self.config
        solved = _solve_groups(bench, plan, config)
        if config.distill.steps:
            blocks = [block for item in solved for block in bench.blocks(item.plan.group).values()]
            losses = distill_(
                bench.model, [item.trainable for item in solved if item.trainable is not None], blocks,
                bench.batches, config.distill, bench.run,
                lambda step, loss: bench.report("distill", "all", step + 1, config.distill.steps, loss),
            )  # fmt: skip
            for item in solved:
                item.losses += losses
        packed = [item.packed() for item in solved]  # before anything else can fail
        return [_finish(bench, item, *done) for item, done in zip(solved, packed, strict=True)]


def _least(site: Site, config: FipsConfig, item: int) -> float:
    """The least that may be made of a matrix, without its basis: numbers or bytes."""
    size, pattern = site.width * site.columns, config.format
    kept = math.ceil(max(site.width, site.columns) / pattern.block) * pattern.block
    if pattern.group_kept is not None:
        kept = size * pattern.group_kept // pattern.group
    if config.budget is not None:
        return kept
    numbers = config.value_choices[0]
    values: float = kept * item
    if numbers.bits is not None:
        scales = numbers.num_scales(site.outputs, site.inputs)
        values = kept * numbers.bits / 8 + scales * item + (numbers.bits % 8 > 0)
    bits = size / pattern.group * pattern.group_bits if pattern.density is None else pattern.bits(size)
    return values + bits / 8


@dataclass(slots=True)
class _Solved:
    """A group between solving and packing."""

    plan: GroupPlan
    storages: list[LayerStorage]
    found: Factorization
    biases: list[nn.Parameter | None]
    trainable: TrainableGroup | None = None
    """Where something is trained."""
    start: tuple[BlockError, ...] = ()
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def packed(self) -> tuple[dict[str, SharedBasis], dict[str, FactoredLinear]]:
        found = self.found if self.trainable is None else self.trainable.found()
        return pack_group(found, self.plan.group.sites, self.biases, self.plan, self.storages)

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Layers that compute what was solved, before anything is packed, for a model that still has its own."""
        if self.trainable is not None:
            return self.trainable.modules
        sites, basis_DR = self.plan.group.sites, self.found.basis_DR
        weights_DF = [factor if basis_DR is None else basis_DR @ factor for factor in self.found.factors_RF]
        return {
            site.name: _linear(site.role.to_linear(weight_DF.to(dense_matrix(model, site).dtype)), bias)
            for site, weight_DF, bias in zip(sites, weights_DF, self.biases, strict=True)
        }


def _linear(weight_OI: Tensor, bias: nn.Parameter | None) -> nn.Module:
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    layer.register_parameter("bias", bias)
    return layer


def _solve_groups(bench: Workbench, plan: CompressionPlan, config: FipsConfig) -> list[_Solved]:
    """Every group with the structure and size that the measured errors ask for."""
    metric = config.metric
    chunks = list(_chunks(plan.groups, 0 if metric.propagate_errors else metric.memory))  # each behind the one before
    chosen, searches = _choose(bench, plan, config, chunks)
    found: list[_Solved] = []
    with ExitStack() as installed:
        for chunk in chunks:
            if not searches:
                moments = _measure(bench, config, chunk)
            for group in chunk:
                started = time.perf_counter()
                search = searches.pop(group.group.name, None) or _search(bench, group, config, moments)
                item = _solve(bench, group, config, search, chosen[group.group.name])
                _train(bench, item, config)
                item.seconds = time.perf_counter() - started
                found.append(item)
                if metric.propagate_errors:
                    installed.enter_context(swapped(bench.model, item.modules(bench.model)))
    return found


def _choose(
    bench: Workbench, plan: CompressionPlan, config: FipsConfig, chunks: Sequence[Sequence[GroupPlan]]
) -> tuple[dict[str, Split], dict[str, _Search]]:
    """Structure and bytes of every group by name, and the searches where all of them are still in memory."""
    units: list[list[Point]] = []
    sizes: dict[str, int] = {}
    searches: dict[str, _Search] = {}
    for chunk in chunks:
        moments = _measure(bench, config, chunk)
        searches.clear()
        for group in chunk:
            search = _search(bench, group, config, moments)
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


def _trials(search: _Search, plan: GroupPlan, config: FipsConfig) -> list[list[Point]]:
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
        grids = [grid for one in found for grid in one.grids or ()]
        return [choice for choice, _ in split], Factorization(
            None,
            [factor for one in found for factor in one.factors_RF],
            [mask for one in found for mask in one.masks_RF],
            [sum(one.losses[-1] for one in found)],
            grids or None,
        )

    def forget(self) -> None:
        """Drop solved factorizations; the problems stay."""
        for search in (self.group, *self.layers):
            search.forget()


def _search(bench: Workbench, plan: GroupPlan, config: FipsConfig, moments: Mapping[str, LayerMoments]) -> _Search:
    sites = plan.group.sites
    orders = [torch.arange(site.columns, device=bench.device) for site in sites]
    search = _searches(bench, plan, config, moments, orders)
    block = config.format.block
    if block > 1:
        with torch.autocast(bench.device.type, enabled=False):
            free = Choice(False, "unstructured", config.value_choices[-1].name)
            size = max(
                _share(plan, config), search.group.least_bytes(free)
            )  # its pattern costs more than that of blocks
            masks = search.group.solve(free, size).masks_RF
        orders = _neighbours(plan, dict(zip([site.name for site in sites], masks, strict=True)), block)
        search = _searches(bench, plan, config, moments, orders)
    return search


def _searches(
    bench: Workbench,
    plan: GroupPlan,
    config: FipsConfig,
    moments: Mapping[str, LayerMoments],
    orders: list[Tensor],
) -> _Search:
    sites = plan.group.sites
    with torch.autocast(bench.device.type, enabled=False):
        problems = [
            site_problem(weight_DF.float()[:, order], site, moments[site.name], order)
            for weight_DF, site, order in zip(bench.weights(sites), sites, orders, strict=True)
        ]
    reductions: list[Reduction] = [site.role.reduction for site in sites]
    pricing = _pricing(plan, config)
    group = GroupSearch(problems, reductions, pricing, plan.dtype)
    layers = [
        GroupSearch([problem], [axis], pricing, plan.dtype) for problem, axis in zip(problems, reductions, strict=True)
    ]
    return _Search(group, layers, moments, orders)


def site_problem(weight_DF: Tensor, site: Site, moments: LayerMoments, order_F: Tensor) -> LayerProblem:
    """The error of one layer in the metric of the output, hidden neurons in the order given.

    Without gradients it is the error of the layer's own outputs relative to their size.
    """
    gradients_OO, inputs_II = _gradient_metric(moments), moments.inputs_DD
    left_DD, right_FF = site.role.sides(inputs_II, gradients_OO)
    right_FF = right_FF[order_F][:, order_F]
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
    for sublayer in plan.group.sublayers:
        halves = []
        for site in sublayer.sites:
            halves += masks_RF[site.name].split([part.features for part in site.parts], dim=1)
        order_F = neighbour_order(halves, size=block)
        orders += [
            torch.cat([order_F + start for start in range(0, site.columns, len(order_F))]) for site in sublayer.sites
        ]
    return orders


def _solve(bench: Workbench, plan: GroupPlan, config: FipsConfig, search: _Search, split: Split) -> _Solved:
    sites = plan.group.sites
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
    search.forget()
    return _Solved(plan, storages, found, biases)


def _train(bench: Workbench, item: _Solved, config: FipsConfig) -> None:
    """Train a group block by block, and measure its errors before any training."""
    if not config.reconstruction.steps and not config.distill.steps:
        return
    plan, found = item.plan, item.found
    group = TrainableGroup(found.basis_DR, found.factors_RF, plan.group.sites, item.biases, config, None)
    group.set_masks(found.masks_RF)
    if found.grids is not None:
        group.set_grids(found.grids)
    item.trainable = group
    limit = None if config.reconstruction.steps else MAX_ERROR_BATCHES
    with bench.recorded(plan.group, limit=limit) as (records, spool):
        start = measured(
            f"the block errors of group {plan.group.name} before training",
            lambda: bench.errors_with(plan.group, group.modules, records, spool),
        )
        item.start = start or ()
        with swapped(bench.model, group.modules):
            steps = config.reconstruction.steps
            item.losses = reconstruct_(
                group, bench.blocks(plan.group), records, spool, bench.device,
                lambda step, loss: bench.report("reconstruct", plan.group.name, step + 1, steps, loss),
            )  # fmt: skip


def _moved_bias(
    bench: Workbench,
    site: Site,
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
    if site.role.reads_stream:
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


def _measure(bench: Workbench, config: FipsConfig, groups: Sequence[GroupPlan]) -> dict[str, LayerMoments]:
    sites = [site for group in groups for site in group.group.sites]
    name = groups[0].group.name if len(groups) == 1 else "all"
    metric = config.metric
    return bench.moments(name, sites, floor=metric.token_floor, changed=metric.propagate_errors)


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


def _choices(plan: GroupPlan, config: FipsConfig) -> list[Choice]:
    """What a layer of the group may become without sharing."""
    patterns = [config.resolved_pattern]
    if patterns == ["auto"]:
        patterns = ["unstructured"]
        if plan.group.width % 16 == 0 and all(site.columns % 16 == 0 for site in plan.group.sites):
            patterns += N16
    return [Choice(False, pattern, values.name) for pattern in patterns for values in config.value_choices]


def _share(plan: GroupPlan, config: FipsConfig) -> float:
    """Bytes, or numbers where the setting counts numbers, of an equal split."""
    if config.bits is not None:
        return byte_target(plan.group, config)
    assert config.budget is not None
    return config.budget * plan.group.width * plan.group.columns


def _pricing(plan: GroupPlan, config: FipsConfig) -> Pricing:
    if config.bits is None:
        return Pricing(value=1.0, basis_entry=1.0, pattern_bit=0.0, value_bit=1 / (config.value_choices[0].bits or 1))
    size = itemsize(plan.dtype)
    return Pricing(value=size, basis_entry=size, row_scale=size if config.has_integers else 0.0)
