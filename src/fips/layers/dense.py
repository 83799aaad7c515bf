"""Dense layers in bfloat16 that a packed model keeps: the kernels read one or two tokens' worth faster than torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fips.kernels.basis import BasisRuntime
from fips.layers.linear import offloaded
from fips.models.experts import ExpertList

__all__ = ["DenseLinear", "forget_dense", "plain_class", "quicken_dense"]

_LEAST = 1 << 18
"""Weights from which on a product takes longer than what is asked around it."""


class DenseLinear(nn.Linear):
    """``nn.Linear`` whose products with one or two tokens in bfloat16 on a CPU are those of the compiled kernels.

    With one token they take 0.3 to 0.8 of the time of torch 2.13 on two cores of Zen 4, with two 0.4 to 0.95, with more
    up to 1.2; sums run in float32 either way. All else is left to torch.
    """

    MOST = 2
    """Tokens."""
    _runtime: BasisRuntime | None = None

    def forward(self, x: Tensor) -> Tensor:
        few = x.dtype is torch.bfloat16 and x.shape[-1:] == (self.in_features,) and x.numel() <= self.MOST * x.shape[-1]
        if not few or torch.compiler.is_compiling():
            return linear(x, self.weight, self.bias)
        if self._runtime is None:
            self._runtime = BasisRuntime()
        return self._runtime.multiply(x, self.weight, expand=True, bias=self.bias, offloaded=offloaded(self))


def quicken_dense(model: nn.Module) -> None:
    """Make the plain layers in bfloat16 of a model such layers, but for the small ones and experts."""
    experts = {id(child) for module in model.modules() if isinstance(module, ExpertList) for child in module.modules()}
    for module in model.modules():
        if type(module) is not nn.Linear or id(module) in experts:
            continue
        if module.weight.dtype is torch.bfloat16 and module.weight.numel() >= _LEAST:
            module.__class__ = DenseLinear


def forget_dense(model: nn.Module) -> None:
    """Undo ``quicken_dense``."""
    for module in model.modules():
        if type(module) is DenseLinear:
            vars(module).pop("_runtime", None)
            module.__class__ = nn.Linear  # type: ignore[assignment]


def plain_class(module: nn.Module) -> Any:
    """The class of a module as it was made."""
    return nn.Linear if type(module) is DenseLinear else type(module)
