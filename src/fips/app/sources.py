"""MODEL on the command line: transformers or timm, a directory or a hub id, with or without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fips.errors import ModelError
from fips.models.timm import TimmProcessor, build_timm, is_timm_model, is_timm_source, load_timm
from fips.models.transformers import (
    Kind,
    build_empty,
    config_fields,
    context_length,
    load_config,
    load_dense,
    load_processor,
    model_kind,
    require_one_input,
    resolve_dtype,
)
from fips.storage.checkpoint import is_compressed
from fips.storage.layout import QUANT_METHOD

__all__ = ["empty_model", "is_compressed_source", "kind_of", "longest_sequence", "processor_of", "read_model"]


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


def kind_of(model: nn.Module) -> Kind:
    """What a model reads; raises ``ModelError`` if one text or image per example is not all it needs."""
    if is_timm_model(model):
        return "image"
    kind = model_kind(model)
    if isinstance(model, PreTrainedModel):
        require_one_input(model)
    return kind


def processor_of(source: str, model: nn.Module, *, trust_remote_code: bool = False) -> Any:
    """What turns examples into inputs, None if the source has none."""
    if is_timm_model(model):
        return TimmProcessor.of(model)
    return load_processor(source, kind_of(model), trust_remote_code=trust_remote_code)


def longest_sequence(model: nn.Module) -> int | None:
    return context_length(model.config) if kind_of(model) == "text" else None
