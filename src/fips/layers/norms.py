"""Root mean square norms of a packed model: those of few tokens by the compiled library.

A model's norms are modules of a class of its own, with a ``weight`` and an epsilon under some name, and nothing says
how they round. So it is tried: a copy of the module with random weights has to give what one of the known kinds gives.
Such a module is then called through a ``forward`` of its own, which goes on to that of its class for all other calls.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fips.kernels import cpu, norm

__all__ = ["forget_norms", "is_quick", "quicken_norms"]

EPSILONS = "variance_epsilon", "eps", "epsilon"
SAME = 0.98
"""Share of the numbers that have to be the same bits; sums in another order round few of them otherwise."""


def quicken_norms(model: nn.Module) -> None:
    """Let the norms of a model that are of a known kind take few tokens faster on a CPU."""
    if not cpu.vectors():
        return
    known: dict[tuple[Any, ...], str | None] = {}
    for module in model.modules():
        eps = _epsilon(module)
        if eps is None or "forward" in vars(module):
            continue
        weight = module._parameters["weight"]
        assert weight is not None
        settings = {
            (name, value) for name, value in vars(module).items() if isinstance(value, bool | int | float | str)
        }
        key = type(module), weight.shape, weight.dtype, frozenset(settings)
        if key not in known:
            known[key] = _kind(module, eps)
        kind = known[key]
        if kind is not None:
            module.forward = partial(_forward, module, eps, kind)  # unlike bound methods, these pickle and are copied


def forget_norms(model: nn.Module) -> None:
    """Undo ``quicken_norms``."""
    for module in model.modules():
        if is_quick(module):
            del module.forward


def is_quick(module: nn.Module) -> bool:
    """Whether the module's own ``forward`` is that of ``quicken_norms``."""
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is _forward


def _forward(module: nn.Module, eps: float, kind: str, x: Tensor, *more: Any, **options: Any) -> Any:
    weight = module._parameters.get("weight")
    plain = not more and not options and not torch.compiler.is_compiling()
    if plain and weight is not None and norm.suits(x, weight) and not torch.is_autocast_enabled("cpu"):
        return norm.normalise(x, weight, eps, kind)
    return type(module).forward(module, x, *more, **options)


def _epsilon(module: nn.Module) -> float | None:
    """Of what may be such a norm: a module with one vector of weights in a type of 16 bits, and an epsilon."""
    weight = module._parameters.get("weight")
    if weight is None or len(module._parameters) != 1 or module._modules or any(True for _ in module.buffers()):
        return None
    if weight.dim() != 1 or weight.dtype not in (torch.bfloat16, torch.float16) or not weight.is_cpu:
        return None
    found = [vars(module)[name] for name in EPSILONS if isinstance(vars(module).get(name), float)]
    return found[0] if len(found) == 1 else None


@torch.no_grad()
def _kind(module: nn.Module, eps: float) -> str | None:
    """The kind that gives what the module gives, whatever its weights."""
    generator = torch.Generator().manual_seed(0)
    one = copy.deepcopy(module)
    weight = one._parameters["weight"]
    assert weight is not None
    x = torch.randn(3, weight.numel(), generator=generator).to(weight.dtype)
    weight.copy_(torch.randn(weight.shape, generator=generator))
    x[1] *= eps**0.5  # where the epsilon counts
    if not norm.suits(x, weight):
        return None
    try:
        expected = one(x)
    except Exception:  # not a norm: it wants something else
        return None
    if not isinstance(expected, Tensor) or expected.shape != x.shape or expected.dtype is not x.dtype:
        return None
    same = {kind: float((norm.normalise(x, weight, eps, kind) == expected).float().mean()) for kind in norm.KINDS}
    best = max(same, key=lambda kind: same[kind])
    return best if same[best] >= SAME else None
