"""What a model predicts: it decides which examples it is shown and how it is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from fips.models.timm import is_timm_model
from fips.models.transformers import reads_text_alone

__all__ = ["CAUSAL", "IMAGES", "Task", "TaskName", "task_name", "task_of"]

TaskName = Literal[
    "causal-lm", "masked-lm", "seq2seq-lm", "image-classification", "text-classification", "token-classification",
    "embedding", "other",
]  # fmt: skip

_ENDINGS: tuple[tuple[str, TaskName], ...] = (
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
    ("ForMaskedLM", "masked-lm"),
    ("ForImageClassification", "image-classification"),
    ("ForImageClassificationWithTeacher", "image-classification"),
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("WithProjection", "embedding"),
)
"""What the names of classes of transformers, and of code written like it, end in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a model predicts, and what the data has to know of it."""

    name: TaskName
    model: str = "the model"
    """Name of its class, for messages."""
    labels: tuple[str, ...] | None = None
    """Classes of a classifier, in the order of its outputs, where it says."""
    reads_text_alone: bool = True
    """Of an encoder-decoder: whether it makes up what its decoder reads."""


CAUSAL, IMAGES = Task(name="causal-lm"), Task(name="image-classification")
"""Of a model that says nothing but what it reads."""


def task_of(model: nn.Module) -> Task:
    """What a model predicts, by the name of its class or of one it was derived from; ``other`` has no metric here."""
    name, known = task_name(model), getattr(getattr(model, "config", None), "id2label", None) or {}
    return Task(
        name=name,
        model=type(model).__name__,
        labels=tuple(str(label) for _, label in sorted(known.items())) if name.endswith("classification") else None,
        reads_text_alone=name != "seq2seq-lm" or (isinstance(model, PreTrainedModel) and reads_text_alone(model)),
    )


def task_name(model: nn.Module) -> TaskName:
    name = _name(model)
    reads_text = getattr(model, "main_input_name", "pixel_values") == "input_ids"
    return name if name in ("embedding", "image-classification") or reads_text else "other"


def _name(model: nn.Module) -> TaskName:
    if is_timm_model(model):
        return "image-classification" if int(getattr(model, "num_classes", 0)) > 0 else "embedding"
    if not isinstance(model, PreTrainedModel):
        return "other"
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    for kind in type(model).__mro__:
        if kind.__name__.endswith(("ForConditionalGeneration", "MTModel", "ForSeq2SeqLM")):
            return "seq2seq-lm" if encoder_decoder else "causal-lm"
        for ending, name in _ENDINGS:
            if kind.__name__.endswith(ending) and not (encoder_decoder and name == "causal-lm"):
                return name
    if model.base_model is model and not encoder_decoder and type(model).__name__.endswith("Model"):
        return "embedding"
    return "causal-lm" if model.can_generate() and not encoder_decoder else "other"
