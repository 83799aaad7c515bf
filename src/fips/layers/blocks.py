"""Blocks of a packed decoder that take a single token in one call of the compiled library, on a CPU.

Of a token of a small model most is Python: a dozen modules of every block, their hooks, torch's operations on a few
numbers. ``quicken_blocks`` marks the blocks that are built like Llama's (attention turned by position, an MLP with a
gate, norms before or behind either) or like Phi 3's, where one matrix gives queries, keys and values and one the gate
and what it multiplies, and puts a function before the call of their class that knows the mark. Nothing says what else
such a block computes, so it is tried: when a block is called with one token for the second time, both ways get the same
random input beside the tokens before, and have to give the same bits but for few. A block that fails is left alone for
good.

Everything else goes on to the modules: several tokens, a mask that hides more than padding in front, gradients,
autocast, another kind of cache, hooks, a module that was exchanged, and whatever ``fips.kernels.block`` does not know.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.utils import output_capturing

from fips.kernels import cpu, registry
from fips.kernels.block import Block, Heads, activation_of
from fips.kernels.cpu import Repeat
from fips.kernels.runtime import Places
from fips.layers.cache import Growing, growing
from fips.layers.decoding import hidden_by
from fips.layers.linear import FactoredLinear
from fips.layers.norms import EPSILONS, known_norm

__all__ = ["forget_blocks", "quicken_blocks"]

MARK = "fips_block"
SAME = 0.9
"""Share of the numbers that have to be the same bits in both ways; where something else is computed, few are."""
SCALES = 1e-1, 1e-2, 1e-3
"""Sizes of the random input, of which the first is taken whose output it hardly counts in."""
TRIES = 3
"""Times that a block could not be made into one call after which it is not looked at again."""
CAP = "attn_logit_softcapping"
"""What attention modules call the cap of scores."""
HARMLESS = frozenset({"position_ids", "cache_position", "use_cache"})
"""Arguments that such blocks do not read, beside those that are None or False."""

_Place = tuple[str, str]
_APART = (
    ("self_attn", "q_proj"), ("self_attn", "k_proj"), ("self_attn", "v_proj"), ("self_attn", "o_proj"),
    ("mlp", "gate_proj"), ("mlp", "up_proj"), ("mlp", "down_proj"),
)  # fmt: skip
_FUSED = ("self_attn", "qkv_proj"), None, None, _APART[3], ("mlp", "gate_up_proj"), None, _APART[6]
_LINEAR: tuple[tuple[_Place | None, ...], ...] = _APART, _FUSED
"""Places of the seven matrices of ``fips.kernels.block`` in blocks like those of Llama and of Phi 3."""
_HEADS = ("self_attn", "q_norm"), ("self_attn", "k_norm")
_BEFORE = ("", "input_layernorm"), ("", "post_attention_layernorm"), *_HEADS, None, None
_BEHIND = None, None, *_HEADS, ("", "post_attention_layernorm"), ("", "post_feedforward_layernorm")
_AROUND = ("", "input_layernorm"), ("", "pre_feedforward_layernorm"), *_BEHIND[2:]
_NORMS = _BEFORE, _BEHIND, _AROUND
"""Places of the six norms of ``fips.kernels.block`` in blocks like those of Llama, of EXAONE 4 and of Gemma 3."""
_GET: Any = dict.get
_ACTIVATIONS = ("mlp", "act_fn"), ("mlp", "activation_fn")
_DROPOUTS = ("", "resid_attn_dropout"), ("", "resid_mlp_dropout")
_OTHERS = ("", "self_attn"), ("", "mlp"), *_ACTIVATIONS, *_DROPOUTS


def quicken_blocks(model: nn.Module) -> None:
    """Let the blocks of a model that are built in the known way take single tokens faster on a CPU."""
    if not cpu.vectors():
        return
    for module in model.modules():
        if MARK not in vars(module) and _Parts.of(module) is not None and _put_before(type(module)):
            setattr(module, MARK, _Quick())


def forget_blocks(model: nn.Module) -> None:
    """Undo ``quicken_blocks``; what stands before the class asks for marks in vain."""
    for module in model.modules():
        vars(module).pop(MARK, None)


def _put_before(kind: type[nn.Module]) -> bool:
    """Before ``__call__``: transformers looks whose ``forward`` a block has, to see what is to be checkpointed."""
    if kind.__call__ is not nn.Module.__call__:
        return hasattr(kind.__call__, MARK)

    def __call__(self: nn.Module, *inputs: Any, **options: Any) -> Any:  # noqa: N807
        if len(inputs) == 1 and not torch.compiler.is_compiling():
            quick = vars(self).get(MARK)
            y = None if quick is None else quick.output(self, inputs[0], options)
            if y is not None:
                return y
        return nn.Module.__call__(self, *inputs, **options)

    setattr(__call__, MARK, True)
    kind.__call__ = __call__  # type: ignore[method-assign]
    return True


class _Parts(NamedTuple):
    """The modules of a block."""

    homes: dict[str, nn.Module]
    """The block, its attention and its MLP, by what they are called above."""
    linear: tuple[FactoredLinear | None, ...]
    norms: tuple[nn.Module | None, ...]
    activation: nn.Module
    dropouts: tuple[nn.Module, ...]

    @classmethod
    def of(cls, block: nn.Module) -> _Parts | None:
        """None where one is missing or there is one more."""
        attention, mlp = block._modules.get("self_attn"), block._modules.get("mlp")
        if attention is None or mlp is None:
            return None
        homes = {"": block, "self_attn": attention, "mlp": mlp}

        def at(place: _Place | None) -> nn.Module | None:
            return None if place is None else homes[place[0]]._modules.get(place[1])

        there = {(home, name) for home, module in homes.items() for name in module._modules}
        matrices = next((one for one in _LINEAR if {*one} - {None} <= there), ())
        rest = there - {*matrices, *_OTHERS}
        places = next((one for one in _NORMS if {*one} - {None, *_HEADS} == rest - {*_HEADS}), None)
        activations = [one for one in map(at, _ACTIVATIONS) if one is not None]
        linear = tuple(map(at, matrices))
        packed = all(one is None or (type(one) is FactoredLinear and one.basis is None) for one in linear)
        if not linear or not packed or places is None or len(activations) != 1:
            return None
        dropouts = tuple(one for one in map(at, _DROPOUTS) if one is not None)
        return cls(homes, cast(Any, linear), tuple(map(at, places)), activations[0], dropouts)

    def modules(self) -> list[nn.Module]:
        there = [one for one in (*self.linear, *self.norms) if one is not None]
        return [*self.homes.values(), *there, self.activation, *self.dropouts]

    def begins(self, cache: DynamicCache) -> bool:
        """Whether the cache is that of a text that begins."""
        layer = vars(self.homes["self_attn"]).get("layer_idx")
        return type(layer) is int and cache.get_seq_length(layer) == 0

    def hooks(self) -> tuple[Mapping[int, object], ...]:
        return tuple(hooks for one in self.modules() for hooks in (one._forward_pre_hooks, one._forward_hooks))


class _Given(NamedTuple):
    """What a block is called with beside its input."""

    cache: DynamicCache
    name: str
    """That of the argument: it differs between versions of transformers."""
    angles: tuple[Tensor, Tensor]
    mask: Tensor | None
    hidden: tuple[int, ...] = ()
    """Of every example how many tokens the mask hides, the first."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> _Given | None:
        """None where something is not known."""
        cache, named, angles, mask = None, "", options.get("position_embeddings"), options.get("attention_mask")
        for name, value in options.items():
            if value is None or value is False or value is angles or value is mask or name in HARMLESS:
                continue
            if type(value) is not DynamicCache or cache is not None or value.offloading:
                return None
            cache, named = value, name
        if cache is None or type(angles) is not tuple or len(angles) != 2 or type(mask) not in (Tensor, type(None)):
            return None
        return cls(cache, named, angles, mask)

    def looked_at(self, examples: int) -> _Given | None:
        """The same with what the mask hides; None if that is more than padding."""
        hidden = hidden_by(self.mask, examples, 0 if self.mask is None else self.mask.shape[-1])
        return None if hidden is None else self._replace(hidden=hidden)


