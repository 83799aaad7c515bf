"""Matrices that read the same input, multiplied in one call: queries, keys and values, gate and up.

Nothing says beforehand which layers these are. It is found out by watching: where one product follows another on the
same thread with the same tensor, unchanged, the second follows the first from then on. When the first is asked for the
next time both are computed together, in one parallel region, and the second waits until its layer asks for it with the
same tensor. One that was not asked for stops following. All that only without gradients: one layer may want them and
another not.

A small matrix alone leaves threads waiting for each other and memory waiting for the next matrix: together a model of
Llama-3.2-1B's shapes writes 1.02 times the tokens a second on two cores.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fips.errors import BackendError

__all__ = ["Company", "Waiting"]

MOST = 8
"""Products that are made in one call."""
MISSES = 2
"""Times that a product was made and not asked for after which it is made alone for good."""


class Repeated(Protocol):
    """A product for inputs of one shape."""

    company: Company
    threads: int

    def holds(self) -> bool:
        """Whether its matrix is what it was."""

    def alone(self, x: Tensor) -> Tensor:
        """The product of an input."""


Join = Callable[[Sequence[Any]], Callable[[Tensor], list[Tensor]]]
"""Of several products what makes all of them; whoever calls that keeps them alive meanwhile."""


_Made = tuple[weakref.ref[Tensor], int, Tensor]
"""An input, its version then, and its product."""


class Waiting:
    """What was made for a layer before it asked: one product at most, for one input as it was."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: dict[int, _Made] = {}  # under 0: `pop` gives it to one thread alone

    def __bool__(self) -> bool:
        return bool(self._held)

    def put(self, x: weakref.ref[Tensor], version: int, y: Tensor) -> None:
        self._held[0] = x, version, y

    def take(self, x: Tensor) -> Tensor | None:
        """The product of ``x`` if that is what was made; whatever waits is gone then."""
        held = self._held.pop(0, None)
        if held is None or held[0]() is not x or x.is_inference() or held[1] != x._version or torch.is_grad_enabled():
            return None
        return held[2]


class _Last(threading.local):
    """The last product of a thread that was made when it was asked for, and its input."""

    call: tuple[weakref.ref[Company], weakref.ref[Tensor], int] | None = None


_last = _Last()


class _Group(NamedTuple):
    """Those that follow a product, and what makes all of them: exchanged as a whole, since threads share it."""

    followers: tuple[weakref.ref[Company], ...]
    multiply: Callable[[Tensor], list[Tensor]]


class Company:
    """One product, and those that follow it, which ``join`` makes into one call."""

    __slots__ = ("__weakref__", "_group", "_join", "_misses", "_owner", "waiting")

    def __init__(self, owner: Repeated, join: Join) -> None:
        self._owner, self._join = weakref.ref(owner), join
        self._group: _Group | None = None
        self._misses = 0
        self.waiting = Waiting()
        """Where the layer looks before it asks."""

    def product(self, x: Tensor, owner: Repeated) -> Tensor:
        """That of an input of the shape and type that the owner is for."""
        if torch.is_grad_enabled() or x.is_inference():  # nobody counts what is written into tensors of inference mode
            return owner.alone(x)
        group = self._group
        if group is not None:
            found = self._with_followers(x, group)
            if found is not None:
                return found
        y = owner.alone(x)
        self._watch(x, owner)
        return y

    def _with_followers(self, x: Tensor, group: _Group) -> Tensor | None:
        """The product and, kept for them, those of its followers; None where one of them has gone."""
        others: list[Company] = []
        owners: list[Repeated] = []  # held while their matrices are read
        for ref in group.followers:
            other = ref()
            one = None if other is None else other._owner()
            if other is None or one is None or other.waiting or not one.holds():
                self._leave(other)
                return None
            others.append(other)
            owners.append(one)
        try:
            y, *more = group.multiply(x)
        except (BackendError, MemoryError):  # alone each finds out for itself
            self._group = None
            for other in others:
                other._misses = MISSES
            return None
        seen, version = weakref.ref(x), x._version
        for other, its in zip(others, more, strict=True):
            other.waiting.put(seen, version, its)
        return y

    def _watch(self, x: Tensor, owner: Repeated) -> None:
        """Follow the product before if that had the same input, else be the one that others may follow."""
        call = _last.call
        leader = None if call is None or call[1]() is not x or call[2] != x._version else call[0]()
        if leader is None:
            _last.call = weakref.ref(self), weakref.ref(x), x._version
        elif leader is not self and self._misses < MISSES:
            leader._take_in(self, owner)

    def _take_in(self, other: Company, its_owner: Repeated) -> None:
        owner, present = self._owner(), self._present()
        fits = owner is not None and its_owner.threads == owner.threads
        if fits and other not in present and len(present) + 1 < MOST:
            self._set([*present, other])

    def _leave(self, other: Company | None) -> None:
        """Go on without a follower that was not asked for or is not there any more."""
        if other is not None:
            other._misses += bool(other.waiting)
        self._set([one for one in self._present() if one is not other])

    def _present(self) -> list[Company]:
        group = self._group
        return [] if group is None else [one for ref in group.followers if (one := ref()) is not None]

    def _set(self, followers: Sequence[Company]) -> None:
        members = [(one, owner) for one in (self, *followers) if (owner := one._owner()) is not None]
        refs, owners = tuple(weakref.ref(one) for one, _ in members[1:]), [owner for _, owner in members]
        self._group = _Group(refs, self._join(owners)) if refs else None
