"""MODEL on the command line: transformers or timm, a directory, hub id or GGUF file, with or without its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fips.errors import ModelError
from fips.models.timm import build_timm, is_timm_source, load_timm
from fips.models.transformers import build_empty, config_fields, load_config, load_dense, resolve_dtype
from fips.storage.checkpoint import is_compressed
from fips.storage.layout import QUANT_METHOD

__all__ = ["empty_model", "is_compressed_source", "read_model"]


def empty_model(source: str, *, compressed: bool = True, trust_remote_code: bool = False) -> nn.Module:
    """The original architecture of a source, on the meta device; ``compressed=False`` refuses a compressed one."""
    if is_timm_source(source):
        return build_timm(source)
    if not compressed and config_fields(source).get("quantization_config") is not None:
        raise ModelError(f"`{source}` is already compressed; give the original model")
    config, trusted = load_config(source, trust_remote_code=trust_remote_code)
    model: nn.Module = build_empty(config, source=source, trusted=trusted)
    return model


def is_compressed_source(source: str) -> bool:
    """Whether a directory or hub id holds a model that fips packed."""
    if Path(source).exists() or is_timm_source(source):
        return is_compressed(source)
    quantization = config_fields(source).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def read_model(source: str, *, dtype: str, device: torch.device, trust_remote_code: bool = False) -> nn.Module:
    """A dense model with its weights, in evaluation mode."""
    if is_timm_source(source):
        return load_timm(source, dtype=resolve_dtype(dtype), device=device)
    dense: nn.Module = load_dense(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return dense
