"""What methods share that make every group by itself, from second moments of what its layers read or from nothing."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fips.calibration.moments import LayerMoments, moment_bytes
from fips.config import InputsConfig
from fips.formats.patterns import BITMASK
from fips.formats.values import FLOAT
from fips.layers.linear import FactoredLinear
from fips.methods.registry import Method
from fips.methods.workbench import CompressedGroup, Needs, Workbench, dense_matrix
from fips.models import Site
from fips.plan.footprint import LayerStorage
from fips.plan.groups import GroupPlan, solved_plan
from fips.plan.plan import CompressionPlan
from fips.plan.planner import C

__all__ = ["GroupwiseMethod", "MatrixMethod", "StoredMatrix"]


class GroupwiseMethod(Method[C]):
    """Makes group by group, each from the original model."""

    @property
    def moment_memory(self) -> int:
        return int(self.config.metric.memory) if isinstance(self.config, InputsConfig) else 0

    @abstractmethod
    def compress_group(self, bench: Workbench, plan: GroupPlan, moments: Mapping[str, Tensor]) -> CompressedGroup:
        """The layers of a group, without their biases.

        ``moments`` are E[x x^T] of what they read, by name; empty if not needed.
        """

    def compress(self, bench: Workbench, plan: CompressionPlan) -> list[CompressedGroup]:
        sites = [site for group in plan.groups for site in group.group.sites]
        if Needs.INPUTS not in self.needs:
            moments: Mapping[str, Tensor] | None = {}
        elif moment_bytes(sites, gradients=False) <= self.moment_memory:
            moments = _second_moments(bench, "all", sites)
        else:
            moments = None
        return [self._compress_group(bench, group, moments) for group in plan.groups]

    def _compress_group(
        self, bench: Workbench, plan: GroupPlan, moments: Mapping[str, Tensor] | None
    ) -> CompressedGroup:
        if moments is None:
            moments = _second_moments(bench, plan.group.name, plan.group.sites)
        started = time.perf_counter()
        with torch.autocast(bench.device.type, enabled=False):
            found = self.compress_group(bench, plan, moments)
        for site in plan.group.sites:
            found.layers[site.name].bias = bench.bias(site)
            found.layers[site.name].conv1d = site.conv1d
        found.start = found.final = bench.final_errors(plan.group, found.layers)
        found.seconds = time.perf_counter() - started
        return found


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


class MatrixMethod(GroupwiseMethod[C]):
    """Makes matrix by matrix, without a basis."""

    @abstractmethod
    def store(self, weight_OI: Tensor, moment_II: Tensor | None, plan: GroupPlan) -> StoredMatrix:
        """What becomes of a matrix, given E[x x^T] of its inputs, if needed, and the plan of its group."""

    def compress_group(self, bench: Workbench, plan: GroupPlan, moments: Mapping[str, Tensor]) -> CompressedGroup:
        layers: dict[str, FactoredLinear] = {}
        storages = []
        for site in plan.group.sites:
            weight_OI = site.role.to_linear(dense_matrix(bench.model, site).float())
            found = self.store(weight_OI, moments.get(site.name), plan)
            storages.append(LayerStorage(int(found.mask_OI.sum()), found.fmt, found.values, shared=False))
            layers[site.name] = _packed(found, site, plan.dtype)
        return CompressedGroup(solved_plan(plan, rank=0, layers=storages), {}, layers)


def _second_moments(bench: Workbench, name: str, sites: Sequence[Site]) -> dict[str, Tensor]:
    """About zero, all tokens alike, as these methods define it."""
    moments = bench.moments(name, sites)
    return {site.name: _about_zero(moments[site.name]) for site in sites}


def _about_zero(moments: LayerMoments) -> Tensor:
    if not moments.centered:
        return moments.inputs_II
    return moments.inputs_II + torch.outer(moments.mean_I, moments.mean_I)


def _packed(found: StoredMatrix, site: Site, dtype: torch.dtype) -> FactoredLinear:
    entries, mask = site.role.to_factor(found.entries_OI), site.role.to_factor(found.mask_OI)
    if found.steps_O is not None:
        return FactoredLinear.from_integers(
            None, entries, mask, found.steps_O, role=site.role, fmt=found.fmt, values=found.values
        )
    return FactoredLinear.from_factor(
        None, entries, mask, role=site.role, fmt=found.fmt, dtype=dtype, values=found.values
    )
