"""Embeddings of models without a head: how near they are to the original's, and what they say of pairs of texts.

Shapes: E examples of a batch, T tokens, D numbers of an embedding, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fips.data import Batches
from fips.errors import DataError, ModelError
from fips.evaluation.divergence import EmbeddingDistance, RatioMean
from fips.evaluation.predictor import NOT_FINITE, Predictor, Progress, check_vocabulary, counted
from fips.evaluation.registry import Evaluator, register
from fips.evaluation.results import EmbeddingResult

__all__ = ["EmbeddingEvaluator"]


@register
class EmbeddingEvaluator(Evaluator):
    """Texts or images; every two texts that follow each other are a pair where the data has scores of pairs."""

    task = "embedding"

    def check(self, model: nn.Module, batches: Batches, *, compared: bool) -> None:
        if not compared and not batches.description.get("scored_pairs"):
            raise DataError(
                f"`{type(model).__name__}` gives embeddings, which have no score of their own; name the original to "
                "compare with (--against MODEL, `against=`), or give data with two text columns and a score"
            )

    def run(self, models: Sequence[Predictor], batches: Batches, progress: Progress | None) -> EmbeddingResult:
        distances, scores = RatioMean(), []
        cosines: list[list[Tensor]] = [[] for _ in models]
        width, pooling = 0, ""
        for batch in counted(batches, len(batches), progress):
            found_ED = []
            for model in models:
                embeddings_ED, pooling = _embeddings(model, batch)
                found_ED.append(embeddings_ED)
            width = found_ED[0].shape[1]
            if batches.description.get("scored_pairs"):  # labels of images are classes
                scores.append(batch["labels"])
                for kept, each_ED in zip(cosines, found_ED, strict=True):
                    kept.append(nn.functional.cosine_similarity(each_ED[::2], each_ED[1::2]))
            if len(models) > 1:
                distances.add(_distances(*found_ED), torch.ones(len(found_ED[0])))
        against = None
        if len(models) > 1:
            means, errors = distances.result()
            against = EmbeddingDistance(
                cosine=means[0], cosine_standard_error=errors[0],
                relative_error=means[1], relative_error_standard_error=errors[1],
            )  # fmt: skip
        ranks = [_spearman(torch.cat(each), torch.cat(scores)) for each in cosines] if scores else []
        pairs = sum(map(len, scores))
        return EmbeddingResult(
            num_examples=2 * pairs if scores else batches.num_samples,
            width=width,
            pooling=pooling,
            spearman=ranks[0] if ranks else None,
            spearman_standard_error=_spearman_error(ranks[0], pairs) if ranks else None,
            spearman_original=ranks[1] if len(ranks) > 1 else None,
            num_pairs=pairs or None,
            data=batches.description,
            against=against,
        )


def _embeddings(model: Predictor, batch: Mapping[str, Tensor]) -> tuple[Tensor, str]:
    """Embeddings ``[E, D]`` in float32 on the CPU, and which output they are.

    Embeddings by name (CLIP) come first; then, of images, the pooled output that a backbone has, and of all else the
    mean of the last hidden states over the tokens that count.
    """
    pixels = batch.get("pixel_values")
    if pixels is not None:
        output = model.output(pixels)
    else:
        check_vocabulary(model.module, batch["input_ids"])
        output = model.output(**{name: value for name, value in batch.items() if name != "labels"})
    found, words = _pooled(output, batch, images=pixels is not None, name=model.name)
    found_ED = found.float().cpu()
    if not found_ED.isfinite().all():
        raise ModelError(NOT_FINITE)
    return found_ED, words


def _pooled(output: Any, batch: Mapping[str, Tensor], *, images: bool, name: str) -> tuple[Tensor, str]:
    if isinstance(output, Mapping):
        named = next((key for key, value in output.items() if key.endswith("_embeds") and value is not None), None)
        if named is not None:
            return output[named], f"`{named}`"
        pooled = output.get("pooler_output")
        if images and isinstance(pooled, Tensor):
            return pooled.flatten(1), "the pooled output"
        output = output.get("last_hidden_state")
    if not isinstance(output, Tensor) or output.dim() not in (2, 3, 4):
        raise ModelError(f"`{name}` returns no hidden states to make embeddings of; evaluate it in a loop of your own")
    if output.dim() == 2:
        return output, "the output"
    if output.dim() == 4:
        return output.mean((2, 3)), "the mean over places"
    mask_ET = batch.get("attention_mask")
    if mask_ET is None:
        return output.mean(1), "the mean over tokens"
    weights_ET1 = mask_ET.to(output.device, output.dtype)[:, :, None]
    return (output * weights_ET1).sum(1) / weights_ET1.sum(1), "the mean over tokens"


def _distances(found_ED: Tensor, original_ED: Tensor) -> Tensor:
    """Cosine and relative error, ``[E, 2]``."""
    if found_ED.shape != original_ED.shape:
        raise ModelError(
            f"got embeddings of {found_ED.shape[1]} numbers, the original has {original_ED.shape[1]}; "
            "compare a model with the one it was made of"
        )
    first, second = found_ED.double(), original_ED.double()
    error = (first - second).norm(dim=1) / second.norm(dim=1)
    return torch.stack([nn.functional.cosine_similarity(first, second), error], dim=1)


def _spearman(values_P: Tensor, scores_P: Tensor) -> float:
    first, second = _ranks(values_P), _ranks(scores_P)
    first, second = first - first.mean(), second - second.mean()
    size = first.norm() * second.norm()
    return float(first @ second / size) if size > 0 else 0.0


def _ranks(values_P: Tensor) -> Tensor:
    """Ranks in float64; equal values share the mean of theirs."""
    _, places, counts = torch.unique(values_P.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts - 1) / 2)[places]
    return ranks


def _spearman_error(value: float, count: int) -> float | None:
    return (1 - value**2) * math.sqrt((1 + value**2 / 2) / (count - 3)) if count > 3 else None
