"""Quality of a model on ``Batches``: accuracy of image classifiers, perplexity of language models.

Shapes: B examples of a batch, W tokens of a window, V entries of the vocabulary, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fips.calibration.precision import in_native_types
from fips.data import IGNORED_LABEL, Batches
from fips.errors import DataError, ModelError
from fips.evaluation.divergence import Divergence, RatioMean, differences
from fips.evaluation.results import EvaluationResult, ImageResult, TextResult

__all__ = ["evaluate"]

Progress = Callable[[int, int], None]
T = TypeVar("T")

MAX_LOGITS = 1 << 28
"""Logits of one pass through a language model (1 GiB in float32); larger batches run in several passes."""
MAX_LOSS_LOGITS = 1 << 25
"""Logits that the loss converts to float32 at a time (128 MiB)."""


def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    against: nn.Module | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Accuracy on images or perplexity on text, depending on what ``batches`` hold.

    ``model`` is called with the pixels, or with ``input_ids`` and ``attention_mask`` by name; it returns logits or
    an object with ``logits``. It runs in evaluation mode without gradients and is left in the mode it had. Batches
    go to ``device``, by default to that of the model's first floating-point parameter; the model is not moved.
    ``against`` is the original that the predictions are compared with (``result.against``), on the same batches.
    ``progress`` is called with the number of finished batches and of all batches.
    """
    with ExitStack() as stack:
        models = []
        for each in [model] if against is None else [model, against]:
            stack.enter_context(_evaluation_mode(each))
            stack.enter_context(in_native_types(each))
            models.append(_Model.placed(each, device))
        if batches.kind == "image":
            _check_classes(model, batches)
            return _evaluate_images(models, batches, progress)
        _check_text(batches)
        return _evaluate_text(models, batches, progress)


