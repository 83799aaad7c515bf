"""The stages of the default method. Each is a function of what the stages before it gave, for one group at a time.

===============  ==================================================  ===============================================
stage            from                                                gives
===============  ==================================================  ===============================================
``allot``        the influence of all layers                         structure and bytes of every layer (``fast``)
``measure``      layers of some groups, the batches                  second moments by layer
``open_search``  moments, the weights of a group                     its problems, ready to be solved
``try_choices``  a search                                            measured errors of structures at a few sizes
``allocate``     those of all groups (``fips.solve.allocate``)       structure and bytes of every layer
``solve``        a search, structure and bytes                       supports, integers, basis, biases
``train``        what was solved, block inputs and outputs           the same after steps, if any are asked for
``pack``         what was solved or trained                          layers in the bytes they will be stored in
``finish``       packed layers                                       a finished group with its block errors
===============  ==================================================  ===============================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fips.calibration.moments import LayerMoments
from fips.calibration.precision import autocast_for
from fips.errors import BudgetError, DataError
from fips.formats.patterns import FULL
from fips.formats.rotation import widest_rotation
from fips.formats.values import Values
from fips.layers.linear import FactoredLinear, SharedBasis
from fips.methods.fips.settings import FipsConfig
from fips.methods.workbench import (
    MAX_ERROR_BATCHES,
    CompressedGroup,
    Workbench,
    dense_matrix,
    measured,
    pack_group,
)
from fips.models import Site
from fips.plan.footprint import LayerStorage, factored_footprint, itemsize
from fips.plan.groups import GroupPlan, byte_target, solved_plan
from fips.plan.plan import CompressionPlan
from fips.solve.allocate import allocate, expected_total, tempered
from fips.solve.alternate import Factorization
from fips.solve.oneshot import OneShot, damping_for
from fips.solve.problems import LayerProblem
from fips.solve.reorder import neighbour_order
from fips.solve.search import GroupSearch
from fips.solve.structures import SIZES, Choice, Point, Pricing
from fips.solve.supports import Reduction
from fips.training.factors import TrainableGroup, swapped
from fips.training.reconstruct import BlockError, reconstruct_

__all__ = [
    *("Packed", "Search", "Solved", "Split"),
    *("allot", "ends_of", "finish", "group_share", "measure", "open_search", "pack", "site_problem", "solve"),
    *("train", "try_choices"),
]

ENOUGH = 2
"""Gradients per output of a layer from which their second moment is taken as it is. With 24 and 128 examples, 80
outputs and a head of two classes mixing made the error of the logits 8 and 3 times smaller."""
NEAR_BITS = 1.8
"""Stored bits between the size asked for and value formats that are tried. None farther was taken on two models."""
N16 = ("2:16", "4:16", "8:16")

Packed = tuple[dict[str, SharedBasis], dict[str, FactoredLinear]]
Split = Sequence[tuple[Choice, float]]
"""Structure and bytes of a group: of all its layers together where they share a basis, else of each."""


def measure(
    bench: Workbench, config: FipsConfig, groups: Sequence[GroupPlan], *, hold: bool = False
) -> dict[str, LayerMoments]:
    """Stage: second moments of what the layers of some groups read and of the gradients of what they write.

    With ``hold`` those of inputs say what a part of the data says alone, too.
    """
    sites = [site for group in groups for site in group.group.sites]
    name = groups[0].group.name if len(groups) == 1 else "all"
    if config.one_shot:
        return bench.input_moments(name, [group.group for group in groups], hold=hold)
    metric = config.metric
    return bench.moments(name, sites, floor=metric.token_floor, changed=metric.propagate_errors)


@dataclass(slots=True)
class Search:
    """The searches of one group, with what is needed to go back from their columns to the model's."""

    weights_DF: list[Tensor]
    layers: Sequence[GroupSearch | OneShot]
    """One for every site."""
    group: GroupSearch | None
    """All of them with a basis that they share, where that is looked at."""
    moments: Mapping[str, LayerMoments]
    orders: list[Tensor]
    """For every site the original column at every place."""

    def solve(self, split: Split) -> tuple[list[Choice], Factorization]:
        """The factors of all sites, and the choice of each."""
        if len(split) == 1 and len(self.layers) > 1:
            assert self.group is not None
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
        for search in (*self.layers, *([] if self.group is None else [self.group])):
            search.forget()


