"""Scores of predicted tokens: language models, masked language models and encoder-decoders differ in what is asked.

Shapes: E examples of a pass, T positions, V entries of the vocabulary.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fips.data import IGNORED_LABEL, Batches
from fips.errors import DataError, ModelError
from fips.evaluation.divergence import Divergence, RatioMean, differences, divergence_of, times
from fips.evaluation.predictor import (
    NOT_FINITE,
    Predictor,
    Progress,
    check_vocabulary,
    counted,
    vocabulary_size,
)
from fips.evaluation.registry import Evaluator
from fips.evaluation.results import EvaluationResult

__all__ = ["TokenEvaluator", "TokenScores"]

MAX_LOGITS = 1 << 28
"""Logits of one pass through a language model (1 GiB in float32); larger batches run in several passes."""
MAX_LOSS_LOGITS = 1 << 25
"""Logits that the loss converts to float32 at a time (128 MiB)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """What was found over all scored tokens, an example being a draw."""

    loss: float
    """Nats per token."""
    perplexity: float
    perplexity_standard_error: float | None
    accuracy_percent: float
    num_tokens: int
    against: Divergence | None


class TokenEvaluator(Evaluator):
    """Scores of tokens, each predicted as one of the vocabulary."""

    def check(self, model: nn.Module, batches: Batches, *, compared: bool) -> None:
        if batches.description.get("purpose") == "calibration":
            raise DataError("these batches hold no scored text; load them with `purpose='evaluation'`")

    def run(self, models: Sequence[Predictor], batches: Batches, progress: Progress | None) -> EvaluationResult:
        scores = RatioMean()
        for number, batch in enumerate(counted(batches, len(batches), progress)):
            check_vocabulary(models[0].module, batch["input_ids"])
            if number == 0:
                for model in models:
                    self.try_model(model, batch)
            for rows in _passes(models, batch):
                targets_ET = self.targets(rows)
                found = [model.logits(**self.inputs(model, rows)) for model in models]
                for model, logits in zip(models, found, strict=True):
                    _check_shape(model, logits, targets_ET)
                scores.add(_sums(found, targets_ET), (targets_ET != IGNORED_LABEL).sum(1))
        return self.result(_token_scores(scores), batches)

    def try_model(self, model: Predictor, batch: dict[str, Tensor]) -> None:
        """Raise ``ModelError`` for a model that the first batch shows to be of another task."""

    def inputs(self, model: Predictor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: batch[name] for name in batch if name != "labels"}

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """The token that is asked for at every position of the logits (E, T), -100 for none."""
        return batch["labels"]

    @abstractmethod
    def result(self, scores: TokenScores, batches: Batches) -> EvaluationResult: ...


def _check_shape(model: Predictor, logits: Tensor, targets_ET: Tensor) -> None:
    if logits.shape[:2] != targets_ET.shape or logits.dim() != 3 or logits.shape[2] < int(targets_ET.max()) + 1:
        raise ModelError(
            f"`{model.name}` returns logits of shape {tuple(logits.shape)} for {targets_ET.shape[1]} tokens of "
            f"{targets_ET.shape[0]} texts, not one prediction of a token for each; perplexity is for language models"
        )


def _passes(models: Sequence[Predictor], batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Slices of a batch whose logits, of all models, stay below ``MAX_LOGITS`` (one row at least)."""
    num_rows, length = batch["labels"].shape
    step = max(1, MAX_LOGITS // (len(models) * length * (vocabulary_size(models[0].module) or 1)))
    for start in range(0, num_rows, step):
        yield {name: value[start : start + step] for name, value in batch.items()}


def _sums(logits: Sequence[Tensor], targets_ET: Tensor) -> Tensor:
    r"""Per example the sums over its scored positions of :math:`-\ln \mathrm{softmax}(z_t)_{y_t}` and of hits, target
    y, logits z.

    With the logits of the original too, also of the change of the loss, of the KL and of the agreement: ``[E, 2]`` or
    ``[E, 5]``. Log-probabilities in float32, sums in float64, ``MAX_LOSS_LOGITS`` logits at a time.
    """
    device = logits[0].device
    targets = targets_ET.flatten().to(device)
    flat = [each.flatten(0, 1) for each in logits]
    step = max(1, MAX_LOSS_LOGITS // flat[0].shape[-1])
    sums_EM = torch.zeros(len(targets_ET), 2 if len(logits) == 1 else 5, dtype=torch.float64)
    for start in range(0, len(targets), step):
        scored = targets[start : start + step] != IGNORED_LABEL
        rows = [each[start : start + step][scored].to(device).float() for each in flat]
        labels = targets[start : start + step][scored]
        losses = [nn.functional.cross_entropy(each, labels, reduction="none") for each in rows]
        measures = [losses[0][:, None], (rows[0].argmax(-1) == labels)[:, None]]
        if len(rows) > 1:
            measures += [(losses[0] - losses[1])[:, None], differences(*rows)]
        example = (start + scored.nonzero()[:, 0]) // targets_ET.shape[1]
        sums_EM.index_add_(0, example.cpu(), torch.cat(measures, dim=1).to("cpu", torch.float64))
    return sums_EM


def _token_scores(scores: RatioMean) -> TokenScores:
    means, errors = scores.result()
    if not math.isfinite(means[0]):
        raise ModelError(NOT_FINITE)
    perplexity = torch.tensor(means[0], dtype=torch.float64).exp().item()
    return TokenScores(
        loss=means[0],
        perplexity=perplexity,
        perplexity_standard_error=times(perplexity, errors[0]),
        accuracy_percent=100 * means[1],
        num_tokens=scores.num_predictions,
        against=divergence_of(means[2:], errors[2:], unit=1) if len(means) > 2 else None,
    )