@dataclass(frozen=True, slots=True)
class _Model:
    """A model with the place where it expects its inputs, and their floating type."""

    module: nn.Module
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def placed(cls, module: nn.Module, device: torch.device | str | None) -> _Model:
        first = next((value for value in module.parameters() if value.is_floating_point()), torch.empty(0))
        return cls(module, torch.device(device) if device is not None else first.device, first.dtype)

    def logits(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return _logits(self.module(*map(self._here, args), **{key: self._here(value) for key, value in kwargs.items()}))

    def _here(self, value: Tensor) -> Tensor:
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


def _evaluate_images(models: Sequence[_Model], batches: Batches, progress: Progress | None) -> ImageResult:
    scores = RatioMean()
    for batch in _counted(batches, len(batches), progress):
        hits, found = [], []
        for model in models:
            found.append(model.logits(batch["pixel_values"]).float().cpu())
            _check_class_count(batches, found[-1].shape[-1])
            hits.append(_hits(found[-1], batch["labels"].cpu()))
        measures_EM = hits[0]
        if len(found) > 1:
            measures_EM = torch.cat([measures_EM, hits[0][:, :1] - hits[1][:, :1], differences(*found)], dim=1)
        scores.add(measures_EM, torch.ones(len(measures_EM)))
    means, errors = scores.result()
    share, count = means[0], scores.num_predictions
    return ImageResult(
        top1_percent=100 * share,
        top5_percent=100 * means[1],
        top1_standard_error=100 * math.sqrt(share * (1 - share) / count),
        num_images=count,
        data=batches.description,
        against=_divergence(means[2:], errors[2:], unit=100) if len(models) > 1 else None,
    )


def _hits(logits_EV: Tensor, labels_E: Tensor) -> Tensor:
    """Whether the label is the highest logit, and among the five highest: ``[E, 2]``, 0 or 1."""
    if not logits_EV.isfinite().all():
        raise ModelError("the model returned logits that are not finite; try `dtype=float32`, or check its weights")
    best = logits_EV.topk(min(5, logits_EV.shape[-1]), dim=-1).indices == labels_E[:, None]
    return torch.stack([best[:, 0], best.any(dim=-1)], dim=1).double()


def _divergence(means: Sequence[float], errors: Sequence[float | None], *, unit: float) -> Divergence:
    """Of the means of change, KL and agreement and their standard errors; ``unit`` of a change."""
    return Divergence(
        change=unit * means[0],
        change_standard_error=_times(unit, errors[0]),
        kl=means[1],
        kl_standard_error=errors[1],
        agreement_percent=100 * means[2],
        agreement_standard_error=_times(100, errors[2]),
    )


def _times(unit: float, error: float | None) -> float | None:
    return None if error is None else unit * error


# Text


def _check_text(batches: Batches) -> None:
    if not batches.num_bytes:
        raise DataError(
            "these batches hold no scored text, which perplexity needs; load them with `purpose='evaluation'`"
        )


def _evaluate_text(models: Sequence[_Model], batches: Batches, progress: Progress | None) -> TextResult:
    scores = RatioMean()
    for number, batch in enumerate(_counted(batches, len(batches), progress)):
        _check_vocabulary(models[0].module, batch["input_ids"])
        if number == 0:
            for model in models:
                _check_causal(model, batch)
        for rows in _passes(models, batch):
            found = [model.logits(**{name: rows[name] for name in rows if name != "labels"}) for model in models]
            scores.add(_sums(found, rows["labels"]), (rows["labels"][:, 1:] != IGNORED_LABEL).sum(1))
    means, errors = scores.result()
    if not math.isfinite(means[0]):
        raise ModelError("the model returned logits that are not finite; try `dtype=float32`, or check its weights")
    perplexity = torch.tensor(means[0], dtype=torch.float64).exp().item()
    num_bytes = batches.num_bytes or 0
    return TextResult(
        perplexity=perplexity,
        perplexity_standard_error=_times(perplexity, errors[0]),
        bits_per_byte=means[0] * scores.num_predictions / math.log(2) / num_bytes,
        num_tokens=scores.num_predictions,
        num_bytes=num_bytes,
        sequence_length=int(batches.description["sequence_length"]),
        data=batches.description,
        against=_divergence(means[1:], errors[1:], unit=1) if len(models) > 1 else None,
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


def _check_causal(model: _Model, batch: dict[str, Tensor]) -> None:
    """Raise ``ModelError`` unless a model predicts every token from those before it, which perplexity is made of.

    The last of a few tokens is changed: what was predicted at those before it must stay.
    """
    length = min(8, int(batch["attention_mask"][0].sum()) if "attention_mask" in batch else batch["input_ids"].shape[1])
    if length < 2:
        return
    ids_ET = batch["input_ids"][:1, :length]
    other_ET = ids_ET.clone()
    other_ET[0, -1] = 0 if ids_ET[0, -1] != 0 else 1
    first, second = model.logits(input_ids=ids_ET), model.logits(input_ids=other_ET)
    name = type(model.module).__name__
    if first.dim() != 3 or first.shape[1] != length or first.shape[2] < (_vocabulary_size(model.module) or 0):
        raise ModelError(
            f"`{name}` returns logits of shape {tuple(first.shape)} for {length} tokens, not one prediction of a token "
            "for each; perplexity is for language models"
        )
    change, size = ((first - second)[:, :-1].abs().max(), first[:, :-1].abs().max())
    if bool(change > 1e-3 * size):
        raise ModelError(
            f"`{name}` sees the tokens that follow, so it does not predict them and perplexity means nothing; "
            "give a causal language model"
        )


def _passes(models: Sequence[_Model], batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Slices of a batch whose logits, of all models, stay below ``MAX_LOGITS`` (one row at least)."""
    num_rows, length = batch["input_ids"].shape
    step = max(1, MAX_LOGITS // (len(models) * length * (_vocabulary_size(models[0].module) or 1)))
    for start in range(0, num_rows, step):
        yield {name: value[start : start + step] for name, value in batch.items()}


def _sums(logits: Sequence[Tensor], labels_ET: Tensor) -> Tensor:
    r"""Per window the sum over its scored positions of :math:`-\ln \mathrm{softmax}(z_t)_{y_{t+1}}`, label y, logits z.

    With the logits of the original too, also of its change, of the KL and of the agreement: ``[E, 1]`` or ``[E, 4]``.
    Log-probabilities in float32, sums in float64, ``MAX_LOSS_LOGITS`` logits at a time.
    """
    device = logits[0].device
    targets = nn.functional.pad(labels_ET[:, 1:], (0, 1), value=IGNORED_LABEL).flatten().to(device)
    flat = [each.flatten(0, 1) for each in logits]
    step = max(1, MAX_LOSS_LOGITS // flat[0].shape[-1])
    sums_EM = torch.zeros(len(labels_ET), 1 if len(logits) == 1 else 4, dtype=torch.float64)
    for start in range(0, len(targets), step):
        scored = targets[start : start + step] != IGNORED_LABEL
        rows = [each[start : start + step][scored].to(device).float() for each in flat]
        labels = targets[start : start + step][scored]
        losses = [nn.functional.cross_entropy(each, labels, reduction="none") for each in rows]
        measures = [losses[0][:, None]]
        if len(rows) > 1:
            measures += [(losses[0] - losses[1])[:, None], differences(*rows)]
        window = (start + scored.nonzero()[:, 0]) // labels_ET.shape[1]
        sums_EM.index_add_(0, window.cpu(), torch.cat(measures, dim=1).to("cpu", torch.float64))
    return sums_EM