def open_search(
    bench: Workbench,
    plan: GroupPlan,
    config: FipsConfig,
    moments: Mapping[str, LayerMoments],
    *,
    trial: bool = False,
) -> Search:
    """Stage: the problems of a group, hidden neurons in an order that suits the pattern.

    Those of a ``trial`` are solved on one part of the data and judged on the other.
    """
    sites = plan.group.sites
    orders = [torch.arange(site.hidden, device=bench.device) for site in sites]
    search = _searches(bench, plan, config, moments, orders, trial)
    block = config.format.block
    if block > 1:
        with torch.autocast(bench.device.type, enabled=False):
            masks = _free_masks(search, plan, config)
        orders = _neighbours(plan, dict(zip([site.name for site in sites], masks, strict=True)), block)
        search = _searches(bench, plan, config, moments, orders, trial)
    return search


def _free_masks(search: Search, plan: GroupPlan, config: FipsConfig) -> list[Tensor]:
    """Supports of any entries at the size of the group; its pattern costs more than that of blocks."""
    free, share = Choice(False, "unstructured", config.value_choices[-1].name), group_share(plan, config)
    if search.group is not None:
        return search.group.solve(free, max(share, search.group.least_bytes(free))).masks_RF
    parts = [layer.hidden / plan.group.hidden * share for layer in search.layers]
    found = [
        layer.solve(free, max(part, layer.least_bytes(free))) for layer, part in zip(search.layers, parts, strict=True)
    ]
    return [mask for one in found for mask in one.masks_RF]


def _searches(
    bench: Workbench,
    plan: GroupPlan,
    config: FipsConfig,
    moments: Mapping[str, LayerMoments],
    orders: list[Tensor],
    trial: bool,
) -> Search:
    sites = plan.group.sites
    with torch.autocast(bench.device.type, enabled=False):
        weights_DF = [
            weight_DF.float()[:, order] for weight_DF, order in zip(bench.weights(sites), orders, strict=True)
        ]
        if config.one_shot:
            rotated = _rotated(plan, config)
            shots = [
                _one_shot(
                    bench, plan, config, weight_DF, site, moments.get(site.name), order, rotated=rotated, trial=trial
                )
                for weight_DF, site, order in zip(weights_DF, sites, orders, strict=True)
            ]
            return Search(weights_DF, shots, None, moments, orders)
        problems = [
            site_problem(weight_DF, site, moments[site.name], order)
            for weight_DF, site, order in zip(weights_DF, sites, orders, strict=True)
        ]
    reductions: list[Reduction] = [site.role.reduction for site in sites]
    pricing = _pricing(plan, config)
    group = GroupSearch(problems, reductions, pricing, plan.dtype)
    layers = [
        GroupSearch([problem], [axis], pricing, plan.dtype) for problem, axis in zip(problems, reductions, strict=True)
    ]
    return Search(weights_DF, layers, group, moments, orders)


