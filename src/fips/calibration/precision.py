"""The arithmetic of passes over the data, by what the hardware multiplies natively."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fips.layers.linear import FactoredLinear, SharedBasis

__all__ = ["autocast_for", "has_bfloat16", "in_native_types", "resolve_precision"]


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` is ``bfloat16`` where the hardware multiplies it natively, else ``float32``."""
    if precision == "auto":
        return "bfloat16" if _native_bfloat16(device) else "float32"
    return precision


def autocast_for(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Context in which matrix products run in the precision asked for."""
    if resolve_precision(precision, device) == "bfloat16":
        # No weight cache: it would hand out the basis of the first step for as long as the context lasts.
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
    return nullcontext()


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has instructions for bfloat16; without them torch multiplies 5 to 10 times slower.

    True for what this cannot be asked of: accelerators and processors other than x86.
    """
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextmanager
def in_native_types(model: nn.Module) -> Iterator[None]:
    """Hold bfloat16 weights in float32 where the CPU has no instructions for bfloat16; as before afterwards.

    Every bfloat16 number is a float32 number, so only the rounding of what is computed from them is left out. Packed
    layers compute as they do anyway. Takes 4 bytes a parameter more.
    """
    narrow = [t for t in _own_tensors(model) if t.dtype == torch.bfloat16 and not has_bfloat16(t.device)]
    stored = [tensor.data for tensor in narrow]
    try:
        for tensor in narrow:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(narrow, stored, strict=True):
            tensor.data = data


def _own_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers outside packed layers, each once."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if not isinstance(module, FactoredLinear | SharedBasis):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                found[id(tensor)] = tensor
    return list(found.values())