class _Quick:
    """What a block has found out about its calls with single tokens."""

    def __init__(self) -> None:
        self._calls: dict[torch.Size, _Call] = {}
        self._tries = 0

    def __reduce__(self) -> tuple[type[_Quick], tuple[()]]:
        return _Quick, ()  # a copy of a block finds out for itself

    def output(self, block: nn.Module, x: Any, options: Mapping[str, Any]) -> Tensor | None:
        """What the block gives; None where its modules have to be asked."""
        if type(x) is not Tensor or not x.is_cpu:
            self._calls.clear()  # a model on another device does not keep what it was on this one
            return None
        if self._tries >= TRIES or x.dim() != 3 or x.shape[1] != 1:
            return None
        given = _Given.of(options)
        if given is None or not _suits(x, given.angles) or (given := given.looked_at(x.shape[0])) is None:
            return None
        call = self._calls.get(x.shape)
        if call is None:
            self._try(block, x, options, given)
            return None
        if call.is_watched():
            return None
        if not call.holds():
            self._calls.pop(x.shape, None)
            return None
        return call.output(x, given)

    def _try(self, block: nn.Module, x: Tensor, options: Mapping[str, Any], given: _Given) -> None:
        parts = _Parts.of(block)
        if parts is not None and (_are_watched(parts.hooks()) or parts.begins(given.cache)):
            return  # another time
        call = None if parts is None else _Call.of(parts, x, given.angles)
        if call is None or not call.agrees(block, x, options, given):
            self._tries += 1
            return
        self._calls[x.shape] = call
        self._tries = 0


