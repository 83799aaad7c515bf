r"""One block of a decoder for one token of every example, by one call of the compiled library.

.. math::
    h &= x + \mathrm{norm}(O\, \mathrm{attention}(Q n, K n, V n)), \quad n = \mathrm{norm}(x) \\
    y &= h + \mathrm{norm}(D\, (\mathrm{act}(G m) \odot U m)), \quad m = \mathrm{norm}(h)

with queries and keys normed and turned by their position. Norms without weights are left out: Llama has those of x and
h, Qwen 3 those of queries and keys too, Gemma 3 all, EXAONE 4 all but those of x and h. Numbers are rounded to their
type wherever the modules of a model, called one after the other, round them, so that both give the same. What it saves
is Python: of the 10 ms that a token of SmolLM2-135M took on two cores, the matrices took 3.

Shape legend: B examples, W width, H query heads, K heads of keys and values, L tokens, D size of a head.

References: Su et al., RoFormer, arXiv 2104.09864 (turning by position); Shazeer, GLU Variants Improve Transformer,
arXiv 2002.05202 (the gate).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from fips.kernels import cpu, norm
from fips.kernels.attention import hidden_counts
from fips.kernels.cpu import Repeat
from fips.kernels.norm import Norm
from fips.kernels.validity import Snapshot

__all__ = ["ACTIVATIONS", "MATRICES", "Block", "Heads", "activation_of"]

MATRICES = 7
"""Of queries, keys, values, what attention gives, the gate, what it multiplies, and what the MLP gives."""
NORMS = 6
"""Of the input, of what the MLP reads, of queries and of keys, head by head or whole, of what attention gives and of
what the MLP gives."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu_tanh": lambda x: gelu(x, approximate="tanh")}
"""What a gate goes through, by its number in ``csrc/fips_kernels.h``."""


class _Block(ctypes.Structure):
    _fields_ = [
        ("x", c_void_p), ("y", c_void_p), ("room", c_void_p), ("length", c_int64), ("room_length", c_int64),
        ("matrices", c_void_p), ("calls", c_void_p), ("norms", c_void_p * NORMS), ("cosines", c_void_p),
        ("sines", c_void_p), ("angles_length", c_int64), ("angles_stride", c_int64), ("turned", c_int64),
        ("keys", c_void_p), ("values", c_void_p), ("hidden", c_void_p), ("keys_length", c_int64),
        ("values_length", c_int64), ("hidden_length", c_int64), ("examples", c_int64), ("heads", c_int64),
        ("key_heads", c_int64), ("before", c_int64), ("size", c_int64),
        ("norm_lengths", c_int64 * NORMS), ("key_strides", c_int64 * 3), ("value_strides", c_int64 * 3),
        ("scale", c_float), ("cap", c_float), ("eps", c_float * NORMS), ("norm_kinds", c_int32 * NORMS),
        ("activation", c_int32), ("type", c_int32), ("angles_type", c_int32), ("rounded", c_int32),
        ("threads", c_int32), ("isa", c_int32),
    ]  # fmt: skip


class Heads(NamedTuple):
    """Of attention: query heads, heads of keys and values, numbers of each, and what scores are multiplied by.

    ``cap`` and ``rounded`` are those of ``fips.kernels.attention``.
    """

    queries: int
    keys: int
    size: int
    scale: float
    cap: float = 0.0
    rounded: bool = False


def activation_of(function: Callable[[Tensor], object], dtype: torch.dtype) -> str | None:
    """The name of what gives the same as a function of ``dtype``, from -20 to 20; None if none does."""
    x = torch.linspace(-20, 20, 4001).to(dtype)
    try:
        y = function(x)
    except Exception:  # of something else than a tensor
        return None
    return next((name for name, one in ACTIVATIONS.items() if isinstance(y, Tensor) and torch.equal(y, one(x))), None)


class Block:
    """What does not change between tokens: matrices, norms, heads, and how the gate is activated.

    ``repeats`` are the calls of the seven ``MATRICES`` for inputs of the same examples. That of the queries is alone
    where it gives keys and values too, behind each other, and the gate's where it gives what it multiplies: None stands
    for the others. ``norms`` are the six norms, None for those that there are not. Several threads may run one object.
    Raises ``BackendError`` for matrices that do not belong together.
    """

    def __init__(
        self, x: Tensor, repeats: Sequence[Repeat | None], norms: Sequence[Norm | None], heads: Heads, activation: str
    ) -> None:
        pointers = c_void_p * MATRICES
        self._repeats = there = [one for one in repeats if one is not None]
        self._matrices = pointers(*(None if one is None else ctypes.addressof(one.prepared.struct) for one in repeats))
        self._calls = pointers(*(None if one is None else ctypes.addressof(one.call) for one in repeats))
        block = _Block(
            matrices=ctypes.addressof(self._matrices), calls=ctypes.addressof(self._calls), examples=x.shape[0],
            heads=heads.queries, key_heads=heads.keys, size=heads.size, scale=heads.scale, cap=heads.cap,
            rounded=heads.rounded, length=x.numel(),
            activation=list(ACTIVATIONS).index(activation), type=cpu.TYPES[x.dtype], threads=there[0].threads,
            isa=cpu.best_isa(),
        )  # fmt: skip
        for i, one in enumerate(norms):
            if one is not None:
                block.norms[i], block.norm_lengths[i] = one.weight.data_ptr(), one.weight.numel()
                block.eps[i], block.norm_kinds[i] = one.eps, norm.KINDS.index(one.kind)
        self._block = block
        weights = Snapshot(places=[one.weight for one in norms if one is not None])
        self._seen = Snapshot.of([weights, *(one.seen for one in there)])
        self._room = cpu.call("fips_block_room", block, "a block of a decoder")

    def holds(self) -> bool:
        """Whether matrices, biases and weights still lie where they did, unchanged where it matters."""
        return self._seen.holds() and torch.get_num_threads() == self._repeats[0].threads

    def run(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        caches: tuple[Tensor, Tensor],
        before: int,
        hidden: Sequence[int] = (),
    ) -> Tensor:
        """The block's output (B, 1, W) of an input (B, 1, W).

        ``angles`` are cosines and sines (B or 1, 1, D or less: so many numbers of a head are turned); ``caches`` keys
        and values (B, K, more than L, D), of which ``before`` are there and the next is written. All lie in memory in
        the type of ``x``, but that angles may be float32, numbers of a head side by side. ``hidden`` is that of
        ``fips.kernels.attention``. Raises ``BackendError`` for what does not fit, ``MemoryError`` where there is no
        room.
        """
        y, room = torch.empty_like(x), torch.empty(self._room, dtype=x.dtype)
        (cosines, sines), (keys, values) = angles, caches
        block = _Block.from_buffer_copy(self._block)  # threads may run at a time
        block.x, block.y, block.room, block.room_length = x.data_ptr(), y.data_ptr(), room.data_ptr(), self._room
        block.cosines, block.sines = cosines.data_ptr(), sines.data_ptr()
        block.angles_length, block.angles_type = cosines.numel(), cpu.TYPES[cosines.dtype]
        block.turned = cosines.shape[-1]
        block.angles_stride = block.turned if cosines.shape[0] > 1 else 0
        block.keys, block.values, block.before = keys.data_ptr(), values.data_ptr(), before
        block.keys_length, block.values_length = cpu.span(keys), cpu.span(values)
        counts = hidden_counts(hidden)
        block.hidden, block.hidden_length = counts, len(hidden)
        block.key_strides[:], block.value_strides[:] = keys.stride()[:3], values.stride()[:3]
        cpu.call("fips_run_block", block, "a block of a decoder")
        return y
