"""The default method: plans, and runs the stages over all groups."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from statistics import median
from typing import Any, ClassVar

import torch

from fips.calibration.moments import LayerMoments, moment_bytes
from fips.errors import ConfigError
from fips.formats.patterns import FULL
from fips.methods.fips.settings import FipsConfig
from fips.methods.fips.stages import (
    Search,
    Solved,
    Split,
    allot,
    ends_of,
    finish,
    group_share,
    measure,
    open_search,
    pack,
    solve,
    train,
    try_choices,
)
from fips.methods.keeping import Made, is_kept, kept_group
from fips.methods.registry import Method, register
from fips.methods.sweep import Block, PackedLayer, blocks_of, bytes_beside, make_blocks, runs_within, solve_blocks
from fips.methods.workbench import (
    CompressedGroup,
    Needs,
    Workbench,
)
from fips.models import LayerGroup, Site
from fips.models.sublayers import Sublayer
from fips.plan.footprint import LayerStorage, factored_footprint, itemsize
from fips.plan.groups import GroupPlan, byte_target, solved_plan
from fips.plan.least import BYTES_PER_BIT
from fips.plan.plan import CompressionPlan
from fips.plan.planner import check_inputs, equal_layers
from fips.solve.allocate import allocate, tempered
from fips.solve.coded import slow_because
from fips.solve.oneshot import SAMPLE
from fips.solve.structures import Choice, Point
from fips.training.distill import DistillConfig, Distilled, distill_, held_out_batches
from fips.training.factors import swapped

__all__ = ["Fips"]

log = logging.getLogger("fips.methods.fips")

MUCH_OVERFIT = 1.3
"""Error on data held out, relative to that on the data fitted, from which a run says so."""


@register
class Fips(Method[FipsConfig]):
    settings = FipsConfig
    aliases: ClassVar = {
        "no-sharing": {"sharing": "never"},
        "fips-shared": {"sharing": "always", "effort": "max"},
    }

    @property
    def needs(self) -> Needs:
        metric = Needs.INPUTS | (Needs.INFLUENCE if self.config.one_shot else Needs.GRADIENTS)
        return metric | (Needs.ACTIVATIONS if self.trains_blocks else Needs.NOTHING)

    @property
    def by_block(self) -> bool:
        return self.config.one_shot and not (self.trains_blocks or self.trains_model)

    @property
    def keeps_groups(self) -> bool:
        """Whether a group is finished when it is solved: nothing trains all of them, none is measured behind others."""
        return not self.trains_model and not self.config.metric.propagate_errors

    @property
    def holds_out(self) -> bool:
        return self.by_block and self.config.effort == "default"

    @property
    def tried_rows(self) -> int:
        return SAMPLE * len(self.config.whole_choices) if self.holds_out else 0

    @property
    def sweeps(self) -> int:
        return self.config.sweeps

    @property
    def influence_examples(self) -> int:
        return self.config.metric.gradient_examples

    @property
    def temperature(self) -> float:
        return self.config.metric.temperature

    @property
    def moment_memory(self) -> int:
        return int(self.config.metric.memory)

    @property
    def moment_copies(self) -> int:
        return self.config.moment_copies

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
        if self.config.misses_codes:
            _say_that_codes_are_left_out(slow_because())
        for site in group.sites:
            if site.hidden % pattern.block:
                raise ConfigError(
                    f"`pattern` {self.config.pattern} needs hidden sizes that are a multiple of {pattern.block}, but "
                    f"`{site.name}` has {site.hidden}; use `pattern: unstructured`"
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
        if group.is_end:
            whole = [LayerStorage(site.width * site.hidden, FULL, kind, shared=False) for site in group.sites]
            spent = factored_footprint(group, rank=0, itemsize=itemsize(dtype), layers=whole).bytes
            return whole, spent <= byte_target(group, config)
        if pattern.group_kept is None:
            return equal_layers(group, config, dtype, kind, fmt=pattern.name)
        n, m = pattern.group_kept, pattern.group
        layers = [
            LayerStorage(site.width * site.hidden * n // m, pattern.name, kind, shared=False) for site in group.sites
        ]
        spent = factored_footprint(group, rank=0, itemsize=itemsize(dtype), layers=layers).bytes
        return layers, config.bits is None or spent <= byte_target(group, config)

    def smallest_size(self, group: LayerGroup, dtype: torch.dtype) -> float:
        """A shared basis if there must be one, and an entry for every row and column of every matrix."""
        item, unit = itemsize(dtype), BYTES_PER_BIT if self.config.budget is None else 1
        least = {site: _least(site, self.config, item, whole=group.is_end) for site in group.sites}
        if self.config.sharing == "always" and len(group.sites) > 1:
            basis = group.width**2 * (item if self.config.budget is None else 1)
            return (basis + sum(least.values())) / (group.hidden * group.width * unit)
        if self.config.format.group_kept is not None:  # what such a pattern keeps is its size
            return sum(least.values()) / (group.hidden * group.width * unit)
        return max(size / (site.hidden * group.width * unit) for site, size in least.items())

    def compress(self, bench: Workbench, plan: CompressionPlan) -> list[CompressedGroup]:
        """Solve all groups, train them together if asked to, pack them and measure what they lost."""
        config = self.config
        if self.by_block:
            return _by_block(bench, plan, config)
        if self.keeps_groups:
            return _finished_groups(bench, plan, config)
        solved = list(_solve_groups(bench, plan, config))
        if config.distill.steps:
            distilled = _distill(bench, solved, config.distill)
            for item in solved:
                item.losses += distilled.losses
        packed = [pack(item) for item in solved]  # before anything else can fail
        return [finish(bench, item, *done) for item, done in zip(solved, packed, strict=True)]


def _distill(bench: Workbench, solved: Sequence[Solved], settings: DistillConfig) -> Distilled:
    """Train all groups together, on all batches but those held out, and say where that was of no use."""
    held = held_out_batches(len(bench.batches), settings.held_out)
    found = distill_(
        bench.model,
        [item.trainable for item in solved if item.trainable is not None],
        [block for item in solved for block in bench.blocks(item.plan.group).values()],
        bench.batches.only(lambda number: number not in held),
        settings,
        bench.run,
        lambda step, loss: bench.report("distill", "all", step + 1, settings.steps, loss),
        held_out=bench.batches.only(lambda number: number in held) if held else (),
    )
    bench.distilled = found.to_dict()
    if not found.kept:
        bench.note(
            f"{len(found.losses)} steps of distillation made the loss on data held out no smaller: the layers stay as "
            "they were solved; try another `distill.learning_rate`, or leave it out"
        )
    elif not found.checks and settings.held_out:
        bench.note(
            "one batch of data leaves none to see whether distillation helps; give more, or a smaller batch size"
        )
    return found


def _by_block(bench: Workbench, plan: CompressionPlan, config: FipsConfig) -> list[CompressedGroup]:
    """Every MLP by itself, some blocks at a time."""
    if config.effort == "fast":
        bench.note(
            "`effort: fast` measures no errors on data held out, which would tell whether the examples are enough"
        )
        chosen = allot(bench, plan, config)
    else:
        chosen = _tried(bench, plan, config)

    def solve_one(
        group: GroupPlan, sublayer: Sublayer, moments: Mapping[str, LayerMoments]
    ) -> Mapping[str, PackedLayer]:
        part = _alone(group, sublayer)
        search = open_search(bench, part, config, moments)
        names = [site.name for site in sublayer.sites]
        item = solve(bench, part, config, search, [chosen[name] for name in names])
        _, layers = pack(item)
        return {name: PackedLayer(layers[name], storage) for name, storage in zip(names, item.storages, strict=True)}

    return solve_blocks(bench, plan, solve_one, memory=config.metric.memory)


def _tried(bench: Workbench, plan: CompressionPlan, config: FipsConfig) -> dict[str, tuple[Choice, float]]:
    """Structure and bytes of every layer, from errors of some rows on data held out: a pass over the model of its own.

    Where the moments of all layers fit into memory they are kept for the pass that solves.
    """
    blocks = blocks_of(plan)
    if bytes_beside(blocks, config.metric.memory, ranks=bench.ranks.count) is not None:
        bench.keep_moments()

    def make(block: Block, moments: Mapping[str, LayerMoments]) -> Made:
        found: dict[str, list[Point]] = {}
        overfit: dict[str, float | None] = {}
        for group, sublayer in block.parts:
            part, names = _alone(group, sublayer), [site.name for site in sublayer.sites]
            search = open_search(bench, part, config, moments, trial=True)
            found |= zip(names, try_choices(bench, search, part, config), strict=True)
            overfit |= {name: getattr(one, "overfit", None) for name, one in zip(names, search.layers, strict=True)}
        return {}, {"points": found, "overfit": overfit}

    curves: dict[str, list[Point]] = {}
    for _, fields in make_blocks(bench, blocks, "try", make, memory=config.metric.memory, hold=True):
        for name, points in fields["points"].items():
            curves[name] = [_point(fields) for fields in points]
        bench.overfit |= {name: ratio for name, ratio in fields["overfit"].items() if ratio is not None}
    _say_overfit(bench)
    trials = tempered(list(curves.values()), ends_of(plan, list(curves)))
    split = allocate(trials, sum(group_share(group, config) for group in plan.groups))
    return dict(zip(curves, split, strict=True))


def _point(fields: Sequence[Any]) -> Point:
    """A point of a curve that was kept."""
    choice, *measured = fields
    return Point(Choice(*choice), *measured)


def _say_overfit(bench: Workbench) -> None:
    """A note where the calibration data is too small for the errors on it to be believed; their excess falls as 1/n."""
    if not bench.overfit:
        return
    middle = median(bench.overfit.values())
    if middle > MUCH_OVERFIT:
        times = (middle - 1) / (MUCH_OVERFIT - 1)
        bench.note(
            f"errors on data held out are {middle:.2f} times those on the data that was fitted (median of layers): "
            f"about {times:.1f} times as many examples would bring that to {MUCH_OVERFIT}"
        )


def _alone(group: GroupPlan, sublayer: Sublayer) -> GroupPlan:
    """The plan of one MLP, with the share of its group."""
    return replace(group, group=LayerGroup(group.group.name, (sublayer,)))


def _finished_groups(bench: Workbench, plan: CompressionPlan, config: FipsConfig) -> list[CompressedGroup]:
    """Every group as it was kept, or solved and finished now."""
    solved = _solve_groups(bench, plan, config)

    def make() -> CompressedGroup:
        item = next(solved)
        return finish(bench, item, *pack(item))

    return [kept_group(bench, group, make) for group in plan.groups]


def _solve_groups(bench: Workbench, plan: CompressionPlan, config: FipsConfig) -> Iterator[Solved]:
    """Every group that is not finished, with the structure and size that the measured errors ask for."""
    metric = config.metric
    memory = 0 if metric.propagate_errors else metric.memory  # with none each group is behind the one before

    def need(group: GroupPlan) -> int:
        return config.moment_copies * moment_bytes(group.group.sites)

    chunks = list(runs_within(plan.groups, need, memory))
    chosen: dict[str, Split] = {}
    searches: dict[str, Search] = {}
    if config.one_shot and config.effort == "fast":
        found = allot(bench, plan, config)
        chosen = {group.group.name: [found[site.name] for site in group.group.sites] for group in plan.groups}
    else:
        chosen, searches = _choose(bench, plan, config, chunks)
    total = sum(not is_kept(bench, group) for group in plan.groups)
    done = 0
    with ExitStack() as installed:
        for chunk in chunks:
            left = [group for group in chunk if not is_kept(bench, group)]
            if left and not searches:
                moments = measure(bench, config, chunk)
            for group in left:
                started = time.perf_counter()
                name = group.group.name
                search = searches.pop(name, None) or open_search(bench, group, config, moments)
                bench.report("solve", name, done, total)
                item = solve(bench, group, config, search, chosen[name])
                done += 1
                bench.report("solve", name, done, total)
                train(bench, item, config)
                item.seconds = time.perf_counter() - started
                yield item
                if metric.propagate_errors:
                    installed.enter_context(swapped(bench.model, item.modules(bench.model)))


def _choose(
    bench: Workbench, plan: CompressionPlan, config: FipsConfig, chunks: Sequence[Sequence[GroupPlan]]
) -> tuple[dict[str, Split], dict[str, Search]]:
    """Structure and bytes of every group by name, and the searches where all of them are still in memory."""
    units: list[list[Point]] = []
    sizes: dict[str, int] = {}
    searches: dict[str, Search] = {}
    for chunk in chunks:
        searches.clear()
        names = {group.group.name: f"try-{group.group.name}" for group in chunk}
        if not all(map(bench.store.has, names.values())):
            moments = measure(bench, config, chunk)
            for group in chunk:
                bench.report("try", group.group.name, len(sizes) + len(searches), len(plan.groups))
                search = open_search(bench, group, config, moments)
                with bench.noted() as notes, torch.autocast(bench.device.type, enabled=False):
                    found = try_choices(bench, search, group, config)
                search.forget()
                searches[group.group.name] = search
                bench.store.put(names[group.group.name], {}, {"units": found, "notes": notes})
                bench.report("try", group.group.name, len(sizes) + len(searches), len(plan.groups))
        for name, piece in names.items():
            kept = bench.store.get(piece)
            assert kept is not None
            bench.note_kept(kept[1])
            found = [[_point(fields) for fields in unit] for unit in kept[1]["units"]]
            units += found
            sizes[name] = len(found)
    split = iter(allocate(units, sum(group_share(group, config) for group in plan.groups)))
    chosen: dict[str, Split] = {name: [next(split) for _ in range(count)] for name, count in sizes.items()}
    keep = len(chunks) == 1 and not config.metric.propagate_errors
    return chosen, searches if keep else {}


def _least(site: Site, config: FipsConfig, item: int, *, whole: bool) -> float:
    """The least that may be made of a matrix, without its basis: numbers or bytes; all entries of a ``whole`` one."""
    size, pattern = site.width * site.hidden, config.format
    whole = whole or config.value_choices[0].memory > 0
    kept = size if whole else math.ceil(max(site.width, site.hidden) / pattern.block) * pattern.block
    if pattern.group_kept is not None:
        kept = size * pattern.group_kept // pattern.group
    if config.budget is not None:
        return kept
    numbers = config.value_choices[0]
    values: float = kept * item
    if numbers.bits is not None:
        scales = numbers.scale_bytes(site.outputs, site.inputs, item)
        values = kept * numbers.bits / 8 + scales + (numbers.bits % 8 > 0)
    if whole:
        return values
    bits = size / pattern.group * pattern.group_bits if pattern.density is None else pattern.bits(size)
    return values + bits / 8


@functools.cache
def _say_that_codes_are_left_out(reason: str) -> None:
    """Once in a process: the result is right, and worse than it could be."""
    log.warning(
        "values of 2 to 4 bits are not coded together, which makes the KL to the original 1.3 to 2.5 times as large: "
        "the search for the codes wants the compiled library (%s)", reason,
    )  # fmt: skip
