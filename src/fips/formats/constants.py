"""Small tensors that are the same for all layers, such as tables: made once for a device and kept.

In inference mode a tensor is of a kind that autograd refuses ever after, and while a CUDA graph is being made its
memory belongs to that graph, into which nothing may be copied besides. Both hold for one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["kept", "made_apart"]

Tensors = TypeVar("Tensors", bound="Tensor | tuple[Tensor, ...]")
Key = TypeVar("Key", bound=Hashable)


def made_apart(make: Callable[[], Tensors]) -> Tensors:
    """What a function returns when it is called in a thread of its own, whatever the caller is in the middle of.

    Only a tracer goes along: what it sees is part of its graph.
    """
    if torch.compiler.is_compiling():
        return make()

    def finished() -> Tensors:
        made = make()
        for tensor in made if isinstance(made, tuple) else (made,):
            if tensor.is_cuda:
                torch.cuda.current_stream(tensor.device).synchronize()  # no other stream waits for this one
        return made

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(finished).result()


def kept(store: dict[Key, Tensors], key: Key, make: Callable[[], Tensors]) -> Tensors:
    """What a function has returned for a key, made apart where there is none yet.

    What a tracer makes is not kept: outside its graph it is no tensor that anything can be computed with.
    """
    found = store.get(key)
    if found is None:
        found = made_apart(make)
        if not torch.compiler.is_compiling():
            store[key] = found
    return found
