"""Accuracy of classifiers: of images, of texts, and of the words of texts.

Shapes: E examples of a batch, T tokens, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fips.data import IGNORED_LABEL, Batches
from fips.errors import DataError, ModelError
from fips.evaluation.divergence import RatioMean, differences, divergence_of, times
from fips.evaluation.predictor import NOT_FINITE, Predictor, Progress, check_vocabulary, counted
from fips.evaluation.registry import Evaluator, register
from fips.evaluation.results import EvaluationResult, ImageResult, LabelResult

__all__ = ["ImageEvaluator", "TextEvaluator", "WordEvaluator"]


class _ClassEvaluator(Evaluator):
    """Whether the label has the highest logit."""

    labelled = "a `label` column"
    """Where labels come from."""

    def check(self, model: nn.Module, batches: Batches, *, compared: bool) -> None:
        """The labels must be classes of the model, as far as data and model tell before the first pass."""
        if batches.max_label is None:
            raise DataError(
                f"`{batches.description.get('source')}` has no labels, which accuracy needs; give {self.labelled}"
            )
        config = getattr(model, "config", None)
        problem = getattr(config, "problem_type", None)
        if problem in ("regression", "multi_label_classification"):
            raise ModelError(
                f"`{type(model).__name__}` has `problem_type: {problem}`; accuracy is for one class per example"
            )
        count = getattr(config, "num_labels", getattr(model, "num_classes", None))
        names = batches.class_names
        if count is not None:
            _check_class_count(batches, count)
        known = tuple(str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items()))
        if names is not None and names != known and set(names) == set(known):
            different = next(index for index, pair in enumerate(zip(names, known, strict=True)) if pair[0] != pair[1])
            raise DataError(
                f"data and model number the classes differently: class {different} is `{names[different]}` in the data "
                f"and `{known[different]}` in the model; rename the folders so that they sort like `id2label`"
            )


def _check_class_count(batches: Batches, count: int) -> None:
    got = (batches.max_label or 0) + 1 if batches.class_names is None else len(batches.class_names)
    if got > count or (batches.class_names is not None and got != count):
        raise DataError(
            f"got {got} classes in `{batches.description.get('source')}`, the model has {count}; "
            "evaluate on the classes the model was trained for, all of them"
        )
    if count == 1:
        raise ModelError("the model has a single output, a number and no class; accuracy is for classifiers")


@register
class ImageEvaluator(_ClassEvaluator):
    """Images, called by position, as image libraries do."""

    task = "image-classification"
    labelled = "a folder with one sub-folder per class"

    def run(self, models: Sequence[Predictor], batches: Batches, progress: Progress | None) -> ImageResult:
        scores = RatioMean()
        for batch in counted(batches, len(batches), progress):
            found = [model.logits(batch["pixel_values"]).double().cpu() for model in models]
            scores.add(_measures(found, batch["labels"], batches), torch.ones(len(batch["labels"])))
        means, errors = scores.result()
        share, count = means[0], scores.num_predictions
        return ImageResult(
            top1_percent=100 * share,
            top5_percent=100 * means[1],
            top1_standard_error=100 * math.sqrt(share * (1 - share) / count),
            num_images=count,
            data=batches.description,
            against=divergence_of(means[2:], errors[2:], unit=100) if len(models) > 1 else None,
        )


class _LabelEvaluator(_ClassEvaluator):
    """Labels of texts, or of words of them."""

    def run(self, models: Sequence[Predictor], batches: Batches, progress: Progress | None) -> EvaluationResult:
        scores = RatioMean()
        for batch in counted(batches, len(batches), progress):
            check_vocabulary(models[0].module, batch["input_ids"])
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            found = [self.rows(model, model.logits(**inputs).double().cpu(), batch["labels"]) for model in models]
            labels, draws = batch["labels"][batch["labels"] != IGNORED_LABEL], _draws(batch["labels"])
            measures = _measures(found, labels, batches)
            sums = torch.zeros(len(batch["labels"]), measures.shape[1], dtype=torch.float64)
            scores.add(sums.index_add_(0, draws, measures), torch.bincount(draws, minlength=len(sums)))
        means, errors = scores.result()
        return LabelResult(
            accuracy_percent=100 * means[0],
            accuracy_standard_error=times(100, errors[0]),
            num_texts=batches.num_samples,
            num_labels=scores.num_predictions,
            task=self.task,
            data=batches.description,
            against=divergence_of(means[2:], errors[2:], unit=100) if len(models) > 1 else None,
        )

    def rows(self, model: Predictor, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits of what is labelled, ``[P, K]``."""
        if logits.dim() != labels.dim() + 1 or logits.shape[:-1] != labels.shape:
            raise ModelError(
                f"`{model.name}` returns logits of shape {tuple(logits.shape)} for labels of shape "
                f"{tuple(labels.shape)}; load the data for this model with `fips.load_data`"
            )
        return logits[labels != IGNORED_LABEL]


@register
class TextEvaluator(_LabelEvaluator):
    """Texts, or pairs of them, with a class each."""

    task = "text-classification"
    labelled = "a table with a text and a `label` column"


@register
class WordEvaluator(_LabelEvaluator):
    """Words of texts, with a class each; that of a word is read at its first token."""

    task = "token-classification"
    labelled = "a table with a column of lists of words and one of their labels"


def _draws(labels: Tensor) -> Tensor:
    """The example that every scored label belongs to."""
    return (labels != IGNORED_LABEL).nonzero()[:, 0]


def _measures(found: Sequence[Tensor], labels_P: Tensor, batches: Batches) -> Tensor:
    """Hits of the first, and of the five highest; with an original also change, KL and agreement: ``[P, 2 or 5]``."""
    hits = []
    for logits_PK in found:
        _check_class_count(batches, logits_PK.shape[-1])
        hits.append(_hits(logits_PK, labels_P.cpu()))
    if len(found) == 1:
        return hits[0]
    return torch.cat([hits[0], hits[0][:, :1] - hits[1][:, :1], differences(*found)], dim=1)


def _hits(logits_PK: Tensor, labels_P: Tensor) -> Tensor:
    """Whether the label is the highest logit, and among the five highest: ``[P, 2]``, 0 or 1."""
    if not logits_PK.isfinite().all():
        raise ModelError(NOT_FINITE)
    best = logits_PK.topk(min(5, logits_PK.shape[-1]), dim=-1).indices == labels_P[:, None]
    return torch.stack([best[:, 0], best.any(dim=-1)], dim=1).double()