def _suits(x: Tensor, angles: tuple[Tensor, Tensor]) -> bool:
    """Whether such tensors may be given to the library here and now, whatever the block."""
    cosines, sines = angles
    return (
        cpu.reads(x, floats=angles)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and 0 < x.shape[0] <= Repeat.MOST
        and x.is_contiguous()
        and cosines.dim() == 3
        and cosines.shape[0] in (1, x.shape[0])
        and cosines.shape[1] == 1
        and sines.shape == cosines.shape
        and sines.dtype is cosines.dtype
        and cosines.is_contiguous()
        and sines.is_contiguous()
    )


class _Call:
    """A block as one call for inputs of one shape, and what that was made of."""

    def __init__(
        self, parts: _Parts, call: Block, calls: Places, heads: Heads, x: Tensor, angles: tuple[Tensor, Tensor]
    ) -> None:
        attention = vars(parts.homes["self_attn"])
        self._call, self._heads, self._examples = call, heads, x.shape[0]
        self._angles = _kind_of(angles)
        self._layer: int = attention["layer_idx"]
        modules, norms = parts.modules(), [one for one in parts.norms if one is not None]
        self._hooks = parts.hooks()
        places: Places = [
            *calls,
            *((vars(one), "forward") for one in modules),
            *((one._modules, name) for one in parts.homes.values() for name in one._modules),
            *((parts.homes[home]._modules, name) for home, name in _HEADS),
            *((one._parameters, "weight") for one in norms),
            *((vars(one), name) for one in norms for name in EPSILONS),
            *((vars(one), "training") for one in (parts.homes[""], parts.homes["self_attn"], *parts.dropouts)),
            (attention, "scaling"),
            (attention, CAP),
            (vars(attention["config"]), "_attn_implementation_internal"),
        ]
        self._places = [place for place, _ in places], [name for _, name in places]
        """Where everything is found that the call was made of: dictionaries and keys."""
        self._found = list(self._look())
        self._backends = registry.backends()

    @classmethod
    def of(cls, parts: _Parts, x: Tensor, angles: tuple[Tensor, Tensor]) -> _Call | None:
        """None for a block of another kind, or whose layers have not kept calls of their own for such inputs."""
        attention = vars(parts.homes["self_attn"])
        size, scale, layer, cap = (attention.get(name) for name in ("head_dim", "scaling", "layer_idx", CAP))
        if type(size) is not int or type(scale) is not float or type(layer) is not int or "config" not in attention:
            return None
        if any("forward" in vars(one) for one in parts.modules()):  # somebody waits for their calls
            return None
        activation = activation_of(parts.activation, x.dtype)
        norms = [None if one is None else known_norm(one) for one in parts.norms]
        strange = any((one is None) != (norm is None) for one, norm in zip(parts.norms, norms, strict=True))
        way = attention["config"]._attn_implementation
        if activation is None or strange or way not in ("sdpa", "eager"):
            return None
        if cap is not None and (way != "eager" or type(cap) is not float or cap <= 0):
            return None
        calls: list[Repeat | None] = []
        places: Places = []
        for one in parts.linear:
            if one is None:
                calls.append(None)
                continue
            kept = one.repeated(torch.Size((*x.shape[:-1], one.in_features)))
            if kept is None or not isinstance(kept[0], Repeat):
                return None
            calls.append(kept[0])
            places += kept[1]
        counts = _heads_of(parts.linear, size)
        if counts is None:
            return None
        heads = Heads(*counts, size, scale, cap or 0.0, way == "eager")
        return cls(parts, Block(x, calls, norms, heads, activation), places, heads, x, angles)

    def is_watched(self) -> bool:
        """Whether somebody waits for calls of the modules."""
        return _are_watched(self._hooks)

    def holds(self) -> bool:
        """Whether nothing has changed that the call was made of."""
        return (
            all(map(operator.is_, self._look(), self._found))
            and registry.backends() is self._backends
            and self._call.holds()
        )

    def _look(self) -> Iterator[object]:
        return map(_GET, *self._places)

    def output(self, x: Tensor, given: _Given) -> Tensor | None:
        """What the block gives; None where the cache is of another kind."""
        cache = self._cache_of(given.cache, x)
        if cache is None or _kind_of(given.angles) != self._angles:
            return None
        before = cache.keys.shape[2]
        if given.mask is not None and given.mask.shape[-1] != before + 1:
            return None
        y = self._call.run(x, given.angles, cache.with_room(), before, given.hidden)
        cache.took_one()
        return y

    def _cache_of(self, cache: DynamicCache, x: Tensor) -> Growing | None:
        """The block's layer of a cache, which is exchanged for one with room."""
        layers = cache.layers
        layer = growing(layers[self._layer]) if self._layer < len(layers) else None
        if layer is None or not layer.is_initialized or not self._fits(layer, x):
            return None
        layers[self._layer] = layer
        return layer

    def _fits(self, layer: DynamicLayer, x: Tensor) -> bool:
        keys, values, heads = layer.keys, layer.values, self._heads
        return (
            cpu.reads(x, keys, values)
            and keys.dim() == 4
            and keys.shape[:2] == (self._examples, heads.keys)
            and keys.shape[3] == heads.size
            and values.shape == keys.shape
        )

    def agrees(self, block: nn.Module, x: Tensor, options: Mapping[str, Any], given: _Given) -> bool:
        """Whether the modules give the same for another input at this place of the text."""
        if self._layer >= len(given.cache.layers):
            return False
        layer = given.cache.layers[self._layer]
        if not isinstance(layer, DynamicLayer) or not layer.is_initialized or not self._fits(layer, x):
            return False
        numbers = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        for scale in SCALES:
            tried = (scale * numbers).to(x.dtype)
            theirs, ours = (_with_copy(given, self._layer) for _ in range(2))
            expected = nn.Module.__call__(block, tried, **{**options, given.name: theirs.cache})
            if not isinstance(expected, Tensor) or expected.shape != x.shape or expected.dtype is not x.dtype:
                return False
            if (expected - tried).norm() > 4 * tried.norm():  # else a block that adds nothing would seem to agree
                found = self.output(tried, ours)
                return found is not None and float((found == expected).float().mean()) >= SAME
        return False