def _one_shot(
    bench: Workbench,
    plan: GroupPlan,
    config: FipsConfig,
    weight_DF: Tensor,
    site: Site,
    moments: LayerMoments | None,
    order_F: Tensor,
    *,
    rotated: bool,
    trial: bool = False,
) -> OneShot:
    """One layer in the metric of its inputs, without moments of their diagonal (I,), hidden neurons in the order given.

    ``rotated`` is what ``_rotated`` says of the group, all layers of which it looks at. In a ``trial`` it is fitted to
    the data that is not held out, and judged on the rest.
    """
    moment, power_O = _diagonal_metric(bench, site)
    held: Tensor | None = None
    noise = None
    if moments is not None:
        moment, noise = moments.inputs_II, moments.noise
        if trial and moments.held is not None:
            moment, held, noise = moments.fitted_II, moments.held.inputs_II, moments.fitted_noise
        if site.looked_up:
            extra_I = _cost_of_lookups(bench, site)
            moment = moment + extra_I.diag()
            held = None if held is None else held + extra_I.diag()
    if not bool(power_O.any()):  # errors count by themselves, relative to what the layer writes
        weight_OI = site.role.to_linear(weight_DF)
        outputs = float(((weight_OI * moment if moment.dim() == 1 else weight_OI @ moment) * weight_OI).sum())
        power_O = torch.full_like(power_O, 1 / outputs if outputs > 0 else 1.0)
    if site.role.reads_stream:
        power_O = power_O[order_F]

    moved = not torch.equal(order_F, torch.arange(len(order_F), device=order_F.device))

    def ordered(moment: Tensor) -> Tensor:
        if site.role.reads_stream or not moved:  # a moment is the largest thing here: no copies without need
            return moment
        return moment[order_F] if moment.dim() == 1 else moment[order_F][:, order_F]

    held = None if held is None else ordered(held)
    return OneShot(
        weight_DF, ordered(moment), power_O, site.role.reduction, _pricing(plan, config), plan.dtype, held,
        damping_for(noise, config.bits or 16 * (config.budget or 1)),
        widest_rotation(site.inputs) if rotated else 1,
        config.sweeps,
        whole=rotated or plan.group.is_end,
    )  # fmt: skip


def _diagonal_metric(bench: Workbench, site: Site) -> tuple[Tensor, Tensor]:
    """What an error of the columns (I,) and of the rows (O,) of a layer costs, correlations of its inputs left out.

    Of an embedding by itself a row counts as often as its token occurs, and a column by the gradients behind it: with
    a token for input, the two sides of a layer change places.
    """
    head = site.multiplied_by
    if head is None:
        return _lookups(bench, site)
    found = bench.influence[head]
    return found.inputs_I + _cost_of_lookups(bench, site) if site.looked_up else found.inputs_I, found.outputs_O


def _lookups(bench: Workbench, site: Site) -> tuple[Tensor, Tensor]:
    """Power of the gradients at the outputs of embeddings (I,), and how often each of their rows is looked up (O,)."""
    seen = [bench.influence[name] for name in site.lookups]
    tokens = max(sum(one.tokens for one in seen), 1)
    columns_I = torch.stack([one.outputs_O for one in seen]).sum(0)
    return columns_I, torch.stack([one.inputs_I * (one.tokens / tokens) for one in seen]).sum(0)


def _cost_of_lookups(bench: Workbench, site: Site) -> Tensor:
    r"""What errors of the embedding add to the metric (I, I) of its tied head, on the diagonal (I,).

    Row n of the matrix costs the head :math:`p_n e A e^T` and the embedding :math:`f_n \sum_i g_i e_i^2`. Both fit into
    one metric if the ratio of f to p is that of their means in all rows.
    """
    columns_I, rows_O = _lookups(bench, site)
    power = bench.influence[site.judges[0]].outputs_O.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return columns_I * (rows_O.mean() / power)


