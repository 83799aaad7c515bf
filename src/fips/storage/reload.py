"""Can what would be saved be loaded again? Asked before any work, of the model in memory.

The answer is found by doing it without weights: the model that ``config.json`` would describe is built on the meta
device and compared, module by module, with the one in memory.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from fips.errors import ModelError
from fips.layers.dense import plain_class
from fips.layers.linear import BASES
from fips.models.architectures import lies_in_repository, saved_class, saved_config_class
from fips.models.experts import expert_lists, split_experts
from fips.models.timm import is_timm_model, rebuild_timm
from fips.models.transformers import build_from_classes
from fips.storage.companions import auto_map, saved_fields

__all__ = ["check_reloadable"]

_STILL = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
"""Modules that do nothing in evaluation mode, so that one may stand for another."""
_UNDO = "undo that, or change the configuration as well"


def check_reloadable(model: nn.Module, packed: Collection[str]) -> None:
    """Raise ``ModelError`` if a model saved packed would come back as another one, or not at all.

    ``packed`` names the linear layers that are packed or will be; they are stored by their own description. Models
    that are neither of transformers nor of timm cannot be saved; nothing is asked of them.
    """
    if isinstance(model, PreTrainedModel):
        twin: nn.Module = _twin(model)
    elif is_timm_model(model):
        twin = rebuild_timm(model)
    else:
        return
    apart = expert_lists(model)
    split_experts(twin, [name for name in apart if name in dict(twin.named_modules())])
    ids = {id(model.get_submodule(name)) for name in packed}
    places = {place for place, module in model.named_modules(remove_duplicate=False) if id(module) in ids}
    _compare_modules(model, twin, places)
    _compare_tensors(model, twin, places)


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    kind, config = saved_class(type(model)), saved_config_class(type(model.config))
    if lies_in_repository(kind) or lies_in_repository(config):
        auto_map(model)  # finds the files that would be copied
    fields = json.loads(json.dumps(saved_fields(model), default=str))
    return build_from_classes(kind, config, fields)


def _compare_modules(model: nn.Module, twin: nn.Module, packed: Collection[str]) -> None:
    """Modules of the same classes at the same places, shared alike, none with a ``forward`` of its own."""
    wanted = type(twin).__name__
    ours, theirs = (dict(each.named_modules(remove_duplicate=False)) for each in (model, twin))
    _compare_shared(ours, theirs, wanted, cure="register `copy.deepcopy` of one of them")
    for place, module in ours.items():
        if _own(place, packed):
            continue
        if "forward" in vars(module):
            raise _different(wanted, f"{_at(place)} has a `forward` that was set after it was made", _undo(module))
        other = theirs.get(place)
        if other is None:
            raise _different(wanted, f"{_at(place)}, a `{type(module).__name__}`, is not part of it", _undo(module))
        if place and _kind(module) != _kind(other) and not (isinstance(module, _STILL) and isinstance(other, _STILL)):
            what = f"{_at(place)} is a `{type(module).__name__}` instead of a `{type(other).__name__}`"
            raise _different(wanted, what, _undo(module))
    lost = next((place for place in theirs if place not in ours), None)
    if lost is not None:
        raise _different(wanted, f"{_at(lost)} is missing", _UNDO)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """The class of a module as it was made; parametrised ones have a class each, so theirs and what parametrises."""
    if not is_parametrized(module):
        return (plain_class(module),)
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    return type(module).__base__, {name: [type(one) for one in parts.children()] for name, parts in lists.items()}


def _compare_tensors(model: nn.Module, twin: nn.Module, packed: Collection[str]) -> None:
    """Tensors of the same names and shapes, tied alike."""
    wanted = type(twin).__name__
    ours, theirs = (
        {
            name: tensor
            for name, tensor in each.state_dict(keep_vars=True).items()
            if not _own(name.rpartition(".")[0], packed)
        }
        for each in (model, twin)
    )
    _compare_shared(ours, theirs, wanted, cure="untie them, or tie them in the configuration")
    for name in [*ours, *theirs]:
        if name not in theirs or name not in ours:
            what = "is not part of it" if name in ours else "is missing"
            raise _different(wanted, f"tensor `{name}` {what}", "`torch.nn.utils.prune.remove` bakes masks in")
        if ours[name].shape != theirs[name].shape:
            what = f"has shape {tuple(ours[name].shape)} instead of {tuple(theirs[name].shape)}"
            raise _different(wanted, f"tensor `{name}` {what}", _UNDO)


def _own(place: str, packed: Collection[str]) -> bool:
    """Whether what lies at a place is described by the layout of the packed layers, not by the configuration."""
    return place in packed or BASES in place.split(".")


def _compare_shared(ours: dict[str, Any], theirs: dict[str, Any], name: str, *, cure: str) -> None:
    """What is one thing under two names must be so in both, where both have the names."""
    for entries, others, words in ((ours, theirs, "are one"), (theirs, ours, "are two")):
        for first, second in _shared(entries):
            if first in others and second in others and others[first] is not others[second]:
                raise _different(name, f"`{first}` and `{second}` {words}", cure)


def _shared(entries: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs of names for one thing, the first name with every other."""
    first: dict[int, str] = {}
    for name, thing in entries.items():
        if first.setdefault(id(thing), name) != name:
            yield first[id(thing)], name


def _at(place: str) -> str:
    return f"`{place}`" if place else "the model"


def _undo(module: nn.Module) -> str:
    """How to get rid of a change that this module shows."""
    if type(module).__module__.startswith("torch.nn.utils.parametri"):
        return "`torch.nn.utils.parametrize.remove_parametrizations` bakes it in"
    if type(module).__module__.startswith("peft."):
        return "`merge_and_unload` bakes adapters in"
    return _UNDO


def _different(name: str, what: str, cure: str) -> ModelError:
    return ModelError(
        f"the model is not the `{name}` that its configuration describes, so that what is saved could not be loaded: "
        f"{what}; {cure}"
    )
