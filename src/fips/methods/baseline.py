"""Published methods through the same interface: same data, same storage, same accounting as ours."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from fips.calibration.moments import LayerMoments, moment_bytes
from fips.errors import BudgetError
from fips.formats.patterns import BITMASK, DENSE
from fips.formats.values import integers
from fips.layers.linear import FactoredLinear, SharedBasis
from fips.methods.lowrank import shared_whitened_svd, truncated_svd, whitened_svd
from fips.methods.pruning import magnitude, sparsegpt, wanda
from fips.methods.quantization import gptq
from fips.methods.workbench import CompressedGroup, Workbench, dense_matrix
from fips.models import LinearSite
from fips.plan.footprint import Footprint, LayerStorage, itemsize
from fips.plan.plan import CompressionPlan, GroupPlan, solved_plan, target_bytes

__all__ = ["compress_by_baseline"]

EPS = 1e-9
SHARING_SPAN = 2
"""Consecutive layers that share a basis in Basis Sharing, as in its paper."""


def compress_by_baseline(bench: Workbench, plan: CompressionPlan) -> list[CompressedGroup]:
    """Every group with the method of the settings, on the second moments of the original's inputs."""
    sites = [site for group in plan.groups for site in group.group.sites]
    if bench.config.method in ("magnitude", "svd"):
        return [_compress_group(bench, group, {}) for group in plan.groups]
    if moment_bytes(sites) <= bench.config.metric.memory:
        moments = _second_moments(bench, "all", sites)
        return [_compress_group(bench, group, moments) for group in plan.groups]
    return [
        _compress_group(bench, group, _second_moments(bench, group.group.name, group.group.sites))
        for group in plan.groups
    ]


def _compress_group(bench: Workbench, plan: GroupPlan, moments: Mapping[str, Tensor]) -> CompressedGroup:
    started = time.perf_counter()
    low_rank = bench.config.method in ("svd", "svd-llm", "basis-sharing")
    with torch.autocast(bench.device.type, enabled=False):
        if low_rank:
            found = _low_rank(bench, plan, moments)
        else:
            found = (_rounded if bench.config.method == "gptq" else _pruned)(bench, plan, moments)
    for site in plan.group.sites:
        found.layers[site.name].bias = bench.bias(site)
        found.layers[site.name].conv1d = site.conv1d
    found.start = found.final = bench.final_errors(plan.group, found.layers)
    found.seconds = time.perf_counter() - started
    return found


def _second_moments(bench: Workbench, name: str, sites: Sequence[LinearSite]) -> dict[str, Tensor]:
    """About zero, all tokens alike, as these methods define it."""
    moments = bench.moments(name, sites, floor=1.0)
    return {site.name: _about_zero(moments[site.name]) for site in sites}


def _about_zero(moments: LayerMoments) -> Tensor:
    if not moments.centered:
        return moments.inputs_DD
    return moments.inputs_DD + torch.outer(moments.mean_D, moments.mean_D)


def _pruned(bench: Workbench, plan: GroupPlan, moments: Mapping[str, Tensor]) -> CompressedGroup:
    """The same density in every layer, as much as the bytes allow."""
    config, sites = bench.config, plan.group.sites
    density = plan.nonzeros / (plan.group.width * plan.group.columns)
    layers: dict[str, FactoredLinear] = {}
    kind = config.value_kind
    assert kind != "auto"
    storages = []
    for site in sites:
        weight_OI = _as_linear(dense_matrix(bench.model, site).float(), site)
        if config.method == "magnitude":
            pruned_OI, mask_OI = magnitude(weight_OI, density=density)
        else:
            method = wanda if config.method == "wanda" else sparsegpt
            pruned_OI, mask_OI = method(weight_OI, moments[site.name], density=density)
        storages.append(LayerStorage(int(mask_OI.sum()), BITMASK, kind, shared=False))
        layers[site.name] = FactoredLinear.from_factor(
            None, _as_linear(pruned_OI, site), _as_linear(mask_OI, site), role=site.role, fmt=BITMASK,
            dtype=plan.dtype, values=kind,
        )  # fmt: skip
    return CompressedGroup(solved_plan(plan, rank=0, layers=storages), {}, layers, (), (), (), 0.0)


