"""Which tokens count: those that a model's attention mask keeps, for every layer and every output.

Lengths do not tell which mask belongs to a tensor: 16 examples of 16 tokens look like 16 images of 16 patches, and an
encoder and a decoder may read equally many tokens. So the masks are followed through the calls of the modules around a
layer (``TokenTracker``):

* A module that takes an ``attention_mask`` decides for everything inside it: a 2-D mask says which tokens count, no
  mask says that all do. Masks of more axes count only where no 2-D mask is known: a token counts if some query may
  see it and it sees something itself.
* A module that takes none keeps the mask of the module around it as long as its input is still made of those tokens:
  (E, T, ...), (T, E, ...), or within a module that was given (E, T, D) also (E * T, ...). Inside any other, such as
  the image tower of a model that reads text too, all tokens count.
* What an expert reads is some of the tokens that the list of experts around it was given (``fips.models.experts``).
  Experts that a model calls itself, one by one, do not say which tokens theirs are: all count.
* What cross attention reads (the very tensor that a module around it was given as encoder states, keys and values)
  counts by the mask that came with that tensor.

Padding on the left or right is the same. Packed sequences (``position_ids`` that start again) have no padding.

Shape legend: E examples, T tokens, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fips.calibration.heads import ScoredHead, read_heads
from fips.models.experts import ExpertList

__all__ = ["TokenTracker"]

MASKED = -1e4
"""Numbers added to attention scores hide a token from here down."""
_DECODER = ("decoder_attention_mask", "decoder_input_ids", "decoder_inputs_embeds")
_CONTEXTS = ("encoder", "key_value", "cross", "memory", "context")
"""Parts of the names of arguments that hold features of other tokens than those of a module's first argument."""


@dataclass(slots=True)
class _Call:
    """One call of a module: the mask of its tokens, None where all count, and features that came with other masks."""

    mask: Tensor | None = None
    hidden: bool = False
    """Whether the module, or one around it with the same mask, was given (E, T, D) features."""
    contexts: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    experts: ExpertList | None = None
    """Around the module, which works on some of the tokens."""

    def rows(self, x: Tensor) -> Tensor | None:
        """The mask laid out like the rows of a tensor, flat; None if the tensor holds other tokens, or all count."""
        mask = self.mask
        if mask is None:
            return None
        chosen = None if self.experts is None else self.experts.rows_N
        if chosen is not None:
            return mask.flatten()[chosen] if x.dim() == 2 and len(x) == len(chosen) else None
        leading = x.shape if not x.is_floating_point() and x.shape == mask.shape else x.shape[:-1]
        if leading == mask.shape:
            return mask.flatten()
        if mask.dim() == 2 and leading == mask.T.shape:
            return mask.T.flatten()
        if self.hidden and x.dim() == 2 and x.shape[0] == mask.numel():
            return mask.flatten()
        return None


