"""Quality of a model on ``Batches``: accuracy of image classifiers, perplexity of language models.

Shapes: B examples of a batch, W tokens of a window, V entries of the vocabulary, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fips.calibration.precision import in_native_types
from fips.data import IGNORED_LABEL, Batches
from fips.errors import DataError, ModelError

__all__ = ["EvaluationResult", "ImageResult", "Metric", "TextResult", "evaluate"]

Progress = Callable[[int, int], None]
T = TypeVar("T")

MAX_LOGITS = 1 << 28
"""Logits of one pass through a language model (1 GiB in float32); larger batches run in several passes."""
MAX_LOSS_LOGITS = 1 << 25
"""Logits that the loss converts to float32 at a time (128 MiB)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """The one number of an evaluation that a table shows."""

    name: str
    value: float
    higher_is_better: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageResult:
    r"""Share of images whose label is the highest logit, or among the five highest.

    ``top1_standard_error`` is :math:`100 \sqrt{p (1 - p) / n}` percentage points for a share p of n images.
    """

    top1_percent: float
    top5_percent: float
    top1_standard_error: float
    num_images: int
    data: dict[str, Any]
    """``Batches.description``."""
    kind: Literal["image"] = "image"

    @property
    def headline(self) -> Metric:
        return Metric(name="top1_percent", value=self.top1_percent, higher_is_better=True)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the headline, ready for JSON."""
        return {**asdict(self), "headline": asdict(self.headline)}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextResult:
    r"""How well a language model predicts a text.

    .. math:: \text{perplexity} = \exp\Bigl(\tfrac{1}{n} \sum_i -\ln p(t_i \mid t_{<i})\Bigr), \qquad
              \text{bits per byte} = \frac{\sum_i -\log_2 p(t_i \mid t_{<i})}{\text{UTF-8 bytes of } t_1 \dots t_n}

    Perplexity compares models with the same tokenizer, bits per byte any two. Tokens are conditioned on their
    window only, so both numbers fall with ``sequence_length``.
    """

    perplexity: float
    bits_per_byte: float
    num_tokens: int
    """Scored tokens (n)."""
    num_bytes: int
    sequence_length: int
    data: dict[str, Any]
    """``Batches.description``."""
    kind: Literal["text"] = "text"

    @property
    def headline(self) -> Metric:
        return Metric(name="perplexity", value=self.perplexity, higher_is_better=False)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the headline, ready for JSON."""
        return {**asdict(self), "headline": asdict(self.headline)}


EvaluationResult = ImageResult | TextResult


def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Accuracy on images or perplexity on text, depending on what ``batches`` hold.

    ``model`` is called with the pixels, or with ``input_ids`` and ``attention_mask`` by name; it returns logits or
    an object with ``logits``. It runs in evaluation mode without gradients and is left in the mode it had. Batches
    go to ``device``, by default to that of the model's first floating-point parameter; the model is not moved.
    ``progress`` is called with the number of finished batches and of all batches.
    """
    with _evaluation_mode(model), in_native_types(model):
        first = next((value for value in model.parameters() if value.is_floating_point()), torch.empty(0))
        place = _Place(torch.device(device) if device is not None else first.device, first.dtype)
        if batches.kind == "image":
            _check_classes(model, batches)
            return _evaluate_images(model, batches, place, progress)
        _check_text(batches)
        return _evaluate_text(model, batches, place, progress)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a model expects its inputs, and in which floating type."""

    device: torch.device
    dtype: torch.dtype

    def __call__(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.dtype if value.is_floating_point() else None)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _counted(batches: Iterable[T], total: int, progress: Progress | None) -> Iterator[T]:
    for done, batch in enumerate(batches, start=1):
        yield batch
        if progress is not None:
            progress(done, total)