def _rounded(bench: Workbench, plan: GroupPlan, moments: Mapping[str, Tensor]) -> CompressedGroup:
    """All entries in as many bits as the bytes allow."""
    size = plan.group.width * plan.group.columns
    rows = sum(site.columns if site.role == "up" else site.width for site in plan.group.sites)
    allowed = target_bytes(plan.group, bench.config) - rows * itemsize(plan.dtype)
    bits = min(int(8 * allowed / size + EPS), 8)
    if bits < 2:
        raise BudgetError(f"{allowed:.0f} bytes are less than 2 bits for each of {size} entries; ask for more bytes")
    values = integers(bits)
    layers: dict[str, FactoredLinear] = {}
    for site in plan.group.sites:
        weight_OI = _as_linear(dense_matrix(bench.model, site).float(), site)
        rounded_OI, steps_O = gptq(weight_OI, moments[site.name], values=values, dtype=plan.dtype)
        layers[site.name] = FactoredLinear.from_factor(
            None, _as_linear(rounded_OI, site), torch.ones_like(_as_linear(rounded_OI, site), dtype=torch.bool),
            role=site.role, fmt=DENSE, dtype=plan.dtype, values=values.name, scales=steps_O,
        )  # fmt: skip
    storages = [LayerStorage(layer.nonzeros, DENSE, values.name, shared=False) for layer in layers.values()]
    return CompressedGroup(solved_plan(plan, rank=0, layers=storages), {}, layers, (), (), (), 0.0)


def _as_linear(matrix: Tensor, site: LinearSite) -> Tensor:
    """(D, F) as (O, I) and back."""
    return matrix.T if site.role == "up" else matrix


def _low_rank(bench: Workbench, plan: GroupPlan, moments: Mapping[str, Tensor]) -> CompressedGroup:
    bases: dict[str, SharedBasis] = {}
    layers: dict[str, FactoredLinear] = {}
    footprint = Footprint(0, 0, 0, 0)
    rank = 0
    for index, team in enumerate(_teams(plan, bench.config.method)):
        columns = sum(site.columns for site in team)
        rank = _rank(plan, bench, columns)
        weights_DF = [dense_matrix(bench.model, site).float() for site in team]
        basis_DR, factors_RF = _factorize(bench.config.method, weights_DF, team, moments, rank)
        basis = SharedBasis.of(basis_DR, plan.dtype)
        bases[f"{plan.group.name}_{index}"] = basis
        for site, factor_RF in zip(team, factors_RF, strict=True):
            mask_RF = torch.ones_like(factor_RF, dtype=torch.bool)
            layers[site.name] = FactoredLinear.from_factor(
                basis, factor_RF, mask_RF, role=site.role, fmt=DENSE, dtype=plan.dtype
            )
        footprint += _team_footprint(plan, rank, columns, len(team))
    plan = GroupPlan(
        plan.group, rank, sum(layer.nonzeros for layer in layers.values()), DENSE, plan.dtype, plan.dense,
        footprint,
    )  # fmt: skip
    return CompressedGroup(plan, bases, layers, (), (), (), 0.0)


def _teams(plan: GroupPlan, method: str) -> Iterator[list[LinearSite]]:
    """Layers that share a basis: single ones, for Basis Sharing the same up layer of consecutive MLPs."""
    if method != "basis-sharing":
        yield from ([site] for site in plan.group.sites)
        return
    mlps = plan.group.mlps
    for _, span in groupby(range(len(mlps)), key=lambda index: index // SHARING_SPAN):
        members = [mlps[index].sites for index in span]
        if len({len(sites) for sites in members}) > 1:  # some of their layers are left dense
            yield from ([site] for sites in members for site in sites)
            continue
        for place in zip(*members, strict=True):
            yield from [list(place)] if place[0].role == "up" else [[site] for site in place]


def _rank(plan: GroupPlan, bench: Workbench, columns: int) -> int:
    config, width = bench.config, plan.group.width
    dense = width * columns
    if config.budget:
        allowed = config.budget * dense
    else:
        share = columns / plan.group.columns
        allowed = target_bytes(plan.group, config) * share / itemsize(plan.dtype)
    rank = int(allowed / (width + columns) + EPS)
    if rank < 1:
        raise BudgetError(f"not one vector of {width} + {columns} numbers fits; ask for more bytes")
    return rank


def _factorize(
    method: str, weights_DF: Sequence[Tensor], team: Sequence[LinearSite], moments: Mapping[str, Tensor], rank: int
) -> tuple[Tensor, list[Tensor]]:
    if method == "svd":
        basis_DR, factor_RF = truncated_svd(weights_DF[0], rank=rank)
        return basis_DR, [factor_RF]
    if team[0].role == "up":
        moment_DD = torch.stack([moments[site.name] for site in team]).sum(0)
        return shared_whitened_svd(weights_DF, moment_DD, rank=rank)
    basis_DR, factor_RF = whitened_svd(weights_DF[0], moments[team[0].name], reads_stream=False, rank=rank)
    return basis_DR, [factor_RF]


def _team_footprint(plan: GroupPlan, rank: int, columns: int, members: int) -> Footprint:
    entries = rank * (plan.group.width + columns)
    macs = rank * (members * plan.group.width + columns)
    return Footprint(entries, entries * itemsize(plan.dtype), 0, macs)
