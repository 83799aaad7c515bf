"""What a search for layers finds: layers that belong together, and what is passed over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from fips.models.sites import Site

__all__ = ["Skipped", "Sublayer", "oddity"]


@dataclass(frozen=True, slots=True)
class Sublayer:
    """The linear layers of one MLP or attention, or those of a block that ``targets`` names, and their block."""

    name: str
    block: str
    block_list: str
    kind: Literal["plain", "gated", "fused-gated", "attention", "custom", "embedding", "head", "tied"]
    sites: tuple[Site, ...]

    @property
    def is_end(self) -> bool:
        """Whether it is an embedding, a head, or both in one matrix: no part of a repeated block.

        ``block`` is then the module that multiplies by the matrix, or looks its rows up where none does.
        """
        return self.kind in ("embedding", "head", "tied")

    @property
    def names(self) -> tuple[str, ...]:
        """The names that patterns may mean it by: its own, and that of the mixture whose expert it is."""
        return tuple(name for name in dict.fromkeys((self.name, self.sites[0].mixture)) if name)

    @property
    def width(self) -> int:
        return self.sites[0].width


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that holds MLP-like parameters and is left as it is."""

    name: str
    reason: str
    end: bool = False
    """Whether it is an embedding or a head that was asked for."""


def oddity(module: nn.Module) -> str | None:
    """What makes a layer more than its weight and bias; None for a plain one."""
    if type(module) not in (nn.Linear, Conv1D) and not (isinstance(module, nn.Linear) and _computes_alike(module)):
        return f"`{type(module).__name__}`"
    if "weight" not in module._parameters:  # weight_norm and pruning of torch before parametrizations
        return "made anew from other parameters in every call (weight norm, pruning masks)"
    return "given another `forward`" if "forward" in vars(module) else None


def _computes_alike(module: nn.Linear) -> bool:
    """Whether a layer of a subclass of ``nn.Linear`` does what that does, as a small layer made by its class tells.

    It must have nothing that the small one has not: no other tensors, no other settings.
    """
    kind: Any = type(module)
    small = _small_settings(kind)
    return small is not None and small == _settings(module) and not module._modules and not module._buffers


@cache
def _small_settings(kind: Any) -> Mapping[str, Any] | None:
    """What a small layer of a class has beside its sizes; None where it computes anything else than ``nn.Linear``.

    Of ``nn.MultiheadAttention`` the output projection is another thing: its weight is read past the layer.
    """
    if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return None
    try:
        with torch.device("cpu"), torch.no_grad():
            small, x = kind(3, 2), torch.tensor([[1.0, -2.0, 3.0]])
            weights = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([0.5, -0.5])}
            alike = torch.equal(functional_call(small, weights, (x,)), nn.functional.linear(x, **weights))
            return _settings(small) if alike else None
    except Exception:  # a class that is made in another way
        return None


def _settings(module: nn.Linear) -> dict[str, Any]:
    """What a layer has been given beside sizes and mode, and the names of its parameters."""
    own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    return {
        **{key: value for key, value in own.items() if key not in ("training", "in_features", "out_features")},
        "": frozenset(module._parameters),
    }
