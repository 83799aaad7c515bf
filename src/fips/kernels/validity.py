"""What tensors are, whether what was made from them still holds, and products in the types that they have."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["Snapshot", "is_plain", "is_watched", "needs_grad", "without_autocast"]


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a product of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_plain(*tensors: Tensor) -> bool:
    """Real tensors with memory to read, not stand-ins of a tracer or of the meta device."""
    for t in tensors:  # written out: inside a model, a generator would cost as much as a small product
        if type(t) not in (Tensor, torch.nn.Parameter) or not (t.is_cpu or t.is_cuda):
            return False
    return not (torch._C._functorch.maybe_current_level() or torch._C._get_tracing_state())


def is_watched() -> bool:
    """Whether something looks at torch's operations that would not see a kernel which is none of them.

    Forward-mode differentiation, or a mode of dispatch such as that of ``make_fx``, which records them.
    """
    return bool(forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack())


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, torch multiplies tensors of a device in the types that they have, as compiled kernels do anyway."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


class Snapshot:
    """Where tensors lay, and what was in them, when something was made from them.

    A tensor changes under the same name in three ways, and each needs a look of its own: another object takes its place
    (``load_state_dict(assign=True)``, ``del``), its memory is exchanged (``.data =``, ``.to``; seen by ``data_ptr`` and
    ``nbytes``), or it is written to where it lies (an optimiser, ``copy_``; seen by ``_version``, which tensors of
    inference mode lack). Of ``places`` a kernel keeps only the address and reads the numbers in every call, so writing
    does not count; of ``contents`` something was computed. The tensors are held: while they live no other can lie at
    their address and be taken for them.
    """

    __slots__ = ("_places", "_sizes", "_tensors", "_versions", "_written")

    def __init__(self, *, places: Iterable[Tensor | None] = (), contents: Iterable[Tensor | None] = ()) -> None:
        read = [t for t in contents if t is not None]
        self._tensors = [*(t for t in places if t is not None), *read]
        self._written = [t for t in read if not t.is_inference()]
        self._places, self._sizes, self._versions = self._look()

    @classmethod
    def of(cls, parts: Iterable[Snapshot]) -> Snapshot:
        """One of all that several saw, as they saw it."""
        new = cls()
        for one in parts:
            for name in cls.__slots__:
                getattr(new, name).extend(getattr(one, name))
        return new

    def holds(self) -> bool:
        """Whether the same objects still are what they were."""
        return self._look() == (self._places, self._sizes, self._versions)

    def _look(self) -> tuple[list[int], list[int], list[int]]:
        # without a loop of Python's own: it is part of every small product
        places = list(map(Tensor.data_ptr, self._tensors))
        return places, list(map(_size, self._tensors)), list(map(_version, self._written))

    def equals(self, other: Snapshot) -> bool:
        """Whether another, of tensors that may be other objects, saw the same memory in the same state."""
        return (self._places, self._sizes, self._versions) == (other._places, other._sizes, other._versions)


_size, _version = operator.attrgetter("nbytes"), operator.attrgetter("_version")