def allot(bench: Workbench, plan: CompressionPlan, config: FipsConfig) -> dict[str, tuple[Choice, float]]:
    """Stage: structure and bytes of every layer, before its inputs have been measured.

    From what plain rounding, or pruning, does to some rows where inputs are uncorrelated. Error feedback then takes
    away more or less the same share everywhere.
    """
    names = [site.name for group in plan.groups for site in group.group.sites]
    curves: list[list[Point]] = []
    with torch.autocast(bench.device.type, enabled=False):
        for group in plan.groups:
            rotated, choices = _rotated(group, config), _choices(group, config)
            share = group_share(group, config) / group.group.hidden
            for site in group.group.sites:
                (weight_DF,) = bench.weights([site])
                order_F = torch.arange(site.hidden, device=bench.device)
                layer = _one_shot(bench, group, config, weight_DF.float(), site, None, order_F, rotated=rotated)
                curves.append(layer.quick_trials(choices, share * site.hidden))
                bench.report("allot", "all", len(curves), len(names))
    split = allocate(tempered(curves, ends_of(plan, names)), sum(group_share(group, config) for group in plan.groups))
    return dict(zip(names, split, strict=True))


def ends_of(plan: CompressionPlan, names: Sequence[str]) -> set[int]:
    """Places of embedding and head among layers. What their errors do is not told through the layers behind them alone:
    those of a head are errors of the logits. So their levels are believed (on two models 6 and 9 % less KL)."""
    ends = {site.name for group in plan.groups if group.group.is_end for site in group.group.sites}
    return {place for place, name in enumerate(names) if name in ends}


def site_problem(weight_DF: Tensor, site: Site, moments: LayerMoments, order_F: Tensor) -> LayerProblem:
    """The error of one layer in the metric of the output, hidden neurons in the order given.

    Without gradients it is the error of the layer's own outputs relative to their size.
    """
    gradients_OO, inputs_II = _gradient_metric(moments), moments.inputs_II
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
            torch.cat([order_F + start for start in range(0, site.hidden, len(order_F))]) for site in sublayer.sites
        ]
    return orders


def try_choices(bench: Workbench, search: Search, plan: GroupPlan, config: FipsConfig) -> list[list[Point]]:
    """Stage: measured errors of a group, one curve for every layer, or one for all where they share a basis.

    Where that is left to fips, they share one that leaves less error both on the data fitted and on data held out.
    """
    share, choices = group_share(plan, config), _choices(plan, config)
    parts = [site.hidden / plan.group.hidden for site in plan.group.sites]
    group = search.group
    if group is None:
        return [one.trials(choices, part * share) for one, part in zip(search.layers, parts, strict=True)]
    shared = [choice._replace(shared=True) for choice in choices if choice.free]
    if config.sharing == "always" and len(plan.group.sites) > 1:
        return [group.trials(shared, share)]
    alone = [one.trials(choices, part * share) for one, part in zip(search.layers, parts, strict=True)]
    if config.sharing != "auto" or len(plan.group.sites) < 2 or not shared:
        return alone
    best = min(shared, key=lambda choice: group.expected(choice, share))
    ratio = group.sharing_ratio(best, share, expected_total(alone, share))
    if ratio < 1:
        ratio = _ratio_held_out(bench, search, plan, config, (best, share), allocate(alone, share))
    if ratio >= 1:
        return alone
    sizes = [factor * share for factor in SIZES if group.expected(best, factor * share) < math.inf]
    return [[Point(best, size, ratio * expected_total(alone, size)) for size in sizes]]


def _ratio_held_out(
    bench: Workbench, search: Search, plan: GroupPlan, config: FipsConfig, shared: tuple[Choice, float], alone: Split
) -> float:
    """Error of a group with a shared basis relative to that of its layers alone: solved on one half of the batches,
    judged on the other. Infinite where there are no two halves that run all layers."""
    if len(bench.batches) < 2:
        bench.note_once(
            "no basis is shared: one batch of data leaves none to judge it by; give more examples, or a smaller batch"
        )
        return math.inf

    def half(odd: int) -> Search:
        floor, sites = config.metric.token_floor, plan.group.sites
        with autocast_for(config.precision, bench.model, bench.device):
            moments = bench.moments_of_part(plan.group.name, sites, lambda number: number % 2 == odd, floor=floor)
        return _searches(bench, plan, config, moments, search.orders, trial=True)

    with torch.autocast(bench.device.type, enabled=False):
        try:
            fitted = half(0)
            solved = [fitted.solve(split)[1] for split in ([shared], alone)]
            del fitted  # before the other half takes as much
            judged = half(1)
        except DataError:
            return math.inf
        assert judged.group is not None
        with_basis, apart = (judged.group.error(one) for one in solved)
    return with_basis / apart if apart > 0 else math.inf


