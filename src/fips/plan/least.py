r"""The smallest size that makes sense, so that no setting leaves a matrix all but empty.

Sensible is what keeps, on average, at least one entry for every row and every column of every matrix, besides the
patterns, scales and bases that these need:

* pruning, ours and others': :math:`\max(d, p)` kept entries of a (d, p) matrix; where the density is the same in all
  layers of a group, enough for the narrowest of them;
* N:M: what the pattern keeps; its size is fixed;
* ``fips-paper``: a rank r with :math:`(1 - s)\, r \ge 1`, or M vectors for N:M;
* low rank: one vector for every matrix; ``gptq``: 2 bits for every entry.

Legend: d width of the residual stream, p columns of one matrix, s sparsity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from fips.config import PRUNERS, CompressionConfig
from fips.errors import BudgetError
from fips.formats.values import values_named
from fips.models import LayerGroup, LinearSite
from fips.plan.footprint import LayerStorage, factored_footprint, itemsize

__all__ = [
    "REFERENCE_ITEMSIZE",
    "least_rank",
    "paper_pattern_rate",
    "require_sensible_size",
    "round_up",
    "smallest_size",
]

REFERENCE_ITEMSIZE = 2
"""Sizes are compared with dense matrices in a 16-bit type, whatever type a checkpoint happens to use."""
_EPS = 1e-9


def require_sensible_size(groups: Iterable[tuple[LayerGroup, torch.dtype]], config: CompressionConfig) -> None:
    """Raise ``BudgetError`` with the smallest size to use if the one asked for leaves a matrix all but empty.

    ``groups`` come with the storage type of their bases, floating values and scales.
    """
    name, value = ("budget", config.budget) if config.budget is not None else ("target_bytes", config.target_bytes)
    assert value is not None
    sizes = {group.name: smallest_size(group, config, dtype) for group, dtype in groups}
    worst = max(sizes, key=lambda key: sizes[key])
    least = sizes[worst]
    if value >= least * (1 - _EPS):
        return
    start = f"`{name}` {value:g} is too small for group {worst}: less than an entry for every row and column"
    if float(round_up(least)) > 1:
        raise BudgetError(f"{start}, and so is 1, the most there is; leave its layers out with `ignore`")
    raise BudgetError(
        f"{start} would be left of a matrix; the smallest `{name}` for these settings is {round_up(least)}"
    )


def round_up(value: float) -> str:
    """A number with three digits that is not below ``value``."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    steps = math.ceil(value / unit - _EPS)
    while float(f"{steps * unit:.3g}") < value:
        steps += 1
    return f"{steps * unit:.3g}"


def smallest_size(group: LayerGroup, config: CompressionConfig, dtype: torch.dtype) -> float:
    """The smallest sensible ``budget`` or ``target_bytes``, whichever is set, of one group; may exceed 1."""
    if config.method == "fips":
        return _solver(group, config, itemsize(dtype))
    if config.method == "fips-paper":
        return _paper(group, config, itemsize(dtype))
    if config.method in PRUNERS:
        return _pruner(group, config, itemsize(dtype))
    if config.method == "gptq":
        size, rows = group.width * group.columns, sum(_rows(site) for site in group.sites)
        return (size / 4 + rows * itemsize(dtype)) / (REFERENCE_ITEMSIZE * size)
    unit = 1.0 if config.budget is not None else itemsize(dtype) / REFERENCE_ITEMSIZE
    return max(unit * (site.width + site.columns) / (site.width * site.columns) for site in group.sites)


def least_rank(config: CompressionConfig) -> int:
    """The smallest rank of ``fips-paper`` with an entry for every column of its factors."""
    if config.format.density is not None:
        return config.format.group
    return math.ceil(1 / (1 - config.factor_sparsity) - _EPS)


def _rows(site: LinearSite) -> int:
    """Stored rows of a layer without a basis, each with a scale where values are integers."""
    return site.columns if site.role == "up" else site.width


def _solver(group: LayerGroup, config: CompressionConfig, item: int) -> float:
    if config.sharing == "always" and len(group.sites) > 1:
        basis = group.width**2 * (item if config.budget is None else 1)
        return (basis + sum(_solved(site, config, item) for site in group.sites)) / _dense(group.columns, group, config)
    return max(_solved(site, config, item) / _dense(site.columns, group, config) for site in group.sites)


def _dense(columns: int, group: LayerGroup, config: CompressionConfig) -> int:
    """What sizes are fractions of: numbers or bytes of columns of a group."""
    return columns * group.width * (REFERENCE_ITEMSIZE if config.budget is None else 1)


def _solved(site: LinearSite, config: CompressionConfig, item: int) -> float:
    """The least that the solver may make of a matrix, without its basis: numbers or bytes."""
    size, pattern = site.width * site.columns, config.format
    kept = math.ceil(max(site.width, site.columns) / pattern.block) * pattern.block
    if pattern.group_kept is not None:
        kept = size * pattern.group_kept // pattern.group
    if config.budget is not None:
        return kept
    numbers = config.value_choices[0]
    values: float = kept * item
    if numbers.bits is not None:
        scales = numbers.num_scales(_rows(site), size // _rows(site))
        values = kept * numbers.bits / 8 + scales * item + (numbers.bits % 8 > 0)
    bits = size / pattern.group * pattern.group_bits if pattern.density is None else pattern.bits(size)
    return values + bits / 8


def _paper(group: LayerGroup, config: CompressionConfig, item: int) -> float:
    density = 1 - config.factor_sparsity
    if config.budget is not None:
        return least_rank(config) * (group.width + density * group.columns) / (group.width * group.columns)
    cost = group.width * item + group.columns * (density * item + paper_pattern_rate(config))
    return least_rank(config) * cost / (REFERENCE_ITEMSIZE * group.width * group.columns)


def paper_pattern_rate(config: CompressionConfig) -> float:
    """Bytes of pattern per factor entry of ``fips-paper``."""
    pattern = config.format
    return pattern.group_bits / pattern.group / 8 if config.factor_sparsity > 0 else 0.0


def _pruner(group: LayerGroup, config: CompressionConfig, item: int) -> float:
    size = group.width * group.columns
    kept = max(math.ceil(size * _density(site, config.method) - _EPS) for site in group.sites)
    if config.budget is not None:
        return kept / size
    kind = config.value_kind
    assert kind != "auto"
    empty = [LayerStorage(0, values=kind, shared=False) for _ in group.sites]
    overhead = factored_footprint(group, rank=0, itemsize=item, layers=empty).bytes
    return (kept * values_named(kind).bits_of(item) / 8 + overhead) / (REFERENCE_ITEMSIZE * size)


def _density(site: LinearSite, method: str) -> float:
    """Share of a layer's entries that is one for every row and column; Wanda keeps whole numbers in every row."""
    inputs, outputs = (site.width, site.columns) if site.role == "up" else (site.columns, site.width)
    return math.ceil(inputs / outputs) / inputs if method == "wanda" else 1 / min(inputs, outputs)
