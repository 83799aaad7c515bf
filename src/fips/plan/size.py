"""From the size of the whole file to bits per weight of the layers that are compressed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from fips.config import CompressionConfig, size_bytes
from fips.errors import BudgetError
from fips.models import LayerGroup
from fips.models.ends import find_ends
from fips.plan.footprint import Footprint, dense_footprint, itemsize, state_bytes
from fips.plan.groups import storage_dtype
from fips.plan.least import BYTES_PER_BIT
from fips.plan.planner import planner_of

__all__ = ["smallest_sizes", "weight_dtype", "with_bits"]

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


def with_bits(
    model: nn.Module, groups: Sequence[LayerGroup], config: CompressionConfig, left: Collection[str] = ()
) -> CompressionConfig:
    """The settings with the bits that make all tensors together as large as ``size`` says.

    Settings without a size are returned as they are. Layers ``left`` dense count among the rest, which keeps its type.
    Raises ``BudgetError`` with the smallest size there is.
    """
    if config.size is None:
        return config
    before = state_bytes(model)
    wanted = size_bytes(config.size, before)
    groups = [group for group in (one.without(left) for one in groups) if group is not None]
    dense = Footprint.total(dense_footprint(group, itemsize=itemsize(weight_dtype(model, group))) for group in groups)
    weights, rest = dense.parameters, before - dense.bytes
    least = max(smallest_sizes(model, groups, config.replace(size=None, bits=MOST_BITS)).values())
    smallest_bytes = rest + least * weights * BYTES_PER_BIT
    if wanted < smallest_bytes:
        raise BudgetError(
            f"`size` {config.size} is {wanted:,.0f} bytes of {before:,}; what is not compressed takes {rest:,}, and "
            f"the smallest size with the {_COVERED[config.layers]} compressed is {smallest_bytes:,.0f} bytes; "
            + _more(model, config)
            + "load the weights in 16 bits (`--dtype bfloat16`) if they have 32"
        )
    bits = min((wanted - rest) / (weights * BYTES_PER_BIT), MOST_BITS)
    return config.replace(size=None, bits=bits)


def _more(model: nn.Module, config: CompressionConfig) -> str:
    """What else could be compressed."""
    if config.layers == "mlp":
        return "take attention too (`layers: blocks`), or "
    if config.layers == "blocks" and config.targets is None and find_ends(model, []):
        return "take embedding and head too (`layers: all`), or "
    return ""