@dataclass(slots=True)
class Solved:
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


def solve(bench: Workbench, plan: GroupPlan, config: FipsConfig, search: Search, split: Split) -> Solved:
    """Stage: supports, numbers, basis and moved biases of a group at a structure and size."""
    sites = plan.group.sites
    with torch.autocast(bench.device.type, enabled=False):
        choices, found = search.solve(split)
        biases = [
            _moved_bias(bench, site, weight_DF, factor, found, search.moments.get(site.name), order)
            for site, weight_DF, factor, order in zip(
                sites, search.weights_DF, found.factors_RF, search.orders, strict=True
            )
        ]
    storages = [_storage(mask, choice) for mask, choice in zip(found.masks_RF, choices, strict=True)]
    rank = 0 if found.basis_DR is None else found.basis_DR.shape[1]
    plan = solved_plan(plan, rank=rank, layers=storages)
    search.forget()
    return Solved(plan, storages, found, biases)


def train(bench: Workbench, item: Solved, config: FipsConfig) -> None:
    """Stage: train a group block by block, if steps are asked for, and measure its errors before them."""
    if not config.reconstruction.steps and not config.distill.steps:
        return
    plan, found = item.plan, item.found
    group = TrainableGroup(found.basis_DR, found.factors_RF, plan.group.sites, item.biases, config, None)
    group.set_masks(found.masks_RF)
    if found.grids is not None:
        group.set_grids(found.grids)
    item.trainable = group
    steps = config.reconstruction.steps
    with bench.recorded(plan.group, limit=None if steps else MAX_ERROR_BATCHES) as (records, spool):

        def errors(when: str) -> tuple[BlockError, ...]:
            found = measured(
                f"the block errors of group {plan.group.name} {when} training",
                lambda: bench.errors_with(plan.group, group.modules, records, spool),
            )
            return found or ()

        item.start = errors("before")
        if not steps:
            return
        untrained = group.state()
        with swapped(bench.model, group.modules):
            item.losses = reconstruct_(
                group, bench.blocks(plan.group), records, spool, bench.device,
                lambda step, loss: bench.report("reconstruct", plan.group.name, step + 1, steps, loss),
            )  # fmt: skip
        end = errors("after")
        if not _lessened(item.start, end):
            group.restore(untrained)
            errors_of = f"errors of `{plan.group.name}`"
            outcome = f"made the {errors_of} no smaller" if end else f"left {errors_of} that cannot be measured"
            bench.note(f"{steps} steps {outcome}: it stays as it was solved")


def _lessened(before: Sequence[BlockError], after: Sequence[BlockError]) -> bool:
    """Whether the errors of blocks became smaller together; also where they could not be measured before."""
    return not before or (bool(after) and sum(one.mse for one in after) < sum(one.mse for one in before))


def pack(item: Solved) -> Packed:
    """Stage: bases and layers of a group, by name, in the bytes they will be stored in."""
    trained = item.trainable
    found, biases = (item.found, item.biases) if trained is None else (trained.found(), trained.stored_biases())
    return pack_group(found, item.plan.group.sites, biases, item.plan, item.storages)


def finish(
    bench: Workbench, item: Solved, bases: dict[str, SharedBasis], layers: dict[str, FactoredLinear]
) -> CompressedGroup:
    """Stage: the group with what it lost."""
    final = bench.final_errors(item.plan.group, layers)
    return CompressedGroup(item.plan, bases, layers, item.start or final, final, tuple(item.losses), item.seconds)


