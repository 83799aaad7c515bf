"""From a model and a setting to what will be built: ranks, non-zeros, parameters and bytes. Needs no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fips.config import CompressionConfig
from fips.errors import ConfigError, ModelError, NoMatchError
from fips.formats.patterns import BITMASK, DENSE
from fips.formats.values import Values
from fips.layers.linear import factored_layers
from fips.models import LayerGroup, Mlp, Skipped, group_mlps, locate_mlps
from fips.models.wrappers import unwrap
from fips.plan.footprint import Footprint, LayerStorage, dense_footprint, factored_footprint, itemsize, state_bytes
from fips.plan.least import REFERENCE_ITEMSIZE, paper_pattern_rate, require_sensible_size
from fips.solve.rank import num_nonzeros, rank_for_budget

__all__ = [
    "CompressionPlan",
    "GroupPlan",
    "LeftDense",
    "leave_dense",
    "plan_compression",
    "solved_plan",
    "storage_dtype",
    "target_bytes",
]


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One group and the factorization it will get."""

    group: LayerGroup
    rank: int
    """Vectors of the shared basis; 0 where the group shares none."""
    nonzeros: int
    """Kept factor entries of the whole group, exact."""
    fmt: str
    """Packed formats of its factors, see ``fips.formats.patterns``."""
    dtype: torch.dtype
    """Storage type of basis, floating values and scales."""
    dense: Footprint
    factored: Footprint
    values: str = "float"
    """Types of its values, see ``fips.formats.values``."""

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the factors."""
        return 1 - self.nonzeros / ((self.rank or self.group.width) * self.group.columns)

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
            "values": self.values,
            "dtype": str(self.dtype).removeprefix("torch."),
            "dense": self.dense.to_dict(),
            "factored": self.factored.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class LeftDense:
    """A layer that was to be compressed and stays as it is, since the calibration data says nothing about it."""

    name: str
    reason: str
    parameters: int
    bytes: int
    """Of its matrix, in the checkpoint's type."""


@dataclass(frozen=True, slots=True)
class CompressionPlan:
    """All groups, what is skipped, and the size of the whole model before and after.

    The size asked for is that of the groups: layers left dense are neither in it nor in ``dense`` and ``factored``.
    """

    groups: tuple[GroupPlan, ...]
    skipped: tuple[Skipped, ...]
    model_parameters: int
    model_bytes: int
    left_dense: tuple[LeftDense, ...] = ()

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
            "left_dense": {
                "parameters": sum(item.parameters for item in self.left_dense),
                "bytes": sum(item.bytes for item in self.left_dense),
                "layers": [{"name": item.name, "reason": item.reason} for item in self.left_dense],
            },
        }


def plan_compression(model: nn.Module, config: CompressionConfig) -> CompressionPlan:
    """Decide groups, ranks and formats for a model, which may be on the meta device.

    Raises ``NoMatchError`` (nothing to compress), ``BudgetError`` (a size too small to be sensible,
    see ``fips.plan.least``), ``ConfigError``
    (groups or an N:M pattern that do not fit) and ``ModelError`` (already compressed).
    """
    model = unwrap(model)
    if factored_layers(model):
        raise ModelError("the model is already compressed; `fips.merge(model)` turns it back into dense layers")
    located = locate_mlps(model, targets=config.targets, ignore=config.ignore)
    _check_whole(model, located.mlps, config)
    groups = group_mlps(located.mlps, group_size=config.group_size, groups=config.groups)
    _check_sizes(model, groups, config)
    grouped = {block for group in groups for block in group.blocks}
    outside = [Skipped(mlp.name, "its block is in no group") for mlp in located.mlps if mlp.block not in grouped]
    return CompressionPlan(
        groups=tuple(_plan_group(model, group, config) for group in groups),
        skipped=(*located.skipped, *outside),
        model_parameters=sum(p.numel() for p in model.parameters()),
        model_bytes=state_bytes(model),
    )


def _check_sizes(model: nn.Module, groups: Sequence[LayerGroup], config: CompressionConfig) -> None:
    require_sensible_size([(group, storage_dtype(config, _weight_dtype(model, group))) for group in groups], config)


