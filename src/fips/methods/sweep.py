"""The way of methods that solve every MLP by itself: one pass over the model, some blocks at a time.

Moments of the blocks at work are measured behind the original model, their layers are solved and packed, and the pass
goes on. What is finished can be kept by a store (``Workbench.store``) and is not made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fips.calibration.moments import LayerMoments, moment_bytes
from fips.calibration.record import ActivationSpool
from fips.calibration.sweep import Step, Sweep
from fips.layers.linear import FactoredLinear
from fips.methods.workbench import CompressedGroup, Workbench, measured
from fips.models import Site
from fips.models.locate import Sublayer
from fips.plan.footprint import LayerStorage
from fips.plan.groups import GroupPlan, solved_plan
from fips.plan.plan import CompressionPlan
from fips.training.factors import swapped
from fips.training.reconstruct import BlockError, block_errors

__all__ = ["PackedLayer", "solve_blocks"]

RECORDED = 4
"""Batches on which the error of a block is measured."""


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One finished layer and what it takes."""

    layer: FactoredLinear
    storage: LayerStorage


Solve = Callable[[GroupPlan, Sublayer, Mapping[str, LayerMoments]], Mapping[str, PackedLayer]]
"""The layers of one MLP by name, their biases set, from the moments of what they read."""


@dataclass(slots=True)
class _Block:
    """A block and its MLPs with the groups that they belong to."""

    name: str
    parts: list[tuple[GroupPlan, Sublayer]] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        return [site for _, sublayer in self.parts for site in sublayer.sites]


def solve_blocks(bench: Workbench, plan: CompressionPlan, solve: Solve, *, memory: int) -> list[CompressedGroup]:
    """Every group of a plan, its MLPs solved one by one; ``memory`` bounds the moments held at a time.

    At least those of one block are held.
    """
    run = _Run(bench, solve, _blocks(plan))
    with bench.sweep([block.name for block in run.blocks], recorded=RECORDED) as sweep:
        for unit in _units(run.blocks, memory):
            run.solve_unit(sweep, unit)
    return [run.group(group) for group in plan.groups]


@dataclass(slots=True)
class _Run:
    """The work of one compression and what is finished of it."""

    bench: Workbench
    solve: Solve
    blocks: Sequence[_Block]
    layers: dict[str, PackedLayer] = field(default_factory=dict)
    errors: dict[str, BlockError] = field(default_factory=dict)
    """By block."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By block."""

    def solve_unit(self, sweep: Sweep, unit: Sequence[_Block]) -> None:
        """The next blocks of the pass."""
        sites = [site for block in unit for site in block.sites]
        step: Step | None = None

        def measure() -> dict[str, LayerMoments]:
            nonlocal step
            step = sweep.step(len(unit), sites)
            return step.moments

        moments = self.bench.cached(sites, ("inputs",), measure)
        if step is None:
            sweep.skip(len(unit))
        for block in unit:
            self._solve_block(block, moments)
            if step is not None:
                self._measure_block(block, step, sweep.spool)
        if step is not None:
            step.release(sweep.spool)

    def _solve_block(self, block: _Block, moments: Mapping[str, LayerMoments]) -> None:
        started = time.perf_counter()
        for group, sublayer in block.parts:
            with torch.autocast(self.bench.device.type, enabled=False):
                self.layers |= self.solve(group, sublayer, moments)
            self.bench.report("solve", group.group.name, len(self.layers), sum(len(one.sites) for one in self.blocks))
        self.seconds[block.name] = time.perf_counter() - started

    def _measure_block(self, block: _Block, step: Step, spool: ActivationSpool) -> None:
        bench, layers = self.bench, {site.name: self.layers[site.name].layer for site in block.sites}

        def errors() -> list[BlockError]:
            with swapped(bench.model, layers):
                module = bench.model.get_submodule(block.name)
                return block_errors({block.name: module}, step.records, spool, bench.device)

        found = measured(f"the error of block `{block.name}`", errors)
        self.errors |= {one.block: one for one in found or ()}

    def group(self, plan: GroupPlan) -> CompressedGroup:
        """A group whose layers are all finished."""
        names = [site.name for site in plan.group.sites]
        layers = {name: self.layers[name].layer for name in names}
        solved = solved_plan(plan, rank=0, layers=[self.layers[name].storage for name in names])
        errors = tuple(self.errors[name] for name in plan.group.blocks if name in self.errors)
        if not errors:  # moments that were measured before
            errors = self.bench.final_errors(plan.group, layers)
        seconds = sum(self.seconds[name] for name in plan.group.blocks)
        return CompressedGroup(solved, {}, layers, errors, errors, seconds=seconds)


def _blocks(plan: CompressionPlan) -> list[_Block]:
    """All blocks in the order in which their layers were found."""
    found: dict[str, _Block] = {}
    for group in plan.groups:
        for sublayer in group.group.sublayers:
            found.setdefault(sublayer.block, _Block(sublayer.block)).parts.append((group, sublayer))
    return list(found.values())


def _units(blocks: Sequence[_Block], memory: int) -> Iterator[list[_Block]]:
    """Runs of blocks whose moments fit into a number of bytes, a part and the whole of each; at least one block."""
    unit: list[_Block] = []
    used = 0
    for block in blocks:
        need = 2 * moment_bytes(block.sites, gradients=False)
        if unit and used + need > memory:
            yield unit
            unit, used = [], 0
        unit.append(block)
        used += need
    if unit:
        yield unit
