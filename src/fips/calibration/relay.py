"""Run a model a few blocks at a time over all batches, so that only those blocks need their weights.

``Relay.advance`` runs the next blocks of the model on every batch. The code of the model around them runs as it is,
from its start: blocks that are done answer with what they returned, and the pass ends after the last block of the
step. What a block returned is kept for the next step alone. A chain of blocks asks for no more; a model that reads the
output of an earlier block again would meet numbers that are not there (NaN), which is seen at the inputs of the next
block, and then everything is kept.

A model whose blocks run more than once in a pass, or in another order, is no chain: ``NotAChain``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fips.calibration.preserve import replaced_forward
from fips.calibration.record import ActivationSpool, Stored, map_leaves

__all__ = ["NotAChain", "Relay"]


class NotAChain(Exception):  # noqa: N818 - a signal to go another way, not an error
    """The blocks of a model do not run one after the other, each once."""


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass after the last block of a step."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """A tensor that is not kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def missing(self, device: torch.device) -> Tensor:
        """A tensor of this shape that spoils whatever is computed from it, in the memory of one number."""
        return torch.full((1,), torch.nan, dtype=self.dtype, device=device).expand(self.shape)


class Relay:
    """``blocks`` of a model in the order in which they run; ``run(model, batch)`` makes a forward pass."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        run: Callable[[nn.Module, Any], Any],
        spool: ActivationSpool,
        device: torch.device,
        *,
        keep_all: bool = False,
    ) -> None:
        self.model, self.blocks, self.device = model, list(blocks), device
        self.done = 0
        """Blocks that all batches have been through."""
        self.keep_all = keep_all
        self._run, self._spool = run, spool
        self._returned: list[dict[str, Any]] = []
        """By batch, what every finished block returned: stored, or its shape alone."""

    def advance(self, count: int, batches: Iterable[Any]) -> None:
        """Run the next ``count`` blocks on all batches; hooks of the caller see them at work.

        Raises ``NotAChain``.
        """
        names = self.blocks[self.done : self.done + count]
        with ExitStack() as stack:
            step = stack.enter_context(_Step(self, names))
            for index, batch in enumerate(batches):
                if index == len(self._returned):
                    self._returned.append({})
                step.begin(self._returned[index])
                with suppress(_Stop):
                    self._run(self.model, batch)
                step.end()
        self.done += len(names)

    def probe(self, example: Any) -> None:
        """One pass over an example that shows whether the blocks run one after the other, each once; ``NotAChain``."""
        order: list[str] = []
        with ExitStack() as stack:
            for name in self.blocks:
                hook = self.model.get_submodule(name).register_forward_pre_hook(
                    lambda *_, name=name: order.append(name)
                )
                stack.callback(hook.remove)
            self._run(self.model, example)
        if order != self.blocks:
            raise NotAChain

    def whole(self, batches: Iterable[Any]) -> None:
        """All blocks in one step, after which nothing is kept."""
        with ExitStack() as stack:
            stack.callback(self.model.get_submodule(self.blocks[-1]).register_forward_hook(_stop).remove)
            for batch in batches:
                with suppress(_Stop):
                    self._run(self.model, batch)
        self.done = len(self.blocks)

    def keep(self, leaf: Any) -> Any:
        return self._spool.put(leaf) if isinstance(leaf, Tensor) else leaf

    def drop(self, leaf: Any) -> Any:
        """A stored tensor that no block will ask for again."""
        if isinstance(leaf, Stored):
            self._spool.forget(leaf)
            return _Shape(leaf.shape, leaf.dtype)
        return leaf

    def restore(self, leaf: Any) -> Any:
        if isinstance(leaf, Stored):
            return self._spool.get(leaf).to(self.device)
        return leaf.missing(self.device) if isinstance(leaf, _Shape) else leaf


class _Step:
    """One step of a relay: what finished blocks answer, and what those at work return."""

    def __init__(self, relay: Relay, names: Sequence[str]) -> None:
        self._relay, self._names = relay, list(names)
        self._finished = relay.blocks[: relay.done]
        self._known: dict[str, Any] = {}
        self._new: dict[str, Any] = {}
        self._order: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> _Step:
        relay = self._relay
        for name in self._finished:
            self._stack.enter_context(replaced_forward(relay.model.get_submodule(name), self._answer(name)))
        for name in self._names:
            block = relay.model.get_submodule(name)
            self._stack.callback(block.register_forward_pre_hook(self._before(name), with_kwargs=True).remove)
            self._stack.callback(block.register_forward_hook(self._after(name)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self, known: dict[str, Any]) -> None:
        self._known, self._new, self._order = known, {}, []

    def end(self) -> None:
        """Keep what the next step needs, and drop the rest."""
        if self._order != [*self._finished, *self._names]:
            raise NotAChain
        relay = self._relay
        if not relay.keep_all and self._names:
            for name, tree in self._known.items():
                self._known[name] = map_leaves(tree, relay.drop)
        self._known.update(self._new)

    def _answer(self, name: str) -> Callable[..., Any]:
        def forward(*_: Any, **__: Any) -> Any:
            self._order.append(name)
            return map_leaves(self._known[name], self._relay.restore)

        return forward

    def _before(self, name: str) -> Callable[..., None]:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._order.append(name)
            if not self._relay.keep_all and name == self._names[0]:
                map_leaves((args, kwargs), _require_numbers)

        return before

    def _after(self, name: str) -> Callable[..., None]:
        last = name == self._names[-1]
        keep = self._relay.keep if last or self._relay.keep_all else _shape

        def after(_: nn.Module, __: Any, output: Any) -> None:
            self._new[name] = map_leaves(output, keep)
            if last:
                raise _Stop

        return after


def _stop(*_: Any) -> None:
    raise _Stop


def _shape(leaf: Any) -> Any:
    return _Shape(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _require_numbers(leaf: Any) -> None:
    """Raise ``NotAChain`` where an output that was not kept has been read."""
    if isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any()):
        raise NotAChain