class TokenTracker(AbstractContextManager["TokenTracker"]):
    """Follows the masks of a model's forward passes by hooks on the modules named and on those around them.

    Make it after registering the hooks that ask it: a module's call ends for the tracker when its own hook runs.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._calls: list[_Call] = []
        self._root: dict[str, Any] = {}
        self._read: list[tuple[Tensor, Tensor | None]] = []
        """Masks of the pass so far and what they say, since all layers of a model share a few."""
        self._parameters: dict[type, tuple[str, ...]] = {}
        self._model = model
        self._handles = []
        for path in sorted({path for name in names for path in _paths(name)} | {""}):
            module = model.get_submodule(path)
            self._handles.append(module.register_forward_pre_hook(self._enter(path), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def counted(self, x: Tensor) -> Tensor | None:
        """Which rows of ``x`` (..., D) count, flat; None if all do. For forward hooks of the modules named.

        ``x`` is what the module was given or returns.
        """
        if not self._calls:
            return None
        for tensor, mask in self._calls[-1].contexts:
            if _same(x, tensor):
                return None if mask is None else mask.flatten()
        return self._calls[-1].rows(x)

    def heads(self, output: Any) -> list[ScoredHead]:
        """What the last pass returned (``fips.calibration.heads.read_heads``), with the padding of it marked."""
        return [self._marked(head) for head in read_heads(output, self._model)]

    def _marked(self, head: ScoredHead) -> ScoredHead:
        scores = head.scores
        if scores.dim() == 2 and not head.over_tokens:
            return head  # one row for every example
        mask = self._output_mask(scores.shape)
        if mask is None:
            return head
        if head.over_tokens:
            head.choices = mask.to(scores.device)
            return head
        rows = mask.reshape(*mask.shape, *[1] * (scores.dim() - mask.dim() - 1)).expand(scores.shape[:-1])
        head.counted = rows.to(scores.device)
        return head

    def _output_mask(self, shape: torch.Size) -> Tensor | None:
        """The mask that the leading axes of an output have: the decoder's where the model has one."""
        if any(name in self._root for name in _DECODER):
            found = [self._mask(self._root.get("decoder_attention_mask"), self._root.get("decoder_input_ids"))]
        elif not isinstance(self._root.get("attention_mask"), Tensor):
            found = []
        else:  # of frames the model makes a mask of its own from that of samples
            root = self._mask(self._root["attention_mask"], self._root.get("input_ids"))
            found = [root, *(mask for _, mask in reversed(self._read))]
        return next((mask for mask in found if mask is not None and shape[: mask.dim()] == mask.shape), None)

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = self._named(module, args, kwargs)
            if path == "":
                self._calls.clear()  # of a pass that was cut short
                self._read.clear()
                self._root = given
            call = self._call(given, self._calls[-1] if self._calls else _Call())
            if isinstance(module, ExpertList) and call.mask is not None:
                call.experts = module
            self._calls.append(call)

        return hook

    def _leave(self, _: nn.Module, __: Any, ___: Any) -> None:
        if self._calls:
            self._calls.pop()

    def _named(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name in the order of the signature; a parameter that was not given is None."""
        kind = type(module)
        if kind not in self._parameters:
            self._parameters[kind] = _parameters_of(module)
        names = self._parameters[kind]
        positional = {names[index] if index < len(names) else f"*{index}": arg for index, arg in enumerate(args)}
        return {**dict.fromkeys(names), **positional, **kwargs}

    def _call(self, given: Mapping[str, Any], around: _Call) -> _Call:
        features = {name: value for name, value in given.items() if isinstance(value, Tensor) and "mask" not in name}
        main = next(iter(features.values()), None)
        same = main is None or around.mask is None or around.rows(main) is not None
        mask = given.get("attention_mask")
        if "attention_mask" not in given or (mask is not None and not isinstance(mask, Tensor)):
            kept = around.mask if same else None  # masks of some library's own are made of the one at hand
        elif mask is not None and mask.dim() > 2 and around.mask is not None and same:
            kept = around.mask  # and so are those by query and key
        else:
            kept = self._mask(mask, main)
        hidden = around.hidden and kept is around.mask
        if main is not None and main.dim() == 3 and main.is_floating_point():
            hidden = hidden or _Call(kept).rows(main) is not None
        return _Call(kept, hidden, self._contexts(given, main, around), around.experts)

    def _contexts(
        self, given: Mapping[str, Any], main: Tensor | None, around: _Call
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Features of other tokens that a module was given, and those given to the modules around it."""
        found = list(around.contexts)
        mask = self._mask(given.get("encoder_attention_mask"), None)
        for name, value in given.items():
            if value is main or not isinstance(value, Tensor) or value.dim() != 3 or "mask" in name:
                continue
            if any(part in name for part in _CONTEXTS) and not any(_same(value, known) for known, _ in found):
                found.append((value, mask if mask is not None and mask.shape == value.shape[:2] else None))
        return found

    def _mask(self, mask: Any, tokens: Tensor | None) -> Tensor | None:
        """Which tokens a mask keeps, one entry for each; None where it keeps all. ``tokens`` are what it may mask."""
        if not isinstance(mask, Tensor):
            return None
        for known, kept in self._read:
            if known is mask:
                return kept
        by_token = mask.dim() == 2 or (
            isinstance(tokens, Tensor) and not tokens.is_floating_point() and tokens.shape == mask.shape
        )
        kept = _kept(mask) if by_token else _seen(mask)
        self._read.append((mask, None if bool(kept.all()) else kept))
        return self._read[-1][1]


def _paths(name: str) -> list[str]:
    """The name of a module and of all modules around it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) + 1)]


def _parameters_of(module: nn.Module) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    anonymous = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind not in anonymous)


def _same(x: Tensor, tensor: Tensor) -> bool:
    return x is tensor or (x.shape == tensor.shape and x.dtype == tensor.dtype and x.data_ptr() == tensor.data_ptr())


def _kept(mask: Tensor) -> Tensor:
    """A mask as booleans: True, a number other than 0, or what hides nothing where numbers are added to scores."""
    if mask.dtype == torch.bool:
        return mask
    added = mask.is_floating_point() and (bool((mask < 0).any()) or (mask.dim() > 2 and not bool((mask > 0).any())))
    return mask > MASKED if added else mask != 0


def _seen(mask: Tensor) -> Tensor:
    """(E, ..., queries, keys) to (E, keys): those some query sees and, where every key is a query too, that see any."""
    allowed = _kept(mask)
    if allowed.dim() > 3:
        allowed = allowed.flatten(1, -3).any(1)
    seen = allowed.any(-2)
    return seen & allowed.any(-1) if allowed.shape[-1] == allowed.shape[-2] else seen
