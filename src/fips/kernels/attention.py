r"""Attention of one token to those before it, by the compiled library.

.. math:: y = \mathrm{softmax}(c(s\, q K^\top))\, V

for every head, c being nothing or, with a cap, :math:`c(x) = \mathrm{cap} \tanh(x / \mathrm{cap})`. Keys and values are
read once for all queries that share them, with several threads, and sums run in float32. How fast that is beside torch:
``docs/speed.md``. Where a model computes attention one operation after the other (transformers' ``eager``), scores and
weights can be rounded where those round.

Reference of the cap: Gemma 2, arXiv 2408.00118.

Shape legend: B examples, H query heads, K heads of keys and values, L keys, D size of a head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from fips.kernels import cpu

__all__ = ["attend", "hidden_counts", "suits"]

MOST_SIZE = 512
"""Numbers of a head."""


class _Attention(ctypes.Structure):
    _fields_ = [
        ("queries", c_void_p), ("keys", c_void_p), ("values", c_void_p), ("y", c_void_p), ("hidden", c_void_p),
        ("queries_length", c_int64), ("keys_length", c_int64), ("values_length", c_int64), ("y_length", c_int64),
        ("hidden_length", c_int64), ("examples", c_int64), ("heads", c_int64), ("key_heads", c_int64),
        ("length", c_int64), ("size", c_int64),
        ("key_strides", c_int64 * 3), ("value_strides", c_int64 * 3), ("scale", c_float), ("cap", c_float),
        ("type", c_int32), ("rounded", c_int32), ("threads", c_int32), ("isa", c_int32),
    ]  # fmt: skip


def suits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether ``attend`` knows such tensors: one query a head, 16 bits in memory, 8 to 512 numbers, no gradients."""
    size = query.shape[-1]
    return (
        cpu.reads(query, key, value)
        and size % 8 == 0
        and 0 < size <= MOST_SIZE
        and query.dim() == 4
        and query.shape[2] == 1
        and key.dim() == 4
        and key.shape == value.shape
        and key.shape[0] == query.shape[0]  # torch would broadcast them
        and key.shape[3] == size
        and key.numel() > 0
        and query.shape[1] % key.shape[1] == 0
        and key.stride(3) == 1
        and value.stride(3) == 1
    )


def hidden_counts(hidden: Sequence[int]) -> c_void_p | None:
    """Numbers as the library takes them, which have to be held as long as a call."""
    return ctypes.cast((c_int64 * len(hidden))(*hidden), c_void_p) if hidden else None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    cap: float = 0.0,
    rounded: bool = False,
    hidden: Sequence[int] = (),
) -> Tensor:
    """Attention (B, H, 1, D) of one query of every head (B, H, 1, D) to keys and values (B, K, L, D); no autograd.

    H is a multiple of K; a ``cap`` of 0 is none. Of an example the first ``hidden`` keys are left out, as padding in
    front of a text is; none if that is empty. Raises ``BackendError`` for what ``suits`` does not allow,
    ``MemoryError`` where there is no room.
    """
    query = query.contiguous()
    y = torch.empty_like(query)
    examples, heads, _, size = query.shape
    _, key_heads, length, _ = key.shape
    numbers = query.numel()
    counts = hidden_counts(hidden)
    call = _Attention(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), y.data_ptr(), counts, numbers, cpu.span(key),
        cpu.span(value), numbers, len(hidden), examples, heads, key_heads, length, size, key.stride()[:3],
        value.stride()[:3], scale, cap, cpu.TYPES[query.dtype], rounded, torch.get_num_threads(), cpu.best_isa(),
    )  # fmt: skip
    cpu.call("fips_attend", call, "attention of one token")
    return y
