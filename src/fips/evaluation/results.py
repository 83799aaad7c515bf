"""What an evaluation found: one class for every kind of answer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

from fips.evaluation.divergence import Divergence, EmbeddingDistance
from fips.models.tasks import TaskName
from fips.record import Score, in_html, in_lines

__all__ = [
    "EmbeddingResult", "EvaluationResult", "ImageResult", "LabelResult", "MaskedResult", "Metric", "TargetResult",
    "TextResult",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """The one number of an evaluation that a table shows."""

    name: str
    value: float
    higher_is_better: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult(ABC):
    """What all results have."""

    data: dict[str, Any]
    """``Batches.description``."""
    task: TaskName
    against: Divergence | EmbeddingDistance | None = None

    @property
    @abstractmethod
    def headline(self) -> Metric: ...

    @property
    @abstractmethod
    def scored_on(self) -> str:
        """How many examples, and how they were read, in words."""

    @abstractmethod
    def scores(self) -> list[Score]:
        """The measures in words, those of the original beside them where it was there.

        Those of the original follow from the mean difference on the same examples.
        """

    def rows(self) -> list[tuple[str, str]]:
        """What ``summary`` shows: names and values."""
        return [*((score.name, score.line()) for score in self.scores()), ("scored on", self.scored_on)]

    def summary(self) -> str:
        """What was found, in a few lines for people."""
        return in_lines(self.rows())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython prints."""
        printer.text(self.summary())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return in_html(self.rows())

    def to_dict(self) -> dict[str, Any]:
        """All fields, the headline and the same in words, ready for JSON."""
        words = {"scored_on": self.scored_on, "scores": [asdict(score) for score in self.scores()]}
        return {**asdict(self), "headline": asdict(self.headline), **words}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageResult(EvaluationResult):
    r"""Share of images whose label is the highest logit, or among the five highest.

    ``top1_standard_error`` is :math:`100 \sqrt{p (1 - p) / n}` percentage points for a share p of n images.
    """

    top1_percent: float
    top5_percent: float
    top1_standard_error: float
    num_images: int
    against: Divergence | None = None
    """How far the predictions are from the original's; ``change`` is in percentage points of top-1."""
    task: TaskName = "image-classification"

    @property
    def headline(self) -> Metric:
        return Metric(name="top1_percent", value=self.top1_percent, higher_is_better=True)

    @property
    def scored_on(self) -> str:
        return f"{self.num_images:,} images"

    def scores(self) -> list[Score]:
        top5 = Score(name="top-5", before=None, after=f"{self.top5_percent:.2f} %")
        return [
            _share("top-1", self.top1_percent, self.against),
            top5,
            *_divergence(self.against, "image", score="top-1"),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelResult(EvaluationResult):
    """Share of texts, or of words of texts, whose label is the highest logit.

    The standard error is that of ``RatioMean``, a text being a draw.
    """

    accuracy_percent: float
    accuracy_standard_error: float | None
    num_texts: int
    num_labels: int
    """Labels that were scored: one per text, or one per labelled word."""
    against: Divergence | None = None
    """How far the predictions are from the original's; ``change`` is in percentage points of accuracy."""
    task: TaskName = "text-classification"

    @property
    def headline(self) -> Metric:
        return Metric(name="accuracy_percent", value=self.accuracy_percent, higher_is_better=True)

    @property
    def scored_on(self) -> str:
        words = "" if self.task == "text-classification" else f"{self.num_labels:,} labelled words of "
        return f"{words}{self.num_texts:,} texts"

    def scores(self) -> list[Score]:
        unit = "text" if self.task == "text-classification" else "word"
        differs = _divergence(self.against, unit, score="accuracy")
        return [_share("accuracy", self.accuracy_percent, self.against), *differs]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextResult(EvaluationResult):
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
    """Tokens of a window, the first of which is context."""
    stride: int
    """Tokens from one window to the next: each token is scored once."""
    against: Divergence | None = None
    """How far the predictions are from the original's; ``change`` is in nats per token."""
    task: TaskName = "causal-lm"

    @property
    def headline(self) -> Metric:
        return Metric(name="perplexity", value=self.perplexity, higher_is_better=False)

    @property
    def scored_on(self) -> str:
        return f"{self.num_tokens:,} tokens in windows of {self.sequence_length:,}, stride {self.stride:,}"

    def scores(self) -> list[Score]:
        before = None
        if self.against is not None:  # the change is in nats per token
            change = self.against.change * self.num_tokens / self.num_bytes / math.log(2)
            before = f"{self.bits_per_byte - change:.4f}"
        return [
            _perplexity("perplexity", self.perplexity, self.against),
            Score(name="bits per byte", before=before, after=f"{self.bits_per_byte:.4f}"),
            *_divergence(self.against, "token"),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedResult(EvaluationResult):
    r"""How well a masked language model fills in what is hidden from it.

    .. math:: \text{pseudo-perplexity} = \exp\Bigl(\tfrac{1}{n} \sum_{i \in M} -\ln p(t_i \mid t_{\notin M})\Bigr)

    M are the n tokens that are replaced by the mask token, a share of every window chosen by the seed, all at once; to
    hide one token at a time (Salazar et al., Masked Language Model Scoring, 2020) takes a pass for every token and
    gives lower numbers. Compare only where window, share and seed are the same.
    """

    pseudo_perplexity: float
    pseudo_perplexity_standard_error: float | None
    """With a window as one draw; None for a single one."""
    accuracy_percent: float
    """How often the hidden token is the likeliest."""
    num_tokens: int
    """Hidden tokens (n)."""
    masked_percent: float
    """Of the tokens that are no special ones."""
    sequence_length: int
    against: Divergence | None = None
    """How far the predictions are from the original's; ``change`` is in nats per hidden token."""
    task: TaskName = "masked-lm"

    @property
    def headline(self) -> Metric:
        return Metric(name="pseudo_perplexity", value=self.pseudo_perplexity, higher_is_better=False)

    @property
    def scored_on(self) -> str:
        share = f"{self.masked_percent:.3g} % hidden at a time"
        return f"{self.num_tokens:,} hidden tokens, {share}, in windows of at most {self.sequence_length:,}"

    def scores(self) -> list[Score]:
        right = Score(name="hidden tokens found", before=None, after=f"{self.accuracy_percent:.2f} %")
        first = _perplexity("pseudo-perplexity", self.pseudo_perplexity, self.against)
        return [first, right, *_divergence(self.against, "hidden token")]


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetResult(EvaluationResult):
    """How well an encoder-decoder predicts targets, token by token, given their sources: exp of the mean loss."""

    perplexity: float
    perplexity_standard_error: float | None
    """With a pair as one draw; None for a single one."""
    loss: float
    """Nats per token of the targets."""
    num_tokens: int
    """Tokens of the targets, with the token that ends each."""
    num_pairs: int
    against: Divergence | None = None
    """How far the predictions are from the original's; ``change`` is in nats per token."""
    task: TaskName = "seq2seq-lm"

    @property
    def headline(self) -> Metric:
        return Metric(name="perplexity", value=self.perplexity, higher_is_better=False)

    @property
    def scored_on(self) -> str:
        return f"{self.num_tokens:,} tokens of {self.num_pairs:,} targets"

    def scores(self) -> list[Score]:
        name = "perplexity of the targets"
        return [_perplexity(name, self.perplexity, self.against), *_divergence(self.against, "token")]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingResult(EvaluationResult):
    r"""What embeddings of texts or images are worth: how they stand to the original's, and to people's scores.

    ``spearman`` is the rank correlation of the cosines of pairs of texts with the scores of the data, where it has
    some; its standard error is :math:`(1 - \rho^2) \sqrt{(1 + \rho^2 / 2) / (n - 3)}` for n pairs (Bonett and Wright,
    2000).
    """

    num_examples: int
    width: int
    """Numbers of an embedding."""
    pooling: str
    """Which of the model's outputs the embedding is."""
    spearman: float | None = None
    spearman_standard_error: float | None = None
    spearman_original: float | None = None
    num_pairs: int | None = None
    against: EmbeddingDistance | None = None
    task: TaskName = "embedding"

    @property
    def headline(self) -> Metric:
        if self.spearman is not None:
            return Metric(name="spearman", value=self.spearman, higher_is_better=True)
        assert self.against is not None  # one of the two is there
        return Metric(name="cosine", value=self.against.cosine, higher_is_better=True)

    @property
    def scored_on(self) -> str:
        return f"{self.num_examples:,} embeddings of {self.width:,} numbers, {self.pooling}"

    def scores(self) -> list[Score]:
        found = []
        if self.spearman is not None:
            before = None if self.spearman_original is None else f"{self.spearman_original:.4f}"
            found.append(Score(name="Spearman of pairs", before=before, after=f"{self.spearman:.4f}"))
        if self.against is not None:
            near, far = self.against.cosine, self.against.relative_error
            plus, minus = self.against.relative_error_standard_error, self.against.cosine_standard_error
            found += [
                Score(name="cosine to the original", before=None, after=f"{near:.6f}{_give_or_take(minus)}"),
                Score(name="relative error", before=None, after=f"{far:.4g}{_give_or_take(plus)}"),
            ]
        return found


def _share(name: str, percent: float, against: Divergence | None) -> Score:
    before = None if against is None else f"{percent - against.change:.2f} %"
    return Score(name=name, before=before, after=f"{percent:.2f} %")


def _perplexity(name: str, value: float, against: Divergence | None) -> Score:
    before = None if against is None else f"{value * math.exp(-against.change):.4g}"
    return Score(name=name, before=before, after=f"{value:.4g}")


def _divergence(against: Divergence | None, unit: str, *, score: str = "") -> list[Score]:
    """What stands between a model and the original; ``score`` is the one in percent that changed, else the loss."""
    if against is None:
        return []
    name, what, digits = (score, "percentage points", ".2f") if score else ("the loss", f"nats per {unit}", ".3g")
    moved = f"{against.change:+{digits}}{_give_or_take(against.change_standard_error)} {what}"
    kl = f"{against.kl:.3g}{_give_or_take(against.kl_standard_error)} nats per {unit}"
    same = f"{against.agreement_percent:.2f}{_give_or_take(against.agreement_standard_error)} % of {unit}s"
    return [
        Score(name="KL to the original", before=None, after=kl),
        Score(name="same first choice", before=None, after=same),
        Score(name=f"change of {name}", before=None, after=moved),
    ]


def _give_or_take(error: float | None) -> str:
    return f" ± {error:.1g}" if error else ""  # all draws being alike tells nothing of the error
