"""The arithmetic of passes over the data, by what the hardware multiplies natively."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fips.calibration.preserve import replaced_forward
from fips.errors import ConfigError
from fips.layers.linear import FactoredLinear, SharedBasis

__all__ = ["autocast_for", "has_bfloat16", "in_native_types", "resolve_precision"]


def resolve_precision(precision: str, model: nn.Module, device: torch.device) -> str:
    """``auto`` is ``bfloat16`` where the hardware multiplies it natively, else ``float32``, which also stands for the
    model's own type if that is narrower.

    Blocks of ViT-Tiny in training take 0.44 of the time so on a Zen 5 with AVX-512, tiny models as long as in float32.
    On a CPU torch's norms take no bfloat16 beside weights of float16: raises ``ConfigError`` if it is asked for.
    """
    clashes = device.type == "cpu" and any(parameter.dtype == torch.float16 for parameter in model.parameters())
    if precision == "bfloat16" and clashes:
        raise ConfigError(
            "`precision: bfloat16` does not go with a model in float16 on a CPU, whose norms take no bfloat16 then; "
            "load the model in bfloat16 or float32, or leave `precision` out"
        )
    if precision == "auto":
        return "bfloat16" if _native_bfloat16(device) and not clashes else "float32"
    return precision


def autocast_for(precision: str, model: nn.Module, device: torch.device) -> AbstractContextManager[object]:
    """Context in which matrix products run in the precision asked for."""
    if resolve_precision(precision, model, device) == "bfloat16":
        # No weight cache: it would hand out the basis of the first step for as long as the context lasts.
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
    return nullcontext()


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and _processor_multiplies_bfloat16()


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has instructions for bfloat16; without them torch multiplies 5 to 10 times slower.

    True for what this cannot be asked of: accelerators and processors other than x86.
    """
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return _processor_multiplies_bfloat16()


def _processor_multiplies_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextmanager
def in_native_types(model: nn.Module, blocks: Sequence[str] = ()) -> Iterator[None]:
    """Hold bfloat16 weights in float32 where the CPU has no instructions for bfloat16; as before afterwards.

    Every bfloat16 number is a float32 number, so only the rounding of what is computed from them is left out. Packed
    layers compute as they do anyway. Takes 4 bytes a parameter more; the weights of ``blocks`` only while one runs.
    """
    inside = [model.get_submodule(name) for name in blocks]
    late = {id(tensor) for block in inside for tensor in _narrow(block)}
    narrow = [tensor for tensor in _narrow(model) if id(tensor) not in late]
    stored = [tensor.data for tensor in narrow]
    with ExitStack() as stack:
        for block in inside if late else ():
            stack.enter_context(_wide_while_it_runs(block))
        try:
            for tensor in narrow:
                tensor.data = tensor.data.float()
            yield
        finally:
            for tensor, data in zip(narrow, stored, strict=True):
                tensor.data = data


def _wide_while_it_runs(block: nn.Module) -> AbstractContextManager[None]:
    """A block whose ``forward`` sees its bfloat16 tensors as float32 ones, made anew for every call."""
    forward = block.forward

    def wide(*args: Any, **kwargs: Any) -> Any:
        places: list[tuple[dict[str, Any], str, Tensor]] = [
            (held, key, tensor)
            for module in _dense_modules(block)
            for held in (module._parameters, module._buffers)
            for key, tensor in held.items()
            if tensor is not None and tensor.dtype == torch.bfloat16
        ]
        made: dict[int, Tensor] = {}
        try:
            for held, key, tensor in places:
                found = made.setdefault(id(tensor), tensor.detach().float())
                held[key] = nn.Parameter(found, requires_grad=False) if isinstance(tensor, nn.Parameter) else found
            return forward(*args, **kwargs)
        finally:
            for held, key, tensor in places:
                held[key] = tensor

    return replaced_forward(block, wide)


def _narrow(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers outside packed layers, each once, that the CPU has no arithmetic for."""
    found: dict[int, Tensor] = {}
    for module in _dense_modules(model):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.dtype == torch.bfloat16 and not has_bfloat16(tensor.device):
                found[id(tensor)] = tensor
    return list(found.values())


def _dense_modules(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if not isinstance(module, FactoredLinear | SharedBasis))
