r"""What a model's output stands for: which of its fields count, and the distribution that each is a guess at.

An error of a layer costs what it does to these distributions (``fips.calibration.moments``), so a wrong answer here is
a wrong metric everywhere. ``read_heads`` answers from the fields of the output and the model's configuration:

====================================================== ================================================================
output                                                 distribution
====================================================== ================================================================
``logits`` of 2 entries or more                        softmax over the last axis
``logits`` (E, V, height, width): segmentation         softmax over V for every pixel; V = 1: sigmoid
``logits`` (E, height, width) of an image segmentation sigmoid for every pixel
``logits``, ``problem_type: multi_label_...``          sigmoid for every label
``logits``, ``problem_type: regression``, or one entry numbers: reward models, rerankers, regression
``logits`` of pixels that were hidden (MAE)            numbers
``logits`` (E, T), one for every token (ELECTRA)       sigmoid for every token
``logits`` beside ``pred_boxes``, focal loss, OWL-ViT  sigmoid for every class
``start_logits``, ``end_logits``: question answering   softmax over the tokens
other fields ending in ``logits`` that are known       see ``LOGITS``
boxes, depth, reconstructions, forecasts               numbers
``*_embeds``: CLIP and its like                        numbers, the embeddings of every tower
tensor (E, V) of a classifier with ``num_classes`` = V softmax over the last axis (timm)
anything else                                          numbers: the first tensor, such as the last hidden states
====================================================== ================================================================

Numbers are normal with variance 1 whatever their size: every direction counts alike, squared error.

Shape legend: E examples, T tokens, V classes or labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fips.errors import DataError

__all__ = ["HeadKind", "ScoredHead", "draw_direction", "first_tensor", "read_heads"]

HeadKind = Literal["softmax", "sigmoid", "number"]
SPANS = ("start_logits", "end_logits")
LOGITS: dict[str, HeadKind] = {
    "start_logits": "softmax", "end_logits": "softmax", "prediction_logits": "softmax", "mlm_logits": "softmax",
    "seq_relationship_logits": "softmax", "sop_logits": "softmax", "itm_score": "softmax",
    "relevance_logits": "number", "class_queries_logits": "softmax", "masks_queries_logits": "sigmoid",
    "segmentation_logits": "softmax", "presence_logits": "sigmoid", "pred_masks": "sigmoid",
}  # fmt: skip
"""Fields that count where there are no ``logits``, or beside them, with what they are logits of."""
NUMBERS = (
    "pred_boxes", "predicted_depth", "normals", "alphas", "reconstruction", "prediction_outputs", "prediction_output",
    "regression_outputs", "mean_predictions", "action_preds", "spectrogram", "waveform", "iou_scores",
)  # fmt: skip
EMBEDDINGS = ("_embeds", "_embeddings")
PIXELS = ("ViTMAEForPreTrainingOutput", "HieraForPreTrainingOutput", "VideoMAEForPreTrainingOutput")
"""Outputs whose ``logits`` are pixels."""
FLAGS = ("ElectraForPreTrainingOutput",)
"""Outputs whose ``logits`` (E, T) say yes or no for every token."""
FOCAL = ("focal_alpha", "focal_loss_alpha")
"""Settings of detectors that score every class by itself."""


@dataclass(slots=True)
class ScoredHead:
    """One tensor that a model returns, and what it stands for."""

    scores: Tensor
    """(..., C): what a softmax chooses among lies on the last axis."""
    kind: HeadKind
    over_tokens: bool = False
    """Whether the last axis runs over tokens."""
    counted: Tensor | None = None
    """Which rows of the scores count, shaped like them without the last axis; None: all."""
    choices: Tensor | None = None
    """Which scores can be chosen, shaped like them: a span cannot start at padding; None: all."""


def read_heads(output: Any, model: nn.Module) -> list[ScoredHead]:
    """The parts of a model's output that count, in the order of its fields; see the table at the top of this module.

    Raises ``DataError`` if the output holds no tensor.
    """
    config = getattr(model, "config", None)
    if isinstance(output, Mapping):
        found = [*_known(output, config)] or [*_embedded(output)]
        if found:
            return found
    elif isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] == getattr(model, "num_classes", None):
        return [ScoredHead(output, "softmax" if output.shape[1] > 1 else "number")]
    return [ScoredHead(first_tensor(output), "number")]


def _known(output: Mapping[str, Any], config: Any) -> Iterator[ScoredHead]:
    for name, value in output.items():
        if not _is_floating(value):
            continue
        if name == "logits":
            yield _logits(value, output, config)
        elif name in LOGITS:
            yield _by_pixel(value, LOGITS[name], over_tokens=name in SPANS)
        elif name in NUMBERS:
            yield ScoredHead(value, "number")


def _embedded(output: Mapping[str, Any]) -> Iterator[ScoredHead]:
    for name, value in output.items():
        if name.endswith(EMBEDDINGS) and _is_floating(value):
            yield ScoredHead(value, "number")


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _logits(logits: Tensor, output: Mapping[str, Any], config: Any) -> ScoredHead:
    problem = getattr(config, "problem_type", None)
    if problem == "regression" or type(output).__name__ in PIXELS:
        return ScoredHead(logits, "number")
    if problem == "multi_label_classification" or _is_detector_by_class(output, config):
        return _by_pixel(logits, "sigmoid")
    if type(output).__name__ in FLAGS:
        return ScoredHead(logits.unsqueeze(-1), "sigmoid")
    if logits.dim() == 3 and "ImageSegmentation" in type(output).__name__:
        return ScoredHead(logits.unsqueeze(-1), "sigmoid")
    if logits.dim() == 4:
        return _by_pixel(logits, "softmax" if logits.shape[1] > 1 else "sigmoid")
    return ScoredHead(logits, "softmax" if logits.shape[-1] > 1 else "number")


def _is_detector_by_class(output: Mapping[str, Any], config: Any) -> bool:
    if not isinstance(output.get("pred_boxes"), Tensor):
        return False
    independent = getattr(config, "model_type", None) in ("owlvit", "owlv2", "omdet-turbo")
    return independent or any(hasattr(config, name) for name in FOCAL)


def _by_pixel(scores: Tensor, kind: HeadKind, *, over_tokens: bool = False) -> ScoredHead:
    """Of (E, V, height, width) the axis V is the one to choose along."""
    return ScoredHead(scores.movedim(1, -1) if scores.dim() == 4 else scores, kind, over_tokens)


def draw_direction(head: ScoredHead, temperature: float, generator: torch.Generator) -> Tensor:
    r"""A random vector, shaped like the scores z, with the covariance that an error has a cost in.

    .. math:: \mathrm{softmax}: \mathrm{diag}(q) - q q^\top, \quad q = \mathrm{softmax}(z / \tau); \qquad
              \mathrm{sigmoid}: \mathrm{diag}(q (1 - q)), \quad q = \sigma(z / \tau); \qquad \mathrm{number}: I

    Zero for what does not count and cannot be chosen.
    """
    scores, noise = head.scores.detach().float(), _noise(head, generator)
    if head.kind == "number":
        direction = noise
    elif head.kind == "sigmoid":
        q = (scores / temperature).sigmoid()
        direction = (q * (1 - q)).sqrt() * noise
    else:
        if head.choices is not None:
            scores = scores.masked_fill(~head.choices, torch.finfo(scores.dtype).min)
        q = (scores / temperature).softmax(-1)
        root = q.sqrt() * noise
        direction = root - q * root.sum(-1, keepdim=True)
    return direction if head.counted is None else direction * head.counted.unsqueeze(-1)


def _noise(head: ScoredHead, generator: torch.Generator) -> Tensor:
    """Normal numbers; with padding they are drawn example by example, so that padding takes none from the others."""
    scores = head.scores
    kept = head.counted if head.choices is None else head.choices
    if kept is None:
        return torch.randn(scores.shape, generator=generator, device=scores.device)
    noise = torch.zeros(scores.shape, device=scores.device)
    for row, keep in zip(noise, kept, strict=True):
        row[keep] = torch.randn(row[keep].shape, generator=generator, device=scores.device)
    return noise


def first_tensor(output: Any) -> Tensor:
    """The hidden states among a block's outputs: the output itself or its first tensor."""
    if isinstance(output, Tensor):
        return output
    for item in output.values() if isinstance(output, Mapping) else output:
        if isinstance(item, Tensor):
            return item
    raise DataError(f"a block returned no tensor but `{type(output).__name__}`; leave its layers out with `ignore`")
