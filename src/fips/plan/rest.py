"""The type of what is not compressed: what it takes in another one, and giving it that.

Parts that a class of transformers keeps in float32 beside a 16-bit type stay as they are, as its ``from_pretrained``
leaves them, and so do buffers that no file holds.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from fips.config import CompressionConfig
from fips.layers.linear import FactoredLinear, SharedBasis
from fips.models import LayerGroup
from fips.plan.footprint import itemsize

__all__ = ["cast_rest", "rest_saving", "rest_sizes"]


def rest_sizes(model: nn.Module, packed: Collection[str], config: CompressionConfig) -> dict[str, int]:
    """Bytes by name of those tensors outside the weights of layers to be ``packed`` that get another type."""
    wanted, weights = _dtype(config), {f"{name}.weight" for name in packed}
    if wanted is None:
        return {}
    size = itemsize(wanted)
    seen: set[int] = set()
    found = {}
    for name, tensor in _rest(model, wanted):
        if id(tensor) not in seen and name not in weights and tensor.dtype != wanted:
            found[name] = tensor.numel() * size
        seen.add(id(tensor))
    return found


def rest_saving(model: nn.Module, groups: Sequence[LayerGroup], config: CompressionConfig) -> int:
    """Bytes that what is in no group takes less in the type asked for; below 0 where it takes more."""
    later = rest_sizes(model, [site.name for group in groups for site in group.sites], config)
    tensors = model.state_dict(keep_vars=True) if later else {}
    return sum(tensors[name].numel() * tensors[name].element_size() - size for name, size in later.items())


@torch.no_grad()
def cast_rest(model: nn.Module, config: CompressionConfig) -> None:
    """Give everything but packed numbers and bases the type asked for; placeholders of packed weights say it too."""
    wanted = _dtype(config)
    if wanted is None:
        return
    for _, tensor in _rest(model, wanted):
        tensor.data = tensor.data.to(wanted)
    for module in model.modules():
        if isinstance(module, FactoredLinear):
            module.weight = module.weight.to(wanted)


def _dtype(config: CompressionConfig) -> torch.dtype | None:
    return None if config.rest_dtype is None else getattr(torch, config.rest_dtype)


def _rest(model: nn.Module, wanted: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Floating tensors of a file, those under several names at all of them, but packed ones and what stays wide."""
    wide = _kept_wide(model, wanted)
    for path, module in model.named_modules():
        if isinstance(module, SharedBasis):
            continue
        own = [*module._parameters.items()]
        if not isinstance(module, FactoredLinear):
            own += [(key, one) for key, one in module._buffers.items() if key not in module._non_persistent_buffers_set]
        for key, tensor in own:
            name = f"{path}.{key}" if path else key
            packed = isinstance(module, FactoredLinear) and key != "bias"
            if tensor is not None and tensor.is_floating_point() and not packed and not wide.search(name):
                yield name, tensor


def _kept_wide(model: nn.Module, wanted: torch.dtype) -> re.Pattern[str]:
    """What fits the names of tensors that stay in float32."""
    parts: set[str] = set()
    if wanted in (torch.float16, torch.bfloat16):
        parts |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if wanted == torch.float16:
        parts |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(rf"(^|\.){part}(\.|$)" for part in sorted(parts)) or r"(?!)")
