"""From a model and a setting to what will be built: ranks, kept entries, parameters and bytes. Needs no weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fips.config import CompressionConfig
from fips.errors import ConfigError, ModelError, NoMatchError
from fips.formats.patterns import BITMASK
from fips.layers.linear import factored_layers
from fips.models import LayerGroup, Skipped, Sublayer, locate_layers
from fips.models.experts import experts_apart
from fips.models.wrappers import unwrap
from fips.plan.footprint import Footprint, dense_footprint, itemsize, state_bytes
from fips.plan.groups import GroupPlan, storage_dtype
from fips.plan.least import require_sensible_size
from fips.plan.planner import planner_of
from fips.plan.rest import rest_saving
from fips.plan.size import layer_groups, located_layers, smallest_sizes, weight_dtype, with_bits

__all__ = ["CompressionPlan", "LeftDense", "leave_dense", "plan_compression", "settle_size", "size_note", "uses_size"]


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
    rest_saving: int = 0
    """Bytes that what is in no group takes less in another type, if one is asked for."""

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
        return self.model_bytes - self.rest_saving - self.dense.bytes + self.factored.bytes

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": {"parameters": self.model_parameters, "bytes": self.model_bytes},
            "compressed_model": {"parameters": self.compressed_parameters, "bytes": self.compressed_bytes},
            "layers": {"dense": self.dense.to_dict(), "factored": self.factored.to_dict()},
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

    A ``size`` of the whole file becomes bits (``settle_size``).

    Raises ``NoMatchError`` (nothing to compress), ``BudgetError`` (a size too small to be sensible,
    see ``fips.plan.least``), ``ConfigError``
    (groups or an N:M pattern that do not fit) and ``ModelError`` (already compressed).
    """
    model = unwrap(model)
    if factored_layers(model):
        raise ModelError("the model is already compressed; `fips.merge(model)` turns it back into dense layers")
    with experts_apart(model):
        return _planned(model, config)


def _planned(model: nn.Module, config: CompressionConfig) -> CompressionPlan:
    located = located_layers(model, config)
    _check_whole(model, located.sublayers, config)
    groups = layer_groups(located, config)
    config = with_bits(model, groups, config)
    require_sensible_size(smallest_sizes(model, groups, config), config)
    grouped = {block for group in groups for block in group.blocks}
    outside = [
        Skipped(sublayer.name, "its block is in no group")
        for sublayer in located.sublayers
        if sublayer.block not in grouped
    ]
    return CompressionPlan(
        groups=tuple(_plan_group(model, group, config) for group in groups),
        skipped=(*located.skipped, *outside),
        model_parameters=sum(p.numel() for p in model.parameters()),
        model_bytes=state_bytes(model),
        rest_saving=rest_saving(model, groups, config),
    )


def settle_size(
    plan: CompressionPlan, model: nn.Module, config: CompressionConfig, left: Collection[str] = ()
) -> CompressionConfig:
    """Settings with bits in place of the ``size`` of the whole file that a plan was made for.

    Layers ``left`` dense count among the rest. Raises ``BudgetError`` with the smallest size there is.
    """
    model = unwrap(model)
    with experts_apart(model):
        return with_bits(model, [group.group for group in plan.groups], config, left)


def size_note(asked: CompressionConfig, config: CompressionConfig, groups: Sequence[GroupPlan]) -> str:
    """What becomes of the ``size`` or ``bits`` that were asked for; ``config`` has the bits in the place of a size."""
    if not uses_size(config, groups):
        words = f"{asked.size} would be {config.bits:.4g}" if asked.size is not None else f"asked for {config.bits:.4g}"
        return f"{words} bits a weight; the most that layers take is {_bits_used(groups):.4g}"
    return f"{config.bits:.4g} bits a weight, so that all tensors take {asked.size}"


def uses_size(config: CompressionConfig, groups: Sequence[GroupPlan]) -> bool:
    """Whether layers take nearly all of the bits that they may."""
    return config.bits is None or _bits_used(groups) > 0.97 * config.bits


def _bits_used(groups: Sequence[GroupPlan]) -> float:
    return 8 * sum(group.factored.bytes for group in groups) / sum(group.dense.parameters for group in groups)


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
    if planner_of(config).moves_neurons:
        for sublayer in (sublayer for group in plan.groups for sublayer in group.group.sublayers):
            first = next((site.name for site in sublayer.sites if site.name in reasons), None)
            for site in sublayer.sites if first is not None else ():
                reasons.setdefault(site.name, f"`{first}` of its MLP is left dense, and block patterns need all of it")
    left, groups = [], []
    smaller_groups = [group.group.without(reasons) for group in plan.groups]
    if any(smaller_groups):
        still_there = [group for group in smaller_groups if group is not None]
        require_sensible_size(smallest_sizes(model, still_there, config), config)
    for group, smaller in zip(plan.groups, smaller_groups, strict=True):
        for site in group.group.sites:
            if site.name in reasons:
                size = site.width * site.hidden
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
    saving = rest_saving(model, [group.group for group in groups], config)
    return replace(plan, groups=tuple(groups), left_dense=tuple(left), rest_saving=saving)


def _plan_group(model: nn.Module, group: LayerGroup, config: CompressionConfig) -> GroupPlan:
    planner = planner_of(config)
    planner.check(group)
    dtype = weight_dtype(model, group)
    return planner.plan(
        GroupPlan(
            group=group,
            rank=0,
            kept=0,
            fmt=BITMASK,
            dtype=storage_dtype(config, dtype),
            dense=dense_footprint(group, itemsize=itemsize(dtype)),
            factored=Footprint(0, 0, 0, 0),
        )
    )


def _check_whole(model: nn.Module, sublayers: Sequence[Sublayer], config: CompressionConfig) -> None:
    """Blocks of neighbours reorder hidden neurons, which all layers around them must do alike."""
    if not planner_of(config).moves_neurons:
        return
    for sublayer in sublayers:
        parts = {part.features for site in sublayer.sites for part in site.parts if part.space == "hidden"}
        if len(parts) > 1:
            raise ConfigError(
                f"`method: {config.method}` with this `pattern` reorders hidden neurons, which `{sublayer.name}` mixes "
                f"({' and '.join(map(str, sorted(parts)))} features in its layers); use `pattern: unstructured`"
            )
    if config.targets is None and config.layers == "mlp":
        return
    whole = [{site.name for site in sublayer.sites} for sublayer in locate_layers(model).sublayers]
    for sublayer in sublayers:
        if {site.name for site in sublayer.sites} not in whole:
            names = ", ".join(f"`{site.name}`" for site in sublayer.sites)
            raise ConfigError(
                f"`method: {config.method}` reorders the hidden neurons of whole MLPs, but "
                f"`{'layers' if config.targets is None else 'targets'}` takes other "
                f"layers of `{sublayer.block}`: {names}; use `layers: mlp` or `pattern: unstructured`"
            )
