"""What a search for layers finds: layers that belong together, and what is passed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
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
    if type(module) not in (nn.Linear, Conv1D):
        return f"`{type(module).__name__}`"
    if "weight" not in module._parameters:  # weight_norm and pruning of torch before parametrizations
        return "made anew from other parameters in every call (weight norm, pruning masks)"
    return "given another `forward`" if "forward" in vars(module) else None
