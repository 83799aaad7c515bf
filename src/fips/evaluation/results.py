"""What an evaluation found: accuracy of an image classifier, perplexity of a language model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fips.evaluation.divergence import Divergence

__all__ = ["EvaluationResult", "ImageResult", "Metric", "TextResult"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """The one number of an evaluation that a table shows."""

    name: str
    value: float
    higher_is_better: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageResult:
    r"""Share of images whose label is the highest logit, or among the five highest.

    ``top1_standard_error`` is :math:`100 \sqrt{p (1 - p) / n}` percentage points for a share p of n images.
    """

    top1_percent: float
    top5_percent: float
    top1_standard_error: float
    num_images: int
    data: dict[str, Any]
    """``Batches.description``."""
    against: Divergence | None = None
    """How far the predictions are from the original's; ``change`` is in percentage points of top-1."""
    kind: Literal["image"] = "image"

    @property
    def headline(self) -> Metric:
        return Metric(name="top1_percent", value=self.top1_percent, higher_is_better=True)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the headline, ready for JSON."""
        return {**asdict(self), "headline": asdict(self.headline)}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextResult:
    r"""How well a language model predicts a text.

    .. math:: \text{perplexity} = \exp\Bigl(\tfrac{1}{n} \sum_i -\ln p(t_i \mid t_{<i})\Bigr), \qquad
              \text{bits per byte} = \frac{\sum_i -\log_2 p(t_i \mid t_{<i})}{\text{UTF-8 bytes of } t_1 \dots t_n}

    Perplexity compares models with the same tokenizer, bits per byte any two. Tokens are conditioned on their
    window only, so both numbers fall with ``sequence_length``.
    """

    perplexity: float
    perplexity_standard_error: float | None
    """With a window as one draw; None for a single one."""
    bits_per_byte: float
    num_tokens: int
    """Scored tokens (n)."""
    num_bytes: int
    sequence_length: int
    data: dict[str, Any]
    """``Batches.description``."""
    against: Divergence | None = None
    """How far the predictions are from the original's; ``change`` is in nats per token."""
    kind: Literal["text"] = "text"

    @property
    def headline(self) -> Metric:
        return Metric(name="perplexity", value=self.perplexity, higher_is_better=False)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the headline, ready for JSON."""
        return {**asdict(self), "headline": asdict(self.headline)}


EvaluationResult = ImageResult | TextResult
