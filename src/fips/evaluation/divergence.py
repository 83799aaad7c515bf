"""How far the predictions of a model are from those of the original, with standard errors.

Shapes: P predictions (one per image, one per scored token), V outcomes, E examples (images, or windows of text).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fips.errors import ModelError

__all__ = ["Divergence", "EmbeddingDistance", "RatioMean", "differences", "divergence_of", "times"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    r"""Predictions q of a model beside p of the original, for the same n images or scored tokens.

    .. math:: \text{KL} = \frac{1}{n} \sum_{i=1}^{n} \sum_v p_{iv} \ln \frac{p_{iv}}{q_{iv}}

    Every standard error is that of ``RatioMean`` (None for one draw), an image or a window of text being a draw; those
    of ``change`` are of paired differences, which tells models apart whose own scores have far larger errors.
    """

    kl: float
    """Nats per image or token; 0 where the model predicts as the original does."""
    kl_standard_error: float | None
    agreement_percent: float
    """How often the most likely outcome is that of the original."""
    agreement_standard_error: float | None
    change: float
    """Model minus original: percentage points of top-1, or nats per token of the loss (the log of perplexity)."""
    change_standard_error: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingDistance:
    r"""Embeddings x of a model beside y of the original, of the same examples: means, with standard errors.

    .. math:: \text{cosine} = \frac{x \cdot y}{|x| |y|}, \qquad \text{relative error} = \frac{|x - y|}{|y|}
    """

    cosine: float
    cosine_standard_error: float | None
    relative_error: float
    relative_error_standard_error: float | None


class RatioMean:
    r"""Mean over predictions that come in draws of unequal size, such as the tokens of windows.

    With :math:`s_e` the sum over draw e and :math:`n_e` its predictions, :math:`r = \sum s_e / \sum n_e` and

    .. math:: \text{standard error}^2 = \frac{E}{E - 1} \cdot \frac{\sum_e (s_e - r n_e)^2}{(\sum_e n_e)^2}

    (Cochran, Sampling Techniques, 1977, section 6.3; infinite population). None for a single draw.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, sums_EM: Tensor, counts_E: Tensor) -> None:
        """Sums of M measures over the predictions of E draws, and how many predictions each has."""
        self._parts.append(torch.cat([counts_E[:, None].double(), sums_EM.double()], dim=1).cpu())

    @property
    def num_predictions(self) -> int:
        return int(sum(part[:, 0].sum() for part in self._parts))

    def result(self) -> tuple[list[float], list[float | None]]:
        """Means and standard errors of the M measures."""
        counts_E1, sums_EM = torch.cat(self._parts).split_with_sizes([1, self._parts[0].shape[1] - 1], dim=1)
        draws, total = len(counts_E1), counts_E1.sum()
        means_M = sums_EM.sum(0) / total
        squares_M = (sums_EM - means_M * counts_E1).square().sum(0)
        if draws == 1:
            return means_M.tolist(), [None] * len(means_M)
        return means_M.tolist(), ((draws / (draws - 1) * squares_M).sqrt() / total).tolist()


def differences(logits_PV: Tensor, reference_PV: Tensor) -> Tensor:
    """Per prediction the KL from the reference and whether the most likely outcome is the same, ``[P, 2]``.

    In float32, or in float64 if the logits are: the KL of models that hardly differ is smaller than float32 tells. What
    the reference rules out, by a logit of minus infinity, adds nothing.
    Raises ``ModelError`` where the two do not predict the same outcomes.
    """
    if logits_PV.shape != reference_PV.shape:
        raise ModelError(
            f"got predictions of {logits_PV.shape[-1]} outcomes, the original has {reference_PV.shape[-1]}; "
            "compare a model with the one it was made of"
        )
    dtype = torch.promote_types(logits_PV.dtype, torch.float32)
    log_q_PV, log_p_PV = (each.to(dtype).log_softmax(-1) for each in (logits_PV, reference_PV))
    terms_PV = torch.nn.functional.kl_div(log_q_PV, log_p_PV, log_target=True, reduction="none")
    kl_P = terms_PV.masked_fill(log_p_PV == -torch.inf, 0.0).sum(-1)
    same_P = logits_PV.argmax(-1) == reference_PV.argmax(-1)
    return torch.stack([kl_P, same_P.to(kl_P.dtype)], dim=-1)


def divergence_of(means: Sequence[float], errors: Sequence[float | None], *, unit: float) -> Divergence:
    """Of the means of change, KL and agreement and their standard errors; ``unit`` of a change."""
    return Divergence(
        change=unit * means[0],
        change_standard_error=times(unit, errors[0]),
        kl=means[1],
        kl_standard_error=errors[1],
        agreement_percent=100 * means[2],
        agreement_standard_error=times(100, errors[2]),
    )


def times(unit: float, error: float | None) -> float | None:
    return None if error is None else unit * error
