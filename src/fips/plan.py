"""From a model and a setting to what will be built: ranks, non-zeros, parameters and bytes. Needs no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fips.accounting import Footprint, dense_footprint, factored_footprint, itemsize, state_bytes
from fips.config import CompressionConfig
from fips.errors import ConfigError, ModelError
from fips.nn import factored_layers
from fips.solve.rank import full_rank_sparsity, num_nonzeros, rank_for_budget
from fips.storage.packing import BITMASK, DENSE
from fips.structure import LayerGroup, Skipped, group_mlps, locate_mlps

__all__ = ["CompressionPlan", "GroupPlan", "plan_compression"]


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One group and the factorization it will get."""

    group: LayerGroup
    rank: int
    sparsity: float
    """Fraction of zeros in the factors."""
    nonzeros: int
    """Kept factor entries of the whole group, exact."""
    fmt: str
    """Packed format of its factors, see ``fips.storage.packing``."""
    dtype: torch.dtype
    """Storage type of basis and values."""
    dense: Footprint
    factored: Footprint

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.group.name,
            "blocks": list(self.group.blocks),
            "width": self.group.width,
            "columns": self.group.columns,
            "rank": self.rank,
            "sparsity": self.sparsity,
            "nonzeros": self.nonzeros,
            "format": self.fmt,
            "dtype": str(self.dtype).removeprefix("torch."),
            "dense": self.dense.to_dict(),
            "factored": self.factored.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class CompressionPlan:
    """All groups, what is skipped, and the size of the whole model before and after."""

    groups: tuple[GroupPlan, ...]
    skipped: tuple[Skipped, ...]
    model_parameters: int
    model_bytes: int

    @property
    def dense(self) -> Footprint:
        return Footprint.total(group.dense for group in self.groups)

    @property
    def factored(self) -> Footprint:
        return Footprint.total(group.factored for group in self.groups)

    @property
    def compressed_parameters(self) -> int:
        """Parameters of the whole model after compression."""
        return self.model_parameters - self.dense.parameters + self.factored.parameters

    @property
    def compressed_bytes(self) -> int:
        """Tensor bytes of the whole checkpoint after compression."""
        return self.model_bytes - self.dense.bytes + self.factored.bytes

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": {"parameters": self.model_parameters, "bytes": self.model_bytes},
            "compressed_model": {"parameters": self.compressed_parameters, "bytes": self.compressed_bytes},
            "mlp": {"dense": self.dense.to_dict(), "factored": self.factored.to_dict()},
            "groups": [group.to_dict() for group in self.groups],
            "skipped": [{"name": item.name, "reason": item.reason} for item in self.skipped],
        }


def plan_compression(model: nn.Module, config: CompressionConfig) -> CompressionPlan:
    """Decide groups, ranks and formats for a model, which may be on the meta device.

    Raises ``NoMatchError`` (nothing to compress), ``BudgetError`` (budget too small for a group), ``ConfigError``
    (groups or an N:M pattern that do not fit) and ``ModelError`` (already compressed).
    """
    if factored_layers(model):
        raise ModelError("the model is already compressed; `fips.merge(model)` turns it back into dense layers")
    located = locate_mlps(model, targets=config.targets, ignore=config.ignore)
    groups = group_mlps(located.mlps, group_size=config.group_size, groups=config.groups)
    grouped = {block for group in groups for block in group.blocks}
    outside = [Skipped(mlp.name, "its block is in no group") for mlp in located.mlps if mlp.block not in grouped]
    return CompressionPlan(
        groups=tuple(_plan_group(model, group, config) for group in groups),
        skipped=(*located.skipped, *outside),
        model_parameters=sum(p.numel() for p in model.parameters()),
        model_bytes=state_bytes(model),
    )


def _plan_group(model: nn.Module, group: LayerGroup, config: CompressionConfig) -> GroupPlan:
    _check_alignment(group, config)
    nm = config.nm
    sparsity = _sparsity(group, config)
    rank = rank_for_budget(
        budget=config.budget,
        width=group.width,
        columns=group.columns,
        sparsity=sparsity,
        multiple=nm[1] if nm is not None else 1,
    )
    fmt = config.pattern if nm is not None else (BITMASK if sparsity > 0 else DENSE)
    sizes = [rank * site.columns for site in group.sites]
    if config.threshold == "layer":
        nonzeros = sum(num_nonzeros(size=size, sparsity=sparsity) for size in sizes)
    else:
        nonzeros = num_nonzeros(size=sum(sizes), sparsity=sparsity)
    weight_dtype = model.get_submodule(group.sites[0].name).weight.dtype
    assert isinstance(weight_dtype, torch.dtype)
    dtype = getattr(torch, config.factor_dtype) if config.factor_dtype else weight_dtype
    return GroupPlan(
        group=group,
        rank=rank,
        sparsity=sparsity,
        nonzeros=nonzeros,
        fmt=fmt,
        dtype=dtype,
        dense=dense_footprint(group, itemsize=itemsize(weight_dtype)),
        factored=factored_footprint(group, rank=rank, nonzeros=nonzeros, fmt=fmt, itemsize=itemsize(dtype)),
    )


def _sparsity(group: LayerGroup, config: CompressionConfig) -> float:
    """The sparsity asked for; ``fips`` without one spends the budget on a basis of full rank where that fits."""
    if config.method == "fips" and config.sparsity is None and config.nm is None:
        chosen = full_rank_sparsity(budget=config.budget, width=group.width, columns=group.columns)
        if chosen is not None:
            return max(chosen, 0.0)
    return config.factor_sparsity


def _check_alignment(group: LayerGroup, config: CompressionConfig) -> None:
    if config.nm is None:
        return
    for site in group.sites:
        if site.role == "down" and site.columns % config.nm[1]:
            raise ConfigError(
                f"`pattern` {config.pattern} needs inputs that are a multiple of {config.nm[1]}, but `{site.name}` has "
                f"{site.columns}; use `pattern: unstructured` or an M that divides {site.columns}"
            )
