"""Loss of encoder-decoders on targets, given their sources."""

from __future__ import annotations

from torch import Tensor

from fips.calibration.inputs import decoder_inputs
from fips.data import Batches
from fips.errors import ModelError
from fips.evaluation.predictor import Predictor
from fips.evaluation.registry import register
from fips.evaluation.results import TargetResult
from fips.evaluation.tokens import TokenEvaluator, TokenScores

__all__ = ["TargetEvaluator"]


@register
class TargetEvaluator(TokenEvaluator):
    """Pairs of texts: the second is predicted token by token, with the right ones before it and the first."""

    task = "seq2seq-lm"

    def inputs(self, model: Predictor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        shift = decoder_inputs(getattr(model.module, "model_behind", model.module))
        if shift is None:
            raise ModelError(f"`{model.name}` makes no decoder inputs of labels; evaluate it in a loop of your own")
        return {**super().inputs(model, batch), "decoder_input_ids": shift(batch["labels"].to(model.device))}

    def result(self, scores: TokenScores, batches: Batches) -> TargetResult:
        return TargetResult(
            perplexity=scores.perplexity,
            perplexity_standard_error=scores.perplexity_standard_error,
            loss=scores.loss,
            num_tokens=scores.num_tokens,
            num_pairs=batches.num_samples,
            data=batches.description,
            against=scores.against,
        )
