"""Pruning without sharing: by magnitude, Wanda, and optimal brain surgeon with error feedback (SparseGPT).

The same density in every layer, as much as the bytes allow; kept entries are floating or integers of some bits.

References: Han et al., arXiv 1506.02626; Sun et al., arXiv 2306.11695; Frantar & Alistarh, arXiv 2301.00774.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

import torch
from pydantic import field_validator
from torch import Tensor

from fips.config import CompressionConfig, InputsConfig
from fips.formats.masks import top_mask
from fips.formats.values import FLOAT, values_named
from fips.methods.layerwise import MatrixMethod, StoredMatrix
from fips.methods.registry import register
from fips.methods.workbench import Needs
from fips.models import Site
from fips.plan.groups import GroupPlan
from fips.plan.planner import C
from fips.solve.feedback import Rounding, inverse_root, with_feedback
from fips.solve.moments import usable_moment

__all__ = ["Magnitude", "SparseGpt", "Wanda", "magnitude", "sparsegpt", "wanda"]

EPS = 1e-6
"""A density that is a fraction of whole numbers may come out a little below it."""


class PruningConfig(CompressionConfig):
    """What all pruning methods share."""

    values: str = FLOAT
    """Type of the kept entries: floating, or integers of 2 to 8 bits with a scale per row (`int4`)."""

    @field_validator("values")
    @classmethod
    def _known_values(cls, values: str) -> str:
        if values_named(values).memory:
            raise ValueError(f"`{values}` leaves no entry out; pruned layers take floats, integers or levels (`nl4`)")
        return values

    @property
    def has_integers(self) -> bool:
        return values_named(self.values).scaled


class MagnitudeConfig(PruningConfig):
    """Nothing but the weights counts."""

    method: Literal["magnitude"] = "magnitude"


class WandaConfig(PruningConfig, InputsConfig):
    """Weights count by the inputs they meet."""

    method: Literal["wanda"] = "wanda"


class SparseGptConfig(PruningConfig, InputsConfig):
    """Weights count by what the others cannot make up for."""

    method: Literal["sparsegpt"] = "sparsegpt"


class _Pruning(MatrixMethod[C]):
    config: PruningConfig  # type: ignore[assignment]

    @property
    def values(self) -> str:
        return self.config.values

    def store(self, weight_OI: Tensor, moment_II: Tensor | None, plan: GroupPlan) -> StoredMatrix:
        density = plan.kept / (plan.group.width * plan.group.hidden)
        return StoredMatrix(*self.prune(weight_OI, moment_II, density), values=self.values)

    @abstractmethod
    def prune(self, weight_OI: Tensor, moment_II: Tensor | None, density: float) -> tuple[Tensor, Tensor]:
        """The pruned weight and its support."""


@register
class Magnitude(_Pruning[MagnitudeConfig]):
    settings = MagnitudeConfig

    def prune(self, weight_OI: Tensor, moment_II: Tensor | None, density: float) -> tuple[Tensor, Tensor]:
        return magnitude(weight_OI, density=density)


@register
class Wanda(_Pruning[WandaConfig]):
    settings = WandaConfig
    needs = Needs.INPUTS

    def least_density(self, site: Site) -> float:
        """It keeps a whole number of entries in every row."""
        return math.ceil(site.inputs / site.outputs) / site.inputs

    def prune(self, weight_OI: Tensor, moment_II: Tensor | None, density: float) -> tuple[Tensor, Tensor]:
        assert moment_II is not None
        return wanda(weight_OI, moment_II, density=density)


@register
class SparseGpt(_Pruning[SparseGptConfig]):
    settings = SparseGptConfig
    needs = Needs.INPUTS

    def prune(self, weight_OI: Tensor, moment_II: Tensor | None, density: float) -> tuple[Tensor, Tensor]:
        assert moment_II is not None
        return sparsegpt(weight_OI, moment_II, density=density)


def magnitude(weight_OI: Tensor, *, density: float) -> tuple[Tensor, Tensor]:
    """Keep the largest absolute values of the matrix."""
    mask_OI = top_mask(weight_OI.abs(), count=int(density * weight_OI.numel() + EPS))
    return weight_OI * mask_OI, mask_OI


def wanda(weight_OI: Tensor, moment_II: Tensor, *, density: float) -> tuple[Tensor, Tensor]:
    r"""Keep the largest :math:`|W_{oi}| \sqrt{E[x_i^2]}` of every row, values unchanged."""
    scores_OI = weight_OI.abs() * usable_moment(moment_II).diagonal().clamp_min(0).sqrt()
    mask_OI = _top_of_rows(scores_OI, int(density * weight_OI.shape[1] + EPS))
    return weight_OI * mask_OI, mask_OI


def sparsegpt(
    weight_OI: Tensor, moment_II: Tensor, *, density: float, block: int = 128, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    r"""Remove weights column by column, each with the smallest :math:`w^2 / [H^{-1}]_{ii}` of its block of columns,
    and let the columns that follow make up for it.

    Algorithm 1 of the paper, mask blocks as wide as update blocks.
    """

    def choose(costs_JO: Tensor, _: int) -> Tensor:
        return top_mask(costs_JO, count=int(density * costs_JO.numel() + 0.5))

    upper_II = inverse_root(usable_moment(moment_II), damping)
    found_OI, mask_OI = with_feedback(weight_OI, upper_II, Rounding(), choose, run_length=block)
    assert mask_OI is not None
    return found_OI.contiguous(), mask_OI.contiguous()


def _top_of_rows(scores_OI: Tensor, count: int) -> Tensor:
    chosen = scores_OI.topk(count, dim=1).indices
    return torch.zeros_like(scores_OI, dtype=torch.bool).scatter_(1, chosen, True)
