"""What methods share that make every matrix by itself, from second moments of what its layer reads or from nothing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fips.calibration.moments import LayerMoments
from fips.config import InputsConfig
from fips.formats.patterns import BITMASK
from fips.formats.values import FLOAT
from fips.layers.linear import FactoredLinear
from fips.methods.registry import Method
from fips.methods.sweep import PackedLayer, solve_blocks
from fips.methods.workbench import CompressedGroup, Workbench, dense_matrix
from fips.models import Site
from fips.models.sublayers import Sublayer
from fips.plan.footprint import LayerStorage
from fips.plan.groups import GroupPlan
from fips.plan.plan import CompressionPlan
from fips.plan.planner import C

__all__ = ["MatrixMethod", "StoredMatrix"]


class StoredMatrix(NamedTuple):
    """A matrix as it will be stored, laid out (O, I) as linear layers have it."""

    entries_OI: Tensor
    """Numbers, or integers (int8) where there are ``steps_O``."""
    mask_OI: Tensor
    """Its kept entries."""
    fmt: str = BITMASK
    values: str = FLOAT
    steps_O: Tensor | None = None
    """What the integers of every row are multiplied by; None: numbers, which are rounded if ``values`` are integers."""
    group_scales: Tensor | None = None
    """A byte for every group of a row, where ``values`` have them."""


class MatrixMethod(Method[C]):
    """Makes matrix by matrix, without a basis."""

    by_block = True

    @property
    def moment_memory(self) -> int:
        return int(self.config.metric.memory) if isinstance(self.config, InputsConfig) else 0

    @abstractmethod
    def store(self, weight_OI: Tensor, moment_II: Tensor | None, plan: GroupPlan) -> StoredMatrix:
        """What becomes of a matrix, given E[x x^T] of its inputs, if needed, and the plan of its group."""

    def compress(self, bench: Workbench, plan: CompressionPlan) -> list[CompressedGroup]:
        def solve(
            group: GroupPlan, sublayer: Sublayer, moments: Mapping[str, LayerMoments]
        ) -> Mapping[str, PackedLayer]:
            return {site.name: self._solve(bench, group, site, moments.get(site.name)) for site in sublayer.sites}

        return solve_blocks(bench, plan, solve, memory=self.moment_memory)

    def _solve(self, bench: Workbench, plan: GroupPlan, site: Site, moments: LayerMoments | None) -> PackedLayer:
        weight_OI = site.role.to_linear(dense_matrix(bench.model, site).float())
        moment_II = None if moments is None else moments.about_zero()
        if site.multiplied_by is None:  # an embedding by itself: no column of it makes up for another
            moment_II = torch.eye(weight_OI.shape[1], device=weight_OI.device)
        found = self.store(weight_OI, moment_II, plan)
        layer = _packed(found, site, plan.dtype)
        layer.bias, layer.conv1d = bench.bias(site), site.conv1d
        return PackedLayer(layer, LayerStorage(int(found.mask_OI.sum()), found.fmt, found.values, shared=False))


def _packed(found: StoredMatrix, site: Site, dtype: torch.dtype) -> FactoredLinear:
    entries, mask = site.role.to_factor(found.entries_OI), site.role.to_factor(found.mask_OI)
    if found.steps_O is not None:
        return FactoredLinear.from_integers(
            None, entries, mask, found.steps_O, role=site.role, fmt=found.fmt, values=found.values,
            group_scales=found.group_scales,
        )  # fmt: skip
    return FactoredLinear.from_factor(
        None, entries, mask, role=site.role, fmt=found.fmt, dtype=dtype, values=found.values
    )
