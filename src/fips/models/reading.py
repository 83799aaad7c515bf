"""What a model reads: texts or images, how long, and through which tokenizer or image processor."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fips.models.tasks import task_name
from fips.models.timm import TimmProcessor, is_timm_model
from fips.models.transformers import Kind, context_length, load_processor, model_kind, require_one_input

__all__ = ["kind_of", "longest_sequence", "processor_of"]


def kind_of(model: nn.Module) -> Kind:
    """What a model reads; raises ``ModelError`` if one text or image per example is not all it needs."""
    if is_timm_model(model):
        return "image"
    kind = model_kind(model)
    if isinstance(model, PreTrainedModel) and task_name(model) != "seq2seq-lm":  # tables hold sources and targets
        require_one_input(model)
    return kind


def processor_of(source: str, model: nn.Module, *, trust_remote_code: bool = False) -> Any:
    """What turns examples into inputs, None if the source has none.

    Of a language model that sees: that of images and texts, if there is one, else the tokenizer.
    """
    if is_timm_model(model):
        return TimmProcessor.of(model)
    if kind_of(model) == "text" and "image" in getattr(model, "input_modalities", ()):
        both = load_processor(source, "both", trust_remote_code=trust_remote_code)
        if hasattr(both, "tokenizer") and hasattr(both, "image_processor"):
            return both
    return load_processor(source, kind_of(model), trust_remote_code=trust_remote_code)


def longest_sequence(model: nn.Module) -> int | None:
    """Tokens that a language model accepts, None for other models and where it does not say."""
    return context_length(model.config) if kind_of(model) == "text" else None
