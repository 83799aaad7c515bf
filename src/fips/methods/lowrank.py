"""Low rank: plain SVD, SVD in the metric of the inputs (SVD-LLM), and one basis for several layers (Basis Sharing).

Bases and factors are dense. Matrices are (D, F), the residual stream on axis 0; bases (D, R), factors (R, F).

References: Eckart & Young (1936); Wang et al., arXiv 2403.07378; Wang et al., arXiv 2410.03765.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fips.calibration.moments import LayerMoments, moment_bytes
from fips.config import CompressionConfig, InputsConfig
from fips.errors import BudgetError
from fips.formats.patterns import FULL
from fips.layers.linear import FactoredLinear, SharedBasis
from fips.methods.keeping import is_kept, kept_group
from fips.methods.registry import Method, register
from fips.methods.workbench import CompressedGroup, Needs, Workbench, dense_matrix
from fips.models import LayerGroup, Site
from fips.plan.footprint import Footprint, itemsize
from fips.plan.groups import GroupPlan, byte_target
from fips.plan.least import BYTES_PER_BIT, EPS
from fips.plan.plan import CompressionPlan
from fips.plan.planner import C
from fips.solve.basis import normalize
from fips.solve.moments import usable_moment

__all__ = ["BasisSharing", "Svd", "SvdLlm", "shared_whitened_svd", "truncated_svd", "whitened_svd"]

SHARING_SPAN = 2
"""Consecutive layers that share a basis in Basis Sharing, as in its paper."""


class SvdConfig(CompressionConfig):
    """The rank follows from the size."""

    method: Literal["svd"] = "svd"


class SvdLlmConfig(InputsConfig):
    """The rank follows from the size."""

    method: Literal["svd-llm"] = "svd-llm"


class BasisSharingConfig(InputsConfig):
    """The rank follows from the size."""

    method: Literal["basis-sharing"] = "basis-sharing"


class _LowRank(Method[C]):
    @property
    def moment_memory(self) -> int:
        return int(self.config.metric.memory) if isinstance(self.config, InputsConfig) else 0

    def smallest_size(self, group: LayerGroup, dtype: torch.dtype) -> float:
        """One vector for every matrix."""
        unit = 1.0 if self.config.budget is not None else itemsize(dtype) / BYTES_PER_BIT
        return max(unit * (site.width + site.hidden) / (site.width * site.hidden) for site in group.sites)

    def teams(self, plan: GroupPlan) -> Iterator[list[Site]]:
        """Layers that share a basis."""
        yield from ([site] for site in plan.group.sites)

    def factorize(
        self, weights_DF: Sequence[Tensor], team: Sequence[Site], moments: Mapping[str, Tensor], rank: int
    ) -> tuple[Tensor, list[Tensor]]:
        """The basis of a team and its factors."""
        if team[0].role.reads_stream:
            moment_DD = torch.stack([moments[site.name] for site in team]).sum(0)
            return shared_whitened_svd(weights_DF, moment_DD, rank=rank)
        basis_DR, factor_RF = whitened_svd(weights_DF[0], moments[team[0].name], reads_stream=False, rank=rank)
        return basis_DR, [factor_RF]

    def compress(self, bench: Workbench, plan: CompressionPlan) -> list[CompressedGroup]:
        left = [group.group for group in plan.groups if not is_kept(bench, group)]
        moments: Mapping[str, LayerMoments] | None = None
        if Needs.INPUTS not in self.needs or not left:
            moments = {}
        elif moment_bytes([site for group in left for site in group.sites], gradients=False) <= self.moment_memory:
            moments = bench.input_moments("all", left)
        return [kept_group(bench, group, partial(self._make, bench, group, moments)) for group in plan.groups]

    def _make(self, bench: Workbench, group: GroupPlan, moments: Mapping[str, LayerMoments] | None) -> CompressedGroup:
        known = bench.input_moments(group.group.name, [group.group]) if moments is None else moments
        started = time.perf_counter()
        with torch.autocast(bench.device.type, enabled=False):
            about_zero = {site.name: known[site.name].about_zero() for site in group.group.sites if known}
            done = self.compress_group(bench, group, about_zero)
        for site in group.group.sites:
            done.layers[site.name].bias = bench.bias(site)
            done.layers[site.name].conv1d = site.conv1d
        done.start = done.final = bench.final_errors(group.group, done.layers)
        done.seconds = time.perf_counter() - started
        return done

    def compress_group(self, bench: Workbench, plan: GroupPlan, moments: Mapping[str, Tensor]) -> CompressedGroup:
        bases: dict[str, SharedBasis] = {}
        layers: dict[str, FactoredLinear] = {}
        footprint = Footprint(0, 0, 0, 0)
        rank = 0
        for index, team in enumerate(self.teams(plan)):
            hidden = sum(site.hidden for site in team)
            rank = self._rank(plan, hidden)
            weights_DF = [dense_matrix(bench.model, site).float() for site in team]
            basis_DR, factors_RF = self.factorize(weights_DF, team, moments, rank)
            basis = bases[f"{plan.group.name}_{index}"] = SharedBasis.of(basis_DR, plan.dtype)
            for site, factor_RF in zip(team, factors_RF, strict=True):
                mask_RF = torch.ones_like(factor_RF, dtype=torch.bool)
                layers[site.name] = FactoredLinear.from_factor(
                    basis, factor_RF, mask_RF, role=site.role, fmt=FULL, dtype=plan.dtype
                )
            footprint += _team_footprint(plan, rank, hidden, len(team))
        kept = sum(layer.kept for layer in layers.values())
        made = replace(plan, rank=rank, kept=kept, fmt=FULL, values="float", factored=footprint)
        return CompressedGroup(made, bases, layers)

    def _rank(self, plan: GroupPlan, hidden: int) -> int:
        width = plan.group.width
        if self.config.budget:
            allowed = self.config.budget * (width * hidden)
        else:
            share = hidden / plan.group.hidden
            allowed = byte_target(plan.group, self.config) * share / itemsize(plan.dtype)
        rank = int(allowed / (width + hidden) + EPS)
        if rank < 1:
            raise BudgetError(f"not one vector of {width} + {hidden} numbers fits; ask for more bytes")
        return rank


@register
class SvdLlm(_LowRank[SvdLlmConfig]):
    settings = SvdLlmConfig
    needs = Needs.INPUTS


@register
class BasisSharing(_LowRank[BasisSharingConfig]):
    settings = BasisSharingConfig
    needs = Needs.INPUTS

    def teams(self, plan: GroupPlan) -> Iterator[list[Site]]:
        """The same up layer of consecutive sublayers of one kind, MLPs or attention; down layers alone."""
        kinds: dict[str, list[Sequence[Site]]] = {sublayer.kind: [] for sublayer in plan.group.sublayers}
        for sublayer in plan.group.sublayers:
            kinds[sublayer.kind].append(sublayer.sites)
        for sublayers in kinds.values():
            yield from self._of_one_kind(sublayers)

    def _of_one_kind(self, sublayers: Sequence[Sequence[Site]]) -> Iterator[list[Site]]:
        for start in range(0, len(sublayers), SHARING_SPAN):
            members = sublayers[start : start + SHARING_SPAN]
            if len({len(sites) for sites in members}) > 1:  # some of their layers are left dense
                yield from ([site] for sites in members for site in sites)
                continue
            for place in zip(*members, strict=True):
                yield from [list(place)] if place[0].role.reads_stream else [[site] for site in place]


@register
class Svd(_LowRank[SvdConfig]):
    settings = SvdConfig

    def factorize(
        self, weights_DF: Sequence[Tensor], team: Sequence[Site], moments: Mapping[str, Tensor], rank: int
    ) -> tuple[Tensor, list[Tensor]]:
        basis_DR, factor_RF = truncated_svd(weights_DF[0], rank=rank)
        return basis_DR, [factor_RF]


def _team_footprint(plan: GroupPlan, rank: int, hidden: int, members: int) -> Footprint:
    entries = rank * (plan.group.width + hidden)
    macs = rank * (members * plan.group.width + hidden)
    return Footprint(entries, entries * itemsize(plan.dtype), 0, macs)


def truncated_svd(weight_DF: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of a rank in Frobenius norm."""
    u, s, vh = torch.linalg.svd(weight_DF.double(), full_matrices=False)
    return u[:, :rank].float(), (s[:rank, None] * vh[:rank]).float()


