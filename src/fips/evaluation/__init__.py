"""Quality of a model on ``Batches``, and how far its predictions are from those of the original."""

from fips.evaluation.divergence import Divergence
from fips.evaluation.quality import evaluate
from fips.evaluation.results import EvaluationResult, ImageResult, Metric, TextResult

__all__ = ["Divergence", "EvaluationResult", "ImageResult", "Metric", "TextResult", "evaluate"]
