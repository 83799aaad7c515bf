"""The way of methods that solve every MLP by itself: passes over the model, some blocks at a time.

Moments of the blocks at work are measured in the original model, something is made of them, and the pass goes on. What
is made of a block is put into a store (``Workbench.store``); what is there already, from a run that was ended, is not
made again. With several ranks each measures its part of the data and makes its part of the blocks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fips.calibration.moments import LayerMoments, moment_bytes
from fips.calibration.sweep import CHUNKS, Sweep
from fips.layers.linear import FactoredLinear
from fips.methods.keeping import Made, layer_from, layer_parts
from fips.methods.workbench import CompressedGroup, Needs, Workbench, heads_of, measured
from fips.models import Site
from fips.models.sublayers import Sublayer
from fips.plan.footprint import LayerStorage
from fips.plan.groups import GroupPlan, solved_plan
from fips.plan.plan import CompressionPlan
from fips.training.factors import swapped
from fips.training.reconstruct import BlockError, Records, block_errors

__all__ = [
    "Block",
    "PackedLayer",
    "blocks_of",
    "bytes_beside",
    "make_blocks",
    "runs_within",
    "solve_blocks",
    "steps_of",
]

log = logging.getLogger(__name__)

SHOWN = 16
"""Examples on which the error of a block is measured, a few tokens of each if they are texts."""
STEP_MEMORY = 1 << 28
"""Bytes of moments that one process measures at a time, if the memory it may take is not less: with more there are
fewer steps over the data, which hand on what they have computed, and nothing is gained but their overhead."""


@dataclass(slots=True)
class Block:
    """A block of the model and its MLPs, with the groups that they belong to; or an embedding or a head."""

    name: str
    parts: list[tuple[GroupPlan, Sublayer]] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        return [site for _, sublayer in self.parts for site in sublayer.sites]

    @property
    def measured(self) -> list[Site]:
        """The layers whose inputs are measured: not an embedding by itself."""
        return [site for site in self.sites if site.multiplied_by is not None]

    @property
    def is_end(self) -> bool:
        return self.parts[0][1].is_end

    @property
    def moment_bytes(self) -> int:
        return moment_bytes(self.measured, gradients=False)


def steps_of(blocks: Sequence[Block], memory: int, *, ranks: int = 1) -> list[list[Block]]:
    """Blocks that are measured together: a moment, what is held out of it and the parts that wait are counted."""
    if ranks == 1:
        memory = min(memory, STEP_MEMORY)
    return list(runs_within(blocks, lambda block: _held_at_once(ranks) * block.moment_bytes, memory))


def _held_at_once(ranks: int) -> int:
    """Moments of a block that a rank holds: two and the part at work, of several ranks all parts, which wait."""
    return 3 if ranks == 1 else 2 - (-CHUNKS // ranks)


def bytes_beside(blocks: Sequence[Block], memory: int, *, ranks: int = 1) -> int | None:
    """Bytes of the moments of all other layers that are kept beside those of a step; None where that is too much.

    Of several ranks each keeps those of the blocks that it works on: what is told is the most of one.
    """
    steps = [[block.moment_bytes for block in step] for step in steps_of(blocks, memory, ranks=ranks)]
    held = max(sum(sum(step[rank::ranks]) for step in steps) for rank in range(ranks))
    largest = max(steps, key=sum)
    step = max(sum(largest[rank::ranks]) for rank in range(ranks))
    needed = _held_at_once(ranks) * sum(largest)
    return held - step if held - step + needed <= memory else None


T = TypeVar("T")
Make = Callable[[Block, Mapping[str, LayerMoments]], Made]


def blocks_of(plan: CompressionPlan) -> list[Block]:
    """All blocks in the order in which their layers were found."""
    found: dict[str, Block] = {}
    for group in plan.groups:
        for sublayer in group.group.sublayers:
            found.setdefault(sublayer.block, Block(sublayer.block)).parts.append((group, sublayer))
    return list(found.values())


def make_blocks(
    bench: Workbench,
    blocks: Sequence[Block],
    stage: str,
    make: Make,
    *,
    memory: int,
    errors: bool = False,
    hold: bool = False,
) -> Iterator[Made]:
    """What ``make`` makes of every block, in their order; ``memory`` bounds the moments held at a time.

    At least those of one block are held. With ``errors`` what is made are layers, and another piece holds the error of
    their block. With ``hold`` moments say what a part of the data says alone, too.
    """
    run = _Pass(bench, blocks, stage, make, errors, hold)
    passed, apart = ([block for block in blocks if bool(block.measured) is wanted] for wanted in (True, False))
    heads = heads_of([group.group for block in passed for group, _ in block.parts])
    if not all(run.is_made(block) for block in blocks):
        with ExitStack() as stack:
            sweep = stack.enter_context(bench.sweep([block.name for block in passed], hold=hold, heads=heads))
            names = [block.name for block in passed if not block.is_end]
            seen = stack.enter_context(bench.recording(names, SHOWN)) if errors and bench.ranks.first else None
            units = steps_of(passed, memory, ranks=bench.ranks.count)
            for unit in units if Needs.INPUTS in bench.needs else [list(passed)]:
                run.make_unit(sweep, seen, unit)
            run.make_apart(apart)
    for block in blocks:
        made = bench.store.get(f"{stage}-{block.name}")
        assert made is not None
        yield made


@dataclass(slots=True)
class _Pass:
    """One pass over all blocks."""

    bench: Workbench
    blocks: Sequence[Block]
    stage: str
    make: Make
    errors: bool
    hold: bool

    def is_made(self, block: Block) -> bool:
        """Whether nothing is left to do, alike on all ranks: nothing is put between two calls of ``wait``."""
        names = [f"{self.stage}-{block.name}", *([f"errors-{block.name}"] if self.errors else [])]
        return all(self.bench.store.has(name) for name in names)

    def make_unit(self, sweep: Sweep, seen: Sweep | None, unit: Sequence[Block]) -> None:
        """The next blocks; ``seen`` is a pass over the examples that errors are measured on."""
        left = [block for block in unit if not self.is_made(block)]
        shown = sum(not block.is_end for block in unit)
        ranks = self.bench.ranks
        ranks.wait()
        if not left:
            sweep.skip(len(unit))
            if seen is not None:
                seen.skip(shown)
            return
        owners = {site.name: ranks.owner(number) for number, block in enumerate(left) for site in block.measured}
        start = sweep.at

        def measure() -> dict[str, LayerMoments]:
            return sweep.step(len(unit), [site for block in left for site in block.measured], owners).moments

        inputs = Needs.INPUTS in self.bench.needs
        moments = self.bench.cached(list(owners), ("inputs",), measure, hold=self.hold) if inputs else {}
        if sweep.at == start:
            sweep.skip(len(unit))
        for number, block in enumerate(left):
            if ranks.owner(number) == ranks.index:
                self._make(block, moments)
        ranks.wait()
        if self.hold and self.bench.owns_cache:
            for moment in moments.values():
                moment.held = None  # what comes after uses all data
        if seen is not None:
            self._measure(left, seen, shown)

    def make_apart(self, blocks: Sequence[Block]) -> None:
        """What no pass over the data is needed for."""
        ranks = self.bench.ranks
        left = [block for block in blocks if not self.is_made(block)]
        ranks.wait()
        for number, block in enumerate(left):
            if ranks.owner(number) == ranks.index:
                self._make(block, {})
        ranks.wait()
        if self.errors and ranks.first:
            self._say_unmeasured(left)

    def _say_unmeasured(self, blocks: Sequence[Block]) -> None:
        """Of embeddings and heads, which are no blocks whose outputs could be compared."""
        for block in blocks:
            self.bench.store.put(f"errors-{block.name}", {}, {"errors": []})
            _say_finished(self.bench, block, [])

    def _make(self, block: Block, moments: Mapping[str, LayerMoments]) -> None:
        started = time.perf_counter()
        with torch.autocast(self.bench.device.type, enabled=False):
            tensors, fields = self.make(block, moments)
        fields = {**fields, "seconds": time.perf_counter() - started}
        tokens = {site.name: moments[site.name].weight for site in block.sites if site.mixture and site.name in moments}
        if tokens:
            fields["tokens"] = tokens
        self.bench.store.put(f"{self.stage}-{block.name}", tensors, fields)
        done = sum(self.bench.store.has(f"{self.stage}-{one.name}") for one in self.blocks)
        self.bench.report(self.stage, block.name, done, len(self.blocks))

    def _measure(self, blocks: Sequence[Block], seen: Sweep, count: int) -> None:
        """The errors of blocks among the next ``count`` of a pass over a few examples."""
        bench = self.bench
        self._say_unmeasured([block for block in blocks if block.is_end])
        blocks = [block for block in blocks if not block.is_end]
        if not blocks:
            seen.skip(count)
            return
        modules = {block.name: bench.model.get_submodule(block.name) for block in blocks}
        layers: dict[str, nn.Module] = {}
        for block in blocks:
            made = bench.store.get(f"{self.stage}-{block.name}")
            assert made is not None
            for name, one in unpacked(bench, block, made).items():
                one.layer.runtime.policy = "decode"  # no kernel is worth compiling or timing for a few passes
                layers[name] = one.layer

        def errors() -> Sequence[BlockError]:
            step = seen.step(count, [])
            with ExitStack() as stack:
                records: Records = step.records
                spool = seen.spool
                if not all(any(name in record for record in records) for name in modules):  # few examples run them
                    records, spool = stack.enter_context(bench.recorded_blocks(modules, "all", limit=1))
                stack.enter_context(swapped(bench.model, layers))
                found = block_errors(modules, records, spool, bench.device)
            step.release(seen.spool)
            return found

        found = measured("the errors of blocks", errors) or ()
        for block in blocks:
            own = [one for one in found if one.block == block.name]
            bench.store.put(f"errors-{block.name}", {}, {"errors": [asdict(one) for one in own]})
            _say_finished(bench, block, own)


def _say_finished(bench: Workbench, block: Block, errors: Sequence[BlockError]) -> None:
    """A line for the log: size, error and time of a block."""
    made = bench.store.get(f"solve-{block.name}")
    if made is None:
        return
    tensors, fields = made
    stored = sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith(".bias"))
    weights = sum(site.width * site.hidden for site in block.sites)
    error = f"relative error {errors[0].relative:.2e}, " if errors else ""
    line = f"{block.name}: {8 * stored / weights:.3f} bits per weight, {error}{fields['seconds']:.1f} s"
    log.info("%s", line)
    bench.store.log(line)


def runs_within(items: Sequence[T], need: Callable[[T], int], memory: int) -> Iterator[list[T]]:
    """Consecutive items that together need no more than a number of bytes; at least one item each."""
    run: list[T] = []
    used = 0
    for item in items:
        size = need(item)
        if run and used + size > memory:
            yield run
            run, used = [], 0
        run.append(item)
        used += size
    if run:
        yield run


# ------------------------------------------------------------------------------------------------------- packed layers


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One finished layer and what it takes."""

    layer: FactoredLinear
    storage: LayerStorage


