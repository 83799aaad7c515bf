"""From the size of the whole file to bits per weight of the layers that are compressed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from fips.config import CompressionConfig, size_bytes
from fips.errors import BudgetError
from fips.models import LayerGroup
from fips.plan.footprint import state_bytes
from fips.plan.groups import storage_dtype
from fips.plan.least import BYTES_PER_BIT
from fips.plan.planner import planner_of

__all__ = ["with_bits"]

MOST_BITS = 16


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
    weights = sum(site.width * site.hidden for group in groups for site in group.sites)
    dense, least = 0, 0.0
    planner = planner_of(config.replace(size=None, bits=MOST_BITS))
    for group in groups:
        weight = model.get_submodule(group.sites[0].name).weight
        assert isinstance(weight, Tensor)
        dense += group.width * group.hidden * weight.element_size()
        least = max(least, planner.smallest_size(group, storage_dtype(planner.config, weight.dtype)))
    rest = before - dense
    smallest_bytes = rest + least * weights * BYTES_PER_BIT
    if wanted < smallest_bytes:
        raise BudgetError(
            f"`size` {config.size} is {wanted:,.0f} bytes of {before:,}; what is not compressed takes {rest:,}, and "
            f"the smallest size with the {'MLPs' if config.layers == 'mlp' else 'blocks'} compressed is "
            f"{smallest_bytes:,.0f} bytes; "
            + ("take attention too (`layers: blocks`), or " if config.layers == "mlp" else "")
            + "load the weights in 16 bits (`--dtype bfloat16`) if they have 32"
        )
    bits = min((wanted - rest) / (weights * BYTES_PER_BIT), MOST_BITS)
    return config.replace(size=None, bits=bits)