def _weight_dtype(model: nn.Module, group: LayerGroup) -> torch.dtype:
    dtype = model.get_submodule(group.sites[0].name).weight.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def leave_dense(
    plan: CompressionPlan, model: nn.Module, config: CompressionConfig, reasons: Mapping[str, str]
) -> CompressionPlan:
    """The plan without some layers, by name and reason; the others of their groups go on together.

    Patterns of blocks reorder the hidden neurons of a whole MLP, so there its other layers stay dense too. Raises
    ``NoMatchError`` if nothing is left.
    """
    if not reasons:
        return plan
    reasons = dict(reasons)
    if config.format.block > 1:
        for mlp in (mlp for group in plan.groups for mlp in group.group.mlps):
            first = next((site.name for site in mlp.sites if site.name in reasons), None)
            for site in mlp.sites if first is not None else ():
                reasons.setdefault(site.name, f"`{first}` of its MLP is left dense, and block patterns need all of it")
    left, groups = [], []
    smaller_groups = [group.group.without(reasons) for group in plan.groups]
    if any(smaller_groups):
        _check_sizes(model, [group for group in smaller_groups if group is not None], config)
    for group, smaller in zip(plan.groups, smaller_groups, strict=True):
        for site in group.group.sites:
            if site.name in reasons:
                size = site.width * site.columns
                weight = model.get_submodule(site.name).weight
                assert isinstance(weight, torch.Tensor)
                left.append(LeftDense(site.name, reasons[site.name], size, size * weight.element_size()))
        if smaller is not None:
            groups.append(group if smaller is group.group else _plan_group(model, smaller, config))
    if not groups:
        one = left[0]
        raise NoMatchError(
            f"none of the {len(left)} layers can be compressed on this calibration data: `{one.name}`, {one.reason}"
            + ("" if len(left) == 1 else ", and so on")
            + "; give batches that use these layers, as the model is used"
        )
    return replace(plan, groups=tuple(groups), left_dense=tuple(left))


def _plan_group(model: nn.Module, group: LayerGroup, config: CompressionConfig) -> GroupPlan:
    _check_alignment(group, config)
    weight_dtype = _weight_dtype(model, group)
    dtype = storage_dtype(config, weight_dtype)
    if config.method != "fips-paper":
        return _plan_pruned(group, config, weight_dtype, dtype)
    rank = _paper_rank(group, config, dtype)
    fmt = config.format.name if config.factor_sparsity > 0 else DENSE
    sizes = [rank * site.columns for site in group.sites]
    if config.threshold == "layer":
        nonzeros = sum(num_nonzeros(size=size, sparsity=config.factor_sparsity) for size in sizes)
    else:
        nonzeros = num_nonzeros(size=sum(sizes), sparsity=config.factor_sparsity)
    return GroupPlan(
        group=group,
        rank=rank,
        nonzeros=nonzeros,
        fmt=fmt,
        dtype=dtype,
        dense=dense_footprint(group, itemsize=itemsize(weight_dtype)),
        factored=factored_footprint(group, rank=rank, nonzeros=nonzeros, fmt=fmt, itemsize=itemsize(dtype)),
    )


def storage_dtype(config: CompressionConfig, weight_dtype: torch.dtype) -> torch.dtype:
    """Type of bases, floating values and scales."""
    if config.factor_dtype:
        found: torch.dtype = getattr(torch, config.factor_dtype)
        return found
    return torch.bfloat16 if config.target_bytes is not None and itemsize(weight_dtype) > 2 else weight_dtype


def target_bytes(group: LayerGroup, config: CompressionConfig) -> float:
    """Bytes a group may take on average: a share of its dense matrices in a 16-bit type."""
    assert config.target_bytes is not None
    return config.target_bytes * REFERENCE_ITEMSIZE * group.width * group.columns


def solved_plan(plan: GroupPlan, *, rank: int, layers: Sequence[LayerStorage]) -> GroupPlan:
    """The plan of a group once its structure is known, exact to the byte."""
    formats, kinds = (sorted({getattr(layer, name) for layer in layers}) for name in ("fmt", "values"))
    return replace(
        plan,
        rank=rank,
        nonzeros=sum(layer.nonzeros for layer in layers),
        fmt=", ".join(formats),
        values=", ".join(kinds),
        factored=factored_footprint(plan.group, rank=rank, itemsize=itemsize(plan.dtype), layers=layers),
    )


