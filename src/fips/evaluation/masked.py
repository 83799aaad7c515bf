"""Pseudo-perplexity of masked language models: how well they fill in hidden tokens."""

from __future__ import annotations

from fips.data import Batches
from fips.evaluation.registry import register
from fips.evaluation.results import MaskedResult
from fips.evaluation.tokens import TokenEvaluator, TokenScores

__all__ = ["MaskedEvaluator"]


@register
class MaskedEvaluator(TokenEvaluator):
    """Windows of text in which some tokens are replaced by the mask token, and asked for."""

    task = "masked-lm"

    def result(self, scores: TokenScores, batches: Batches) -> MaskedResult:
        return MaskedResult(
            pseudo_perplexity=scores.perplexity,
            pseudo_perplexity_standard_error=scores.perplexity_standard_error,
            accuracy_percent=scores.accuracy_percent,
            num_tokens=scores.num_tokens,
            masked_percent=100 * scores.num_tokens / batches.description["num_own_tokens"],
            sequence_length=int(batches.description["sequence_length"]),
            data=batches.description,
            against=scores.against,
        )
