"""Quality of a model on ``Batches``, and how far its predictions are from those of the original."""

from fips.evaluation.divergence import Divergence, EmbeddingDistance
from fips.evaluation.predictor import require_comparable
from fips.evaluation.quality import check_evaluation, evaluate
from fips.evaluation.results import (
    EmbeddingResult,
    EvaluationResult,
    ImageResult,
    LabelResult,
    MaskedResult,
    Metric,
    TargetResult,
    TextResult,
)

__all__ = [
    "Divergence",
    "EmbeddingDistance",
    "EmbeddingResult",
    "EvaluationResult",
    "ImageResult",
    "LabelResult",
    "MaskedResult",
    "Metric",
    "TargetResult",
    "TextResult",
    "check_evaluation",
    "evaluate",
    "require_comparable",
]
