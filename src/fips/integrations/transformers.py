"""Find, build and load transformers models and their processors, from a directory or the hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from fips.errors import ModelError

__all__ = [
    "build_empty",
    "config_from_fields",
    "context_length",
    "example_inputs",
    "load_config",
    "load_dense",
    "load_processor",
    "model_kind",
    "quiet",
]

Kind = Literal["image", "text"]
_T = TypeVar("_T")


def load_config(source: str) -> PretrainedConfig:
    """Configuration of a local directory or hub id; raises ``ModelError`` if there is none."""
    path = Path(source)
    if path.exists() and not (path / "config.json").is_file():
        raise ModelError(
            f"`{source}` is not a model: it has no config.json; give a directory written by save_pretrained"
        )
    if not path.exists() and _looks_like_path(source):
        raise ModelError(f"unknown model `{source}`: no such directory; give a model directory or a hub id")
    return _from_source(source, AutoConfig.from_pretrained)


def config_from_fields(fields: Mapping[str, Any]) -> PretrainedConfig:
    """Configuration from ``model_type`` and its fields; raises ``ModelError`` for an unknown type."""
    try:
        return transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"cannot build a configuration from {dict(fields)}: {error}") from None


def load_dense(source: str, *, dtype: str = "auto", device: torch.device | str = "cpu") -> PreTrainedModel:
    """A dense model with its weights, in evaluation mode, in the checkpoint's type unless ``dtype`` names another."""
    config = load_config(source)
    if getattr(config, "quantization_config", None) is not None:
        method = getattr(config.quantization_config, "get", lambda _: None)("quant_method") or "another method"
        raise ModelError(f"`{source}` is already compressed ({method}); give the original model")
    model_class = _model_class(config)
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    model = _from_source(source, model_class.from_pretrained, dtype=wanted)
    model.to(device)
    return model.eval()


def build_empty(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration, in its type, with parameters on the meta device; buffers are real."""
    with init_empty_weights(include_buffers=False), quiet(), _default_dtype(config.dtype or torch.float32):
        model = _model_class(config)(config)
    model.tie_weights()  # the context above gives every name a parameter of its own
    return model.eval()


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    names = config.architectures or []
    for name in names:
        found = getattr(transformers, name, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    for mapping in (
        transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_MAPPING,
    ):
        if not names and type(config) in mapping:
            return mapping[type(config)]  # type: ignore[no-any-return]
    raise ModelError(
        f"transformers {transformers.__version__} has no model class for {names or type(config).__name__}; "
        "`architectures` in config.json must name a class of the library"
    )


def model_kind(model: nn.Module) -> Kind:
    """What a model reads, from its main input; raises ``ModelError`` if it is neither images nor text."""
    name = getattr(model, "main_input_name", None)
    if name == "pixel_values":
        return "image"
    if name == "input_ids":
        return "text"
    raise ModelError(
        f"`{type(model).__name__}` reads `{name}`; the command line handles images and text, Python any batch"
    )


def context_length(config: PretrainedConfig) -> int | None:
    """Longest sequence a text model was made for."""
    text_config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        value = getattr(text_config, name, None)
        if isinstance(value, int):
            return value
    return None


def example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Made-up inputs of the shape a model takes: two noise images, or two sequences of random tokens."""
    generator = torch.Generator().manual_seed(0)
    if model_kind(model) == "text":
        config = model.config.get_text_config()
        length = min(context_length(config) or 16, 16)
        return {"input_ids": torch.randint(config.vocab_size, (2, length), generator=generator)}
    config = getattr(model.config, "vision_config", model.config)
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape = (2, getattr(config, "num_channels", 3), height, width)
    return {"pixel_values": torch.randn(shape, generator=generator)}


def load_processor(source: str, kind: Kind) -> Any:
    """The tokenizer or image processor stored with a model, None if it has none."""
    try:
        with quiet():
            if kind == "text":
                return transformers.AutoTokenizer.from_pretrained(source)
            return transformers.AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError):
        return None


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or (os.sep != "/" and os.sep in source)


def _from_source(source: str, load: Callable[..., _T], **options: Any) -> _T:
    try:
        with quiet():
            return load(source, **options)
    except (OSError, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        raise ModelError(
            f"cannot load model `{source}`: {first} (give a model directory, or a hub id while online)"
        ) from None


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and notes of transformers and the hub client, which would mix with ours."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