Solve = Callable[[GroupPlan, Sublayer, Mapping[str, LayerMoments]], Mapping[str, PackedLayer]]
"""The layers of one MLP by name, their biases set, from the moments of what they read."""


def solve_blocks(bench: Workbench, plan: CompressionPlan, solve: Solve, *, memory: int) -> list[CompressedGroup]:
    """Every group of a plan, its MLPs solved one by one in one pass."""

    def make(block: Block, moments: Mapping[str, LayerMoments]) -> Made:
        found: dict[str, PackedLayer] = {}
        for group, sublayer in block.parts:
            found |= solve(group, sublayer, moments)
        return _packed(found)

    blocks = blocks_of(plan)
    layers: dict[str, PackedLayer] = {}
    seconds: dict[str, float] = {}
    errors: dict[str, BlockError] = {}
    for block, made in zip(blocks, make_blocks(bench, blocks, "solve", make, memory=memory, errors=True), strict=True):
        layers |= unpacked(bench, block, made)
        seconds[block.name] = made[1]["seconds"]
        inputs = {site.name: site.inputs for site in block.sites}
        bench.tokens |= {name: (weight, inputs[name]) for name, weight in made[1].get("tokens", {}).items()}
        _, fields = bench.store.get(f"errors-{block.name}") or ({}, {})
        errors |= {one["block"]: BlockError(**one) for one in fields.get("errors", ())}
    return [_group(group, layers, errors, seconds) for group in plan.groups]


