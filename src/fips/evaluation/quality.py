"""Quality of a model on ``Batches``, by what it predicts."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn

from fips.bars import progress_bars
from fips.calibration.precision import in_native_types
from fips.data import Batches
from fips.evaluation import causal, classes, embeddings, masked, targets  # noqa: F401, each registers its metric
from fips.evaluation.predictor import Predictor, Progress, evaluation_mode, require_comparable
from fips.evaluation.registry import evaluator_for
from fips.evaluation.results import EvaluationResult

__all__ = ["check_evaluation", "evaluate"]


def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    against: nn.Module | None = None,
    device: torch.device | str | None = None,
    progress: Progress | bool | None = None,
) -> EvaluationResult:
    """How good a model is at what the batches were made for (``Batches.task``), by ``fips.load_data`` for that model.

    ========================== =======================================================================================
    causal language models     perplexity and bits per byte, every token scored once within its window
    masked language models     pseudo-perplexity of tokens hidden by a seed
    encoder-decoders           perplexity of targets given their sources
    classifiers                accuracy: of images (top-1, top-5), of texts, of words of texts
    without a head             of embeddings: cosine to the original's, Spearman on pairs of texts with scores
    ========================== =======================================================================================

    ``model`` is called with the pixels, or with the inputs of texts by name; it returns logits or an object with
    ``logits``, or hidden states. It runs in evaluation mode without gradients and is left in the mode it had. Batches
    go to ``device``, by default to that of the model's first floating-point parameter; the model is not moved.
    ``against`` is the original that the predictions are compared with (``result.against``), on the same batches.
    ``progress=True`` shows a bar, on a terminal or in a notebook, or give a function that is called with the number of
    finished batches and of all batches.

    Raises ``DataError`` for batches that cannot score the model, ``ModelError`` for a model of another task,
    ``ConfigError`` for a device that is not there.
    """
    check_evaluation(model, batches, compared=against is not None)
    if against is not None:
        require_comparable(model, against)
    with ExitStack() as stack:
        models = []
        for each in [model] if against is None else [model, against]:
            stack.enter_context(evaluation_mode(each))
            stack.enter_context(in_native_types(each))
            models.append(Predictor.placed(each, device))
        if isinstance(progress, bool):
            progress = stack.enter_context(progress_bars()).counter("evaluate") if progress else None
        return evaluator_for(batches).run(models, batches, progress)


def check_evaluation(model: nn.Module, batches: Batches, *, compared: bool) -> None:
    """What ``evaluate`` refuses before the first pass; the model may be without weights."""
    evaluator_for(batches).check(model, batches, compared=compared)
