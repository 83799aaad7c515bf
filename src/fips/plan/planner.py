"""What a method makes of a group, as far as that is known before anything is measured.

The planner of a method is the method itself: ``fips.methods.registry.Method`` adds to a planner how layers are made.
"""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import torch

from fips.config import CompressionConfig
from fips.errors import ConfigError
from fips.formats.patterns import BITMASK, Pattern
from fips.formats.values import values_named
from fips.models import LayerGroup, Site
from fips.plan.footprint import LayerStorage, factored_footprint, itemsize
from fips.plan.groups import GroupPlan, byte_target, solved_plan
from fips.plan.least import BYTES_PER_BIT, EPS

__all__ = ["PLANNERS", "Planner", "check_inputs", "equal_layers", "planner_of"]

C = TypeVar("C", bound=CompressionConfig)


class Planner(ABC, Generic[C]):
    """The plan of a method that prunes every layer alike, without a basis; others override what they do otherwise."""

    settings: ClassVar[type[CompressionConfig]]
    """The class of its settings, whose default ``method`` is its name."""

    def __init__(self, config: C) -> None:
        self.config = config

    @property
    def values(self) -> str:
        """How kept entries are stored."""
        return "float"

    @property
    def moves_neurons(self) -> bool:
        """Whether hidden neurons change places, which all layers of an MLP must do alike."""
        return False

    def check(self, group: LayerGroup) -> None:
        """Raise ``ConfigError`` where the shapes of a group do not fit the settings."""

    def plan(self, blank: GroupPlan) -> GroupPlan:
        """The plan of a group from one that says nothing but its layers, dense size and storage type."""
        layers, _ = equal_layers(blank.group, self.config, blank.dtype, self.values)
        return solved_plan(blank, rank=0, layers=layers)

    def smallest_size(self, group: LayerGroup, dtype: torch.dtype) -> float:
        """The smallest sensible ``budget`` or ``bits``, whichever is set, of one group; may exceed 1."""
        size = group.width * group.hidden
        kept = max(math.ceil(size * self.least_density(site) - EPS) for site in group.sites)
        if self.config.budget is not None:
            return kept / size
        empty = [LayerStorage(0, values=self.values, shared=False) for _ in group.sites]
        overhead = factored_footprint(group, rank=0, itemsize=itemsize(dtype), layers=empty).bytes
        entry_bits = values_named(self.values).bits_of(itemsize(dtype))
        return (kept * entry_bits / 8 + overhead) / (BYTES_PER_BIT * size)

    def least_density(self, site: Site) -> float:
        """Share of a layer's entries that is one for every row and every column."""
        return 1 / min(site.width, site.hidden)


PLANNERS: dict[str, type[Planner[Any]]] = {}
"""By the name of the method, entered by ``fips.methods.registry.register``."""


def planner_of(config: CompressionConfig) -> Planner[Any]:
    """The planner of a method with its settings; raises ``ConfigError`` if there is none for them."""
    if config.method not in PLANNERS:
        raise ConfigError(
            f"`method: {config.method}` has settings and nothing that uses them; register the method with "
            f"`fips.methods.registry.register`. Known methods: {', '.join(PLANNERS)}"
        )
    return PLANNERS[config.method](config)


def equal_layers(
    group: LayerGroup, config: CompressionConfig, dtype: torch.dtype, kind: str, *, fmt: str = BITMASK
) -> tuple[list[LayerStorage], bool]:
    """Layers of equal density with values of a kind, and whether they are within the size and not all but empty."""
    size = group.width * group.hidden
    empty = [LayerStorage(0, fmt, kind, shared=False) for _ in group.sites]
    overhead = factored_footprint(group, rank=0, itemsize=itemsize(dtype), layers=empty).bytes
    value_bytes = values_named(kind).bits_of(itemsize(dtype)) / 8
    left = config.budget * size * value_bytes if config.budget else byte_target(group, config) - overhead
    kept = min(int(max(left, 0.0) / value_bytes + 1e-9), size)
    share, rest = divmod(kept, len(group.sites))
    layers = [replace(layer, kept=share + (index < rest)) for index, layer in enumerate(empty)]
    return layers, kept >= sum(max(site.width, site.hidden) for site in group.sites)


def check_inputs(site: Site, pattern: Pattern) -> None:
    """Raise ``ConfigError`` unless the inputs of a layer, along which N:M runs, fill the groups of a pattern."""
    m = pattern.align
    if site.inputs % m:
        raise ConfigError(
            f"`pattern` {pattern.name} needs inputs that are a multiple of {m}, but `{site.name}` has "
            f"{site.inputs}; use `pattern: unstructured` or an M that divides {site.inputs}"
        )
