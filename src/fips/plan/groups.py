"""One group of layers and what it will become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fips.config import CompressionConfig
from fips.models import LayerGroup
from fips.plan.footprint import Footprint, LayerStorage, factored_footprint, itemsize
from fips.plan.least import BYTES_PER_BIT

__all__ = ["GroupPlan", "byte_target", "solved_plan", "storage_dtype"]


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One group and the factorization it will get."""

    group: LayerGroup
    rank: int
    """Vectors of the shared basis; 0 where the group shares none."""
    kept: int
    """Kept factor entries of the whole group, exact."""
    fmt: str
    """Packed formats of its factors, see ``fips.formats.patterns``."""
    dtype: torch.dtype
    """Storage type of basis, floating values and scales."""
    dense: Footprint
    factored: Footprint
    values: str = "float"
    """Types of its values, see ``fips.formats.values``."""

    @property
    def density(self) -> float:
        """Share of the entries of the factors that is kept."""
        return self.kept / ((self.rank or self.group.width) * self.group.hidden)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.group.name,
            "blocks": list(self.group.blocks),
            "width": self.group.width,
            "hidden": self.group.hidden,
            "rank": self.rank,
            "density": self.density,
            "kept": self.kept,
            "format": self.fmt,
            "values": self.values,
            "dtype": str(self.dtype).removeprefix("torch."),
            "dense": self.dense.to_dict(),
            "factored": self.factored.to_dict(),
        }


def storage_dtype(config: CompressionConfig, weight_dtype: torch.dtype) -> torch.dtype:
    """Type of bases, floating values and scales."""
    if config.factor_dtype:
        found: torch.dtype = getattr(torch, config.factor_dtype)
        return found
    return torch.bfloat16 if config.bits is not None and itemsize(weight_dtype) > 2 else weight_dtype


def byte_target(group: LayerGroup, config: CompressionConfig) -> float:
    """Bytes that a group may take on average: ``bits`` for every weight."""
    assert config.bits is not None
    return config.bits * BYTES_PER_BIT * group.width * group.hidden


def solved_plan(plan: GroupPlan, *, rank: int, layers: Sequence[LayerStorage]) -> GroupPlan:
    """The plan of a group once its structure is known, exact to the byte."""
    formats, kinds = (sorted({getattr(layer, name) for layer in layers}) for name in ("fmt", "values"))
    return replace(
        plan,
        rank=rank,
        kept=sum(layer.kept for layer in layers),
        fmt=", ".join(formats),
        values=", ".join(kinds),
        factored=factored_footprint(plan.group, rank=rank, itemsize=itemsize(plan.dtype), layers=layers),
    )
