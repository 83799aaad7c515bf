"""Root mean square norms of a packed model: those of few tokens by the compiled library.

A model's norms are modules of a class of its own, with a ``weight`` and an epsilon under some name, and nothing says
how they round. So it is tried: a copy of the module with random weights has to give what one of the known kinds gives.
Such modules are marked, and the ``forward`` of their class is put behind a function that knows the mark; all other
calls, and modules without it, go on to that ``forward``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fips.kernels import cpu, norm

__all__ = ["EPSILONS", "forget_norms", "known_norm", "quicken_norms"]

MARK = "fips_norm"
EPSILONS = "variance_epsilon", "eps", "epsilon"
"""Names that norms have for what is added to the mean square."""
SAME = 0.98
"""Share of the numbers that have to be the same bits; sums in another order round few of them otherwise."""


class _Mark(NamedTuple):
    kind: str
    epsilon: str
    """Its name: its value is that of the moment."""


def quicken_norms(model: nn.Module) -> None:
    """Let the norms of a model that are of a known kind take few tokens faster on a CPU."""
    if not cpu.vectors():
        return
    known: dict[tuple[Any, ...], str | None] = {}
    for module in model.modules():
        epsilon = _epsilon(module)
        if epsilon is None or MARK in vars(module) or "forward" in vars(module):
            continue
        weight = module._parameters["weight"]
        assert weight is not None
        settings = {
            (name, value) for name, value in vars(module).items() if isinstance(value, bool | int | float | str)
        }
        key = type(module), weight.shape, weight.dtype, frozenset(settings)
        if key not in known:
            known[key] = _kind(module, epsilon)
        kind = known[key]
        if kind is not None:
            setattr(module, MARK, _Mark(kind, epsilon))
            _put_before(type(module))


def forget_norms(model: nn.Module) -> None:
    """Undo ``quicken_norms``; what stands before the class asks for marks in vain."""
    for module in model.modules():
        vars(module).pop(MARK, None)


def known_norm(module: nn.Module) -> norm.Norm | None:
    """What a marked module computes; None for others."""
    mark, weight = vars(module).get(MARK), module._parameters.get("weight")
    eps = None if mark is None else vars(module).get(mark.epsilon)
    if mark is None or weight is None or not isinstance(eps, float) or "forward" in vars(module):
        return None
    return norm.Norm(weight, eps, mark.kind)


def _put_before(kind: type[nn.Module]) -> None:
    own = kind.forward
    if not hasattr(own, MARK):
        kind.forward = _before(own)


def _before(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def forward(self: nn.Module, x: Tensor, *more: Any, **options: Any) -> Any:
        mark = vars(self).get(MARK)
        if mark is None or more or options or torch.compiler.is_compiling():
            return own(self, x, *more, **options)
        weight, eps = self._parameters.get("weight"), vars(self).get(mark.epsilon)
        if (
            weight is None
            or not isinstance(eps, float)
            or torch.is_autocast_enabled("cpu")
            or not norm.suits(x, weight)
        ):
            return own(self, x)
        return norm.normalise(x, weight, eps, mark.kind)

    setattr(forward, MARK, True)
    return forward


def _epsilon(module: nn.Module) -> str | None:
    """The name of the epsilon of what may be such a norm: a module with nothing but a vector of 16 bits beside it."""
    weight = module._parameters.get("weight")
    if weight is None or len(module._parameters) != 1 or module._modules or any(True for _ in module.buffers()):
        return None
    if weight.dim() != 1 or weight.dtype not in (torch.bfloat16, torch.float16) or not weight.is_cpu:
        return None
    found = [name for name in EPSILONS if isinstance(vars(module).get(name), float)]
    return found[0] if len(found) == 1 else None


@torch.no_grad()
def _kind(module: nn.Module, epsilon: str) -> str | None:
    """The kind that gives what the module gives, whatever its weights."""
    generator = torch.Generator().manual_seed(0)
    one, eps = copy.deepcopy(module), float(getattr(module, epsilon))
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