def _heads_of(linear: tuple[FactoredLinear | None, ...], size: int) -> tuple[int, int] | None:
    """Heads of queries and of keys, each of so many numbers; None where matrices give something else."""
    first, second, _, out, *_ = linear
    assert first is not None
    assert out is not None
    queries, given = out.in_features, first.out_features
    keys = (given - queries) // 2 if second is None else second.out_features
    if keys <= 0 or given != queries + (2 * keys if second is None else 0) or queries % size or keys % size:
        return None
    return queries // size, keys // size


def _kind_of(angles: tuple[Tensor, Tensor]) -> tuple[int, torch.dtype]:
    """How many numbers of a head they turn, and their type."""
    return angles[0].shape[2], angles[0].dtype


def _are_watched(hooks: tuple[Mapping[int, object], ...]) -> bool:
    everywhere = torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks
    return bool(everywhere) or (any(hooks) and any(map(_are_heard, hooks)))


def _are_heard(hooks: Mapping[int, object]) -> bool:
    """Whether one of these hooks wants to be called now.

    A model that was once asked for its hidden states keeps hooks of transformers, which look whether a call collects
    any; those of other versions, which are not known, are heard.
    """
    if not hooks or not all(_is_collecting(one) for one in hooks.values()):
        return bool(hooks)
    collector = getattr(output_capturing, "_active_collector", None)
    return collector is None or bool(collector.get())


def _is_collecting(hook: object) -> bool:
    name = getattr(hook, "__qualname__", "")
    return getattr(hook, "__module__", None) == output_capturing.__name__ and name.endswith(".output_capturing_hook")


def _with_copy(given: _Given, layer: int) -> _Given:
    """The same with another cache, whose layer may be written to."""
    cache = copy.copy(given.cache)
    cache.layers = list(cache.layers)
    cache.layers[layer] = new = copy.copy(cache.layers[layer])
    new.keys, new.values = new.keys.clone(), new.values.clone()
    return given._replace(cache=cache)