def whitened_svd(weight_DF: Tensor, moment: Tensor, *, reads_stream: bool, rank: int) -> tuple[Tensor, Tensor]:
    r"""Best approximation of a rank of the layer's outputs, given the second moment of its inputs.

    ``reads_stream`` says which side the inputs are on: D (up layers) or F (down layers).
    """
    if reads_stream:
        basis_DR, (factor_RF,) = shared_whitened_svd([weight_DF], moment, rank=rank)
        return basis_DR, factor_RF
    root_FF, inverse_FF = _roots(moment)
    basis_DR, factor_RF = truncated_svd(weight_DF.double() @ root_FF, rank=rank)
    return basis_DR, (factor_RF.double() @ inverse_FF).float()


def shared_whitened_svd(weights_DF: Sequence[Tensor], moment_DD: Tensor, *, rank: int) -> tuple[Tensor, list[Tensor]]:
    """One basis for the inputs of several layers, dense coefficients for each."""
    root_DD, inverse_DD = _roots(moment_DD)
    joined_DF = torch.cat([weight.double() for weight in weights_DF], dim=1)
    basis_DR, factor_RF = truncated_svd(root_DD @ joined_DF, rank=rank)
    # columns of norm 1: those of small moments would be too large for float16, and their coefficients too small
    basis_DR, (factor_RF,) = normalize(inverse_DD @ basis_DR.double(), [factor_RF.double()])
    return basis_DR.float(), list(factor_RF.float().split([weight.shape[1] for weight in weights_DF], dim=1))


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root and its inverse."""
    values, vectors = torch.linalg.eigh(usable_moment(moment.double()))
    values = values.clamp_min(1e-6 * float(values.mean())).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T
