"""From the size of the whole file to bits per weight of the layers that are compressed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from fips.config import CompressionConfig, size_bytes
from fips.errors import BudgetError, FipsError
from fips.models import LayerGroup, group_layers, locate_layers
from fips.models.locate import Located
from fips.plan.footprint import Footprint, dense_footprint, itemsize, state_bytes
from fips.plan.groups import storage_dtype
from fips.plan.least import BYTES_PER_BIT, EPS
from fips.plan.planner import planner_of
from fips.plan.rest import rest_saving

__all__ = ["Sizes", "layer_groups", "located_layers", "sizes_of", "smallest_sizes", "weight_dtype", "with_bits"]

MOST_BITS = 16
_COVERED = {"mlp": "MLPs", "blocks": "blocks", "all": "blocks, embedding and head"}


def weight_dtype(model: nn.Module, group: LayerGroup) -> torch.dtype:
    """Of the layers of a group, before."""
    dtype = model.get_submodule(group.sites[0].name).weight.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def smallest_sizes(model: nn.Module, groups: Sequence[LayerGroup], config: CompressionConfig) -> dict[str, float]:
    """The smallest sensible size of every group by name (``Planner.smallest_size``)."""
    planner = planner_of(config)
    return {
        group.name: planner.smallest_size(group, storage_dtype(config, weight_dtype(model, group))) for group in groups
    }


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the groups of a model take, and the least that they can take."""

    weights: int
    """Of the groups."""
    before: int
    """Bytes of all tensors of the model as it is."""
    rest: int
    """Bytes of what is in no group, in the type that it will have."""
    least_bits: float
    """The smallest sensible bits per weight of the groups."""

    @property
    def least_bytes(self) -> int:
        """Of all tensors of the model, rounded up: so many can be asked for."""
        return math.ceil(self.rest + self.least_bits * self.weights * BYTES_PER_BIT - EPS)


def sizes_of(model: nn.Module, groups: Sequence[LayerGroup], config: CompressionConfig) -> Sizes:
    """Sizes of a model, which may be on the meta device, and of those of its layers that are to be compressed.

    For settings with `bits` or `size`; a `budget` counts parameters.
    """
    before = state_bytes(model)
    dense = Footprint.total(dense_footprint(group, itemsize=itemsize(weight_dtype(model, group))) for group in groups)
    least = max(smallest_sizes(model, groups, config.replace(size=None, bits=MOST_BITS)).values())
    rest = before - dense.bytes - rest_saving(model, groups, config)
    return Sizes(weights=dense.parameters, before=before, rest=rest, least_bits=least)


def with_bits(
    model: nn.Module, groups: Sequence[LayerGroup], config: CompressionConfig, left: Collection[str] = ()
) -> CompressionConfig:
    """The settings with the bits that make all tensors together as large as ``size`` says.

    Settings without a size are returned as they are. Layers ``left`` dense count among the rest.
    Raises ``BudgetError`` with the smallest size there is.
    """
    if config.size is None:
        return config
    groups = [group for group in (one.without(left) for one in groups) if group is not None]
    sizes = sizes_of(model, groups, config)
    wanted = size_bytes(config.size, sizes.before)
    if wanted > sizes.before:
        raise BudgetError(
            f"`size` {config.size} is {wanted:,.0f} bytes, more than the {sizes.before:,} of the model as it is; "
            f"ask for less, {sizes.least_bytes:,} at least"
        )
    if wanted < sizes.least_bytes:
        raise BudgetError(
            f"`size` {config.size} is {wanted:,.0f} bytes of {sizes.before:,}; what is not compressed takes "
            f"{sizes.rest:,}, and the smallest size with the {_COVERED[config.layers]} compressed is "
            f"{sizes.least_bytes:,} bytes; {_remedy(model, config, wanted, sizes.least_bytes)}"
        )
    bits = min((wanted - sizes.rest) / (sizes.weights * BYTES_PER_BIT), MOST_BITS)
    return config.replace(size=None, bits=bits)


def located_layers(model: nn.Module, config: CompressionConfig) -> Located:
    """The layers that settings ask for."""
    return locate_layers(model, layers=config.layers, targets=config.targets, ignore=config.ignore)


def layer_groups(located: Located, config: CompressionConfig) -> tuple[LayerGroup, ...]:
    """Groups of blocks, and embedding and head by themselves."""
    groups = group_layers(located.sublayers, share_blocks=config.share_blocks, groups=config.groups)
    return groups + tuple(LayerGroup(end.kind, (end,)) for end in located.ends)


def _remedy(model: nn.Module, config: CompressionConfig, wanted: float, least: int) -> str:
    """What to do about a size that is too small: the first setting that reaches it, or what comes nearest."""
    found = {}
    for changes in _wider(config):
        other = config.replace(**changes)
        with suppress(FipsError):
            reached = sizes_of(model, layer_groups(located_layers(model, other), other), other).least_bytes
            if reached < least:
                found[" ".join(f"{_OPTIONS[name]} {value}" for name, value in changes.items())] = reached
    if not found:
        return "ask for more"
    nearest = min(found.items(), key=lambda one: one[1])
    options, reached = next((one for one in found.items() if one[1] <= wanted), nearest)
    return f"{'with' if reached <= wanted else 'ask for more: even with'} `{options}` it is {reached:,}"


_OPTIONS = {"layers": "--layers", "rest_dtype": "--rest-dtype"}
_LAYERS = tuple(_COVERED)


def _wider(config: CompressionConfig) -> Iterator[dict[str, str]]:
    """Settings with which more is compressed, or the rest takes 16 bits, the smallest changes first."""
    wider = _LAYERS[_LAYERS.index(config.layers) + 1 :] if config.targets is None else ()
    for layers in ({}, *({"layers": one} for one in wider)):
        if layers:
            yield layers
        if config.rest_dtype is None:
            yield layers | {"rest_dtype": "bfloat16"}
