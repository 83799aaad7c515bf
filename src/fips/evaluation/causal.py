"""Perplexity and bits per byte of language models that predict every token from those before it."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fips.data import IGNORED_LABEL, Batches
from fips.errors import DataError, ModelError
from fips.evaluation.predictor import Predictor, vocabulary_size
from fips.evaluation.registry import register
from fips.evaluation.results import TextResult
from fips.evaluation.tokens import TokenEvaluator, TokenScores

__all__ = ["CausalEvaluator"]


@register
class CausalEvaluator(TokenEvaluator):
    """Windows of text, every token of which is predicted from those before it in the window."""

    task = "causal-lm"

    def check(self, model: nn.Module, batches: Batches, *, compared: bool) -> None:
        if not batches.num_bytes:
            raise DataError(
                "these batches hold no scored text, which perplexity needs; load them with `purpose='evaluation'`"
            )

    def try_model(self, model: Predictor, batch: dict[str, Tensor]) -> None:
        """A model that sees the tokens that follow does not predict them.

        The last of a few tokens is changed: what was predicted at those before it must stay.
        """
        known = int(batch["attention_mask"][0].sum()) if "attention_mask" in batch else batch["input_ids"].shape[1]
        length = min(8, known)
        if length < 2:
            return
        ids_ET = batch["input_ids"][:1, :length]
        other_ET = ids_ET.clone()
        other_ET[0, -1] = 0 if ids_ET[0, -1] != 0 else 1
        first, second = model.logits(input_ids=ids_ET), model.logits(input_ids=other_ET)
        if first.dim() != 3 or first.shape[1] != length or first.shape[2] < (vocabulary_size(model.module) or 0):
            raise ModelError(
                f"`{model.name}` returns logits of shape {tuple(first.shape)} for {length} tokens, not one prediction "
                "of a token for each; perplexity is for language models"
            )
        change, size = ((first - second)[:, :-1].abs().max(), first[:, :-1].abs().max())
        if bool(change > 1e-3 * size):
            raise ModelError(
                f"`{model.name}` sees the tokens that follow, so it does not predict them and perplexity means "
                "nothing; give a causal language model, or load the data for this one with `fips.load_data`"
            )

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)

    def result(self, scores: TokenScores, batches: Batches) -> TextResult:
        num_bytes, length = batches.num_bytes or 0, int(batches.description["sequence_length"])
        return TextResult(
            perplexity=scores.perplexity,
            perplexity_standard_error=scores.perplexity_standard_error,
            bits_per_byte=scores.loss * scores.num_tokens / math.log(2) / num_bytes,
            num_tokens=scores.num_tokens,
            num_bytes=num_bytes,
            sequence_length=length,
            stride=length - 1,
            data=batches.description,
            against=scores.against,
        )