def _logits(output: Any) -> Tensor:
    """Logits of a ``transformers`` output, or of a module that returns them."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"the model returned `{type(output).__name__}` without logits; "
            "give an image classifier or a causal language model"
        )
    return logits


# Images


def _check_classes(model: nn.Module, batches: Batches) -> None:
    """The labels must be classes of the model, as far as data and model tell before the first pass."""
    if batches.max_label is None:
        raise DataError(
            f"`source={batches.description.get('source')}` has no labels, which accuracy needs; "
            "give a folder with one sub-folder per class"
        )
    config = getattr(model, "config", None)
    count = getattr(config, "num_labels", getattr(model, "num_classes", None))
    names = batches.class_names
    if count is not None:
        _check_class_count(batches, count)
    known = tuple(str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items()))
    if names is not None and names != known and set(names) == set(known):
        different = next(index for index, pair in enumerate(zip(names, known, strict=True)) if pair[0] != pair[1])
        raise DataError(
            f"data and model number the classes differently: class {different} is `{names[different]}` in the data and "
            f"`{known[different]}` in the model; rename the folders so that they sort like `id2label`"
        )


def _check_class_count(batches: Batches, count: int) -> None:
    got = (batches.max_label or 0) + 1 if batches.class_names is None else len(batches.class_names)
    if got > count or (batches.class_names is not None and got != count):
        raise DataError(
            f"got {got} classes in `source={batches.description.get('source')}`, the model has {count}; "
            "evaluate on the classes the model was trained for, all of them"
        )


def _evaluate_images(model: nn.Module, batches: Batches, place: _Place, progress: Progress | None) -> ImageResult:
    top1 = top5 = count = 0
    for batch in _counted(batches, len(batches), progress):
        logits_EV = _logits(model(place(batch["pixel_values"]))).float()
        _check_class_count(batches, logits_EV.shape[-1])
        if not logits_EV.isfinite().all():
            raise ModelError("the model returned logits that are not finite; try `dtype=float32`, or check its weights")
        best = logits_EV.topk(min(5, logits_EV.shape[-1]), dim=-1).indices
        hits = best == place(batch["labels"])[:, None]
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.sum())
        count += len(hits)
    share = top1 / count
    return ImageResult(
        top1_percent=100 * share,
        top5_percent=100 * top5 / count,
        top1_standard_error=100 * math.sqrt(share * (1 - share) / count),
        num_images=count,
        data=batches.description,
    )


# Text


def _check_text(batches: Batches) -> None:
    if not batches.num_bytes:
        raise DataError(
            "these batches hold no scored text, which perplexity needs; load them with `purpose='evaluation'`"
        )


def _evaluate_text(model: nn.Module, batches: Batches, place: _Place, progress: Progress | None) -> TextResult:
    total, count = 0.0, 0
    for batch in _counted(batches, len(batches), progress):
        _check_vocabulary(model, batch["input_ids"])
        for rows in _passes(model, batch):
            logits_ETV = _logits(model(**{name: place(rows[name]) for name in rows if name != "labels"}))
            total += _nll_sum(logits_ETV, place(rows["labels"]))
            count += int((rows["labels"][:, 1:] != IGNORED_LABEL).sum())
    if not math.isfinite(total):
        raise ModelError("the model returned logits that are not finite; try `dtype=float32`, or check its weights")
    num_bytes = batches.num_bytes or 0
    return TextResult(
        perplexity=torch.tensor(total / count, dtype=torch.float64).exp().item(),
        bits_per_byte=total / math.log(2) / num_bytes,
        num_tokens=count,
        num_bytes=num_bytes,
        sequence_length=int(batches.description["sequence_length"]),
        data=batches.description,
    )


def _vocabulary_size(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    size: int | None = getattr(config.get_text_config() if config is not None else None, "vocab_size", None)
    return size


def _check_vocabulary(model: nn.Module, input_ids_ET: Tensor) -> None:
    size, largest = _vocabulary_size(model), int(input_ids_ET.max())
    if size is not None and largest >= size:
        raise DataError(
            f"got token {largest}, the model knows {size} tokens; use the tokenizer that belongs to the model"
        )


def _passes(model: nn.Module, batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Slices of a batch whose logits stay below ``MAX_LOGITS`` (one row at least)."""
    num_rows, length = batch["input_ids"].shape
    step = max(1, MAX_LOGITS // (length * (_vocabulary_size(model) or 1)))
    for start in range(0, num_rows, step):
        yield {name: value[start : start + step] for name, value in batch.items()}


def _nll_sum(logits_ETV: Tensor, labels_ET: Tensor) -> float:
    r"""Sum of :math:`-\ln \mathrm{softmax}(\text{logits}_{e,t})_{\text{labels}_{e,t+1}}` over scored positions.

    Log-probabilities in float32, the sum in float64, ``MAX_LOSS_LOGITS`` logits at a time.
    """
    targets = nn.functional.pad(labels_ET[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()
    logits = logits_ETV.flatten(0, 1)
    step = max(1, MAX_LOSS_LOGITS // logits.shape[-1])
    total = 0.0
    for start in range(0, len(targets), step):
        chunk = slice(start, start + step)
        losses = nn.functional.cross_entropy(
            logits[chunk].float(), targets[chunk], ignore_index=IGNORED_LABEL, reduction="none"
        )
        total += losses.to("cpu", torch.float64).sum().item()
    return total