def _group(
    plan: GroupPlan,
    layers: Mapping[str, PackedLayer],
    errors: Mapping[str, BlockError],
    seconds: Mapping[str, float],
) -> CompressedGroup:
    """A group whose layers are all finished."""
    names = [site.name for site in plan.group.sites]
    solved = solved_plan(plan, rank=0, layers=[layers[name].storage for name in names])
    known = tuple(errors[name] for name in plan.group.blocks if name in errors)
    spent = sum(seconds[name] for name in dict.fromkeys(sublayer.block for sublayer in plan.group.sublayers))
    return CompressedGroup(solved, {}, {name: layers[name].layer for name in names}, known, known, seconds=spent)


def _packed(layers: Mapping[str, PackedLayer]) -> Made:
    """Layers without a basis as tensors and fields; the biases and what the pattern of a whole factor says left out."""
    tensors: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for name, one in layers.items():
        own, known = layer_parts(name, one.layer)
        tensors |= own
        fields[name] = {**known, "storage": asdict(one.storage)}
    return tensors, {"layers": fields}


def unpacked(bench: Workbench, block: Block, made: Made) -> dict[str, PackedLayer]:
    """The layers that ``_packed`` took apart."""
    tensors, fields = made
    found = {}
    for site in block.sites:
        known = dict(fields["layers"][site.name])
        storage = LayerStorage(**known.pop("storage"))
        found[site.name] = PackedLayer(layer_from(site.name, tensors, known, bench.device, None), storage)
    return found
