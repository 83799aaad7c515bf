"""One warning where somebody trains a model whose packed integers stay as they are."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from fips.layers.linear import FactoredLinear, factored_layers

__all__ = ["ignore_training", "watch_training"]

log = logging.getLogger("fips.training")


def watch_training(model: nn.Module) -> None:
    """Look at the first forward pass in training mode and say once what training leaves alone, if that is a surprise.

    It is one where everything around the packed layers trains and ``fips.prepare_qat`` was not called, which leaves
    only a packed embedding as it is. Adapters and parts trained on purpose leave the rest of
    their block frozen, and are met with silence.
    """
    if _look not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_look)


def ignore_training(model: nn.Module) -> None:
    """Undo ``watch_training``."""
    for number, hook in list(model._forward_pre_hooks.items()):
        if hook is _look:
            del model._forward_pre_hooks[number]


def _look(model: nn.Module, _: Any) -> None:
    if not model.training or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    ignore_training(model)
    added, layers = _adapter_parameters(model), factored_layers(model)
    surprising = [layer for name, layer in layers.items() if _is_surprising(model, name, layer, added)]
    if not surprising or any(layer.trains_numbers for layer in layers.values()):  # then `prepare_qat` was called
        return
    fixed = sum(layer.kept for layer in surprising)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    log.warning(
        "training leaves the integers and scales of %d packed layers as they are: %s of %s numbers (%.0f %%). "
        "`fips.prepare_qat(model)` lets them train, until `fips.finish_qat(model)`; "
        "LoRA adapts them as they are; `distill` (`--distill STEPS`) trains them while compressing",
        len(surprising), f"{fixed:,}", f"{fixed + trained:,}", 100 * fixed / (fixed + trained),
    )  # fmt: skip


def _is_surprising(model: nn.Module, name: str, layer: FactoredLinear, added: set[int]) -> bool:
    """Whether integers stand where everything else trains: all parameters of the nearest module with any."""
    if layer.bits is None or layer.trains_numbers:
        return False
    while name:
        name = name.rpartition(".")[0]
        parameters = [item for item in model.get_submodule(name).parameters() if id(item) not in added]
        if parameters:
            return all(parameter.requires_grad for parameter in parameters)
    return False


def _adapter_parameters(model: nn.Module) -> set[int]:
    """Parameters that wrappers with a ``base_layer``, such as those of peft, have added to it."""
    added: set[int] = set()
    for wrapper in model.modules():
        base = getattr(wrapper, "base_layer", None)
        if isinstance(base, nn.Module):
            added |= {id(item) for item in wrapper.parameters()} - {id(item) for item in base.parameters()}
    return added