def _moved_bias(
    bench: Workbench,
    site: Site,
    weight_DF: Tensor,
    factor_RF: Tensor,
    found: Factorization,
    moments: LayerMoments | None,
    order_F: Tensor,
) -> nn.Parameter | None:
    """A layer's bias plus the mean of what its new matrix loses, in the order of its neurons; a head's as it is."""
    bias = bench.bias(site)
    if bias is None or moments is None or not site.has_bias:
        return bias
    error_DF = weight_DF - (factor_RF if found.basis_DR is None else found.basis_DR @ factor_RF)
    if site.role.reads_stream:
        return nn.Parameter((bias.detach()[order_F] + moments.mean_I @ error_DF).to(bias.dtype))
    return nn.Parameter((bias.detach() + error_DF @ moments.mean_I[order_F]).to(bias.dtype))


def _storage(mask_RF: Tensor, choice: Choice) -> LayerStorage:
    fmt = FULL if bool(mask_RF.all()) else choice.layout.name
    return LayerStorage(int(mask_RF.sum()), fmt, choice.values, choice.shared)


def _choices(plan: GroupPlan, config: FipsConfig) -> list[Choice]:
    """What a layer of the group may become without sharing."""
    if _rotated(plan, config) or plan.group.is_end:
        return [Choice(False, "unstructured", values.name) for values in _near(plan, config)]
    patterns = [config.resolved_pattern]
    if patterns == ["auto"]:
        patterns = ["unstructured"]
        if plan.group.width % 16 == 0 and all(site.hidden % 16 == 0 for site in plan.group.sites):
            patterns += N16
    if config.value_choices[0].memory:
        share, least = group_share(plan, config), min(_whole_bytes(plan, config))
        raise BudgetError(
            f"`values: {config.values}` keeps every entry, which takes {least} bytes in `{plan.group.name}`; got "
            f"{share:.0f}: ask for more bits, or leave `values` out"
        )
    return [Choice(False, pattern, values.name) for pattern in patterns for values in config.value_choices]


def _near(plan: GroupPlan, config: FipsConfig) -> list[Values]:
    """The value formats around the size asked for, where all entries are kept; one that fits is among them."""
    share, sizes = group_share(plan, config), _whole_bytes(plan, config)
    weights = plan.group.width * plan.group.hidden
    fits = max(size for size in sizes if size <= share)
    return [
        values for values, size in zip(config.whole_choices, sizes, strict=True)
        if size == fits or 8 * abs(size - share) / weights <= NEAR_BITS
    ]  # fmt: skip


def _rotated(plan: GroupPlan, config: FipsConfig) -> bool:
    """Whether columns are turned: then all entries are kept, for which there must be room."""
    if not config.rotated:
        return False
    return min(_whole_bytes(plan, config)) <= group_share(plan, config)


def _whole_bytes(plan: GroupPlan, config: FipsConfig) -> list[int]:
    """Of the layers of a group with all entries, in every value format."""
    sites, item = plan.group.sites, itemsize(plan.dtype)
    stored = [
        [LayerStorage(site.width * site.hidden, FULL, values.name, shared=False) for site in sites]
        for values in config.whole_choices
    ]
    return [factored_footprint(plan.group, rank=0, itemsize=item, layers=layers).bytes for layers in stored]


def group_share(plan: GroupPlan, config: FipsConfig) -> float:
    """Bytes, or numbers where the setting counts numbers, of an equal split."""
    if config.bits is not None:
        return byte_target(plan.group, config)
    assert config.budget is not None
    return config.budget * plan.group.width * plan.group.hidden


def _pricing(plan: GroupPlan, config: FipsConfig) -> Pricing:
    if config.bits is None:
        return Pricing(value=1.0, basis_entry=1.0, pattern_bit=0.0, value_bit=1 / (config.value_choices[0].bits or 1))
    size = itemsize(plan.dtype)
    return Pricing(value=size, basis_entry=size, row_scale=size if config.has_integers else 0.0)
