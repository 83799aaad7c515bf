"""Finished layers and groups as tensors and fields that a store keeps, and back: where a run that was ended goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from fips.layers.linear import FactoredLinear, SharedBasis
from fips.methods.workbench import CompressedGroup, Workbench
from fips.plan.footprint import Footprint
from fips.plan.groups import GroupPlan
from fips.training.reconstruct import BlockError

__all__ = ["Made", "is_kept", "kept_group", "layer_from", "layer_parts"]

Made = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors, and fields for JSON."""


def layer_parts(name: str, layer: FactoredLinear) -> Made:
    """The tensors of a layer under its name, and what makes an empty one like it."""
    tensors = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items() if key != "weight"}
    return tensors, {**layer.arguments(), "conv1d": layer.conv1d}


def layer_from(
    name: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any], device: torch.device, basis: SharedBasis | None
) -> FactoredLinear:
    """The layer that ``layer_parts`` took apart."""
    known = dict(fields)
    conv1d = known.pop("conv1d")
    with torch.device("meta"):
        layer = FactoredLinear(basis, **known)
    prefix = f"{name}."
    own = {key.removeprefix(prefix): one.to(device) for key, one in tensors.items() if key.startswith(prefix)}
    layer.load_state_dict({**own, "weight": torch.empty(0, device=device)}, assign=True)
    layer.conv1d = conv1d
    return layer


def is_kept(bench: Workbench, plan: GroupPlan) -> bool:
    """Whether a group is finished, in this run or in one that was ended."""
    return bench.store.has(_piece(plan))


def kept_group(bench: Workbench, plan: GroupPlan, make: Callable[[], CompressedGroup]) -> CompressedGroup:
    """A group as it was kept, or as it is made now, and then kept.

    What ``make`` gives must depend on nothing that the groups before it have left behind.
    """
    made = bench.store.get(_piece(plan))
    if made is not None:
        bench.note_kept(made[1])
        return _put_together(bench, plan, *made)
    with bench.noted() as notes:
        found = make()
    tensors, fields = _taken_apart(found)
    bench.store.put(_piece(plan), tensors, {**fields, "notes": notes})
    bench.store.log(f"group {plan.group.name}: {found.seconds:.1f} s")
    return found


def _piece(plan: GroupPlan) -> str:
    return f"group-{plan.group.name}"


def _taken_apart(group: CompressedGroup) -> Made:
    tensors: dict[str, Tensor] = {f"basis.{name}": basis.weight for name, basis in group.bases.items()}
    names = {id(basis): name for name, basis in group.bases.items()}
    layers = {}
    for name, layer in group.layers.items():
        own, fields = layer_parts(name, layer)
        tensors |= own
        layers[name] = {**fields, "basis": None if layer.basis is None else names[id(layer.basis)]}
    plan = group.plan
    return tensors, {
        "plan": {"rank": plan.rank, "kept": plan.kept, "fmt": plan.fmt, "values": plan.values},
        "factored": asdict(plan.factored),
        "layers": layers,
        "start": [asdict(one) for one in group.start],
        "final": [asdict(one) for one in group.final],
        "losses": list(group.losses),
        "seconds": group.seconds,
    }


def _put_together(
    bench: Workbench, plan: GroupPlan, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> CompressedGroup:
    weights = {
        name.removeprefix("basis."): tensor.to(bench.device)
        for name, tensor in tensors.items() if name.startswith("basis.")
    }  # fmt: skip
    bases = {name: SharedBasis.of(weight, weight.dtype) for name, weight in weights.items()}
    layers = {}
    for name, known in fields["layers"].items():
        known = dict(known)
        basis = known.pop("basis")
        layers[name] = layer_from(name, tensors, known, bench.device, None if basis is None else bases[basis])
    return CompressedGroup(
        replace(plan, **fields["plan"], factored=Footprint(**fields["factored"])),
        bases,
        layers,
        tuple(BlockError(**one) for one in fields["start"]),
        tuple(BlockError(**one) for one in fields["final"]),
        tuple(fields["losses"]),
        fields["seconds"],
    )