def _plan_pruned(
    group: LayerGroup, config: CompressionConfig, weight_dtype: torch.dtype, dtype: torch.dtype
) -> GroupPlan:
    """Before anything is measured: equal shares for all groups, no sharing, the widest values that fit where the width
    is to be measured."""
    for values in reversed(config.value_choices):
        layers, fits = _equal_layers(group, config, dtype, values)
        if fits:
            break
    blank = Footprint(0, 0, 0, 0)
    dense = dense_footprint(group, itemsize=itemsize(weight_dtype))
    plan = GroupPlan(group=group, rank=0, nonzeros=0, fmt=BITMASK, dtype=dtype, dense=dense, factored=blank)
    return solved_plan(plan, rank=0, layers=layers)


def _equal_layers(
    group: LayerGroup, config: CompressionConfig, dtype: torch.dtype, values: Values
) -> tuple[list[LayerStorage], bool]:
    """Layers of equal density with values of a kind, and whether they are within the size and not all but empty."""
    size, pattern = group.width * group.columns, config.format
    if pattern.group_kept is not None:
        n, m = pattern.group_kept, pattern.group
        layers = [
            LayerStorage(s.width * s.columns * n // m, pattern.name, values.name, shared=False) for s in group.sites
        ]
        spent = factored_footprint(group, rank=0, itemsize=itemsize(dtype), layers=layers).bytes
        return layers, config.target_bytes is None or spent <= target_bytes(group, config)
    empty = [LayerStorage(0, pattern.name, values.name, shared=False) for _ in group.sites]
    overhead = factored_footprint(group, rank=0, itemsize=itemsize(dtype), layers=empty).bytes
    value_bytes = values.bits_of(itemsize(dtype)) / 8
    left = config.budget * size * value_bytes if config.budget else target_bytes(group, config) - overhead
    kept = min(int(max(left, 0.0) / value_bytes + 1e-9), size)
    share, rest = divmod(kept, len(group.sites))
    layers = [replace(layer, nonzeros=share + (index < rest)) for index, layer in enumerate(empty)]
    return layers, kept >= sum(max(site.width, site.columns) for site in group.sites)


def _paper_rank(group: LayerGroup, config: CompressionConfig, dtype: torch.dtype) -> int:
    multiple = config.format.align
    budget = config.budget
    if budget is None:
        per_entry = (1 - config.factor_sparsity) * itemsize(dtype) + paper_pattern_rate(config)
        cost = group.width * itemsize(dtype) + group.columns * per_entry
        rank = int(target_bytes(group, config) / cost) // multiple * multiple
        budget = rank * (group.width + (1 - config.factor_sparsity) * group.columns) / (group.width * group.columns)
    return rank_for_budget(
        budget=budget, width=group.width, columns=group.columns, sparsity=config.factor_sparsity, multiple=multiple
    )


def _check_whole(model: nn.Module, mlps: Sequence[Mlp], config: CompressionConfig) -> None:
    """Blocks of neighbours reorder hidden neurons, which all layers around them must do alike."""
    if config.format.block == 1 or config.targets is None:
        return
    whole = [{site.name for site in mlp.sites} for mlp in locate_mlps(model).mlps]
    for mlp in mlps:
        if {site.name for site in mlp.sites} not in whole:
            names = ", ".join(f"`{site.name}`" for site in mlp.sites)
            raise ConfigError(
                f"`pattern` {config.pattern} reorders the hidden neurons of whole MLPs, but `targets` takes other "
                f"layers of `{mlp.block}`: {names}; use `pattern: unstructured`"
            )


def _check_alignment(group: LayerGroup, config: CompressionConfig) -> None:
    for site in group.sites:
        blocks, align = config.format.block, config.format.align
        if site.columns % blocks:
            raise ConfigError(
                f"`pattern` {config.pattern} needs hidden sizes that are a multiple of {blocks}, but `{site.name}` has "
                f"{site.columns}; use `pattern: unstructured`"
            )
        inputs = site.columns if site.role == "down" else site.width
        summed = site.role == "down" or config.method == "fips"  # up layers with a basis sum along its rank
        if summed and inputs % align:
            raise ConfigError(
                f"`pattern` {config.pattern} needs inputs that are a multiple of {align}, but `{site.name}` has "
                f"{inputs}; use `pattern: unstructured` or an M that divides {inputs}"
            )
