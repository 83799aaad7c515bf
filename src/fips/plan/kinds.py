"""What a model consists of, by kind of layer: weights, bits and bytes, before and after. Needs no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fips.errors import NoMatchError
from fips.models import Site, locate_layers
from fips.models.experts import experts_apart
from fips.plan.footprint import named_state
from fips.plan.plan import CompressionPlan

__all__ = ["KindSize", "layer_bytes", "sizes_by_kind"]

EMBEDDINGS, REST = "embeddings, heads", "all else"
KINDS = (
    *("MLP up", "MLP down", "experts up", "experts down", "attention readers", "attention writers"),
    *(EMBEDDINGS, REST),
)
"""Up projections (gates too) and those of attention that make queries, keys and values read the residual stream, the
others write it. Experts are the MLPs of which every token goes to a few. Embeddings and heads are the matrices outside
of repeated blocks; all else are biases, norms and whatever else is in a block."""


@dataclass(frozen=True, slots=True)
class KindSize:
    """All tensors of one kind."""

    kind: str
    tensors: int
    weights: int
    bytes_before: int
    bytes_after: float
    """Where layers share a basis, each with its part of it."""

    @property
    def bits_before(self) -> float:
        """Stored bits per weight, scales and patterns included."""
        return 8 * self.bytes_before / self.weights if self.weights else 0.0

    @property
    def bits_after(self) -> float:
        return 8 * self.bytes_after / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bits_before": self.bits_before, "bits_after": self.bits_after}


def layer_bytes(plan: CompressionPlan) -> dict[str, float]:
    """Bytes of every layer after compression, as far as a plan knows: its part of its group's, by its weights."""
    each = [(group, group.factored.bytes / (group.group.width * group.group.hidden)) for group in plan.groups]
    return {site.name: rate * site.width * site.hidden for group, rate in each for site in group.group.sites}


def sizes_by_kind(
    model: nn.Module, layers: Mapping[str, float], others: Mapping[str, int] | None = None
) -> tuple[KindSize, ...]:
    """Sizes of the tensors of a dense model, which may be on the meta device, by kind; kinds without tensors left out.

    ``layers`` says how many bytes a compressed layer takes, by name, ``others`` how many another tensor takes; without
    it those stay as they are.
    """
    with experts_apart(model):
        return _by_kind(model, layers, others)


def _by_kind(model: nn.Module, layers: Mapping[str, float], others: Mapping[str, int] | None) -> tuple[KindSize, ...]:
    sites = _sites(model)
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1}
    found: dict[str, list[tuple[int, int, float]]] = {kind: [] for kind in KINDS}
    for name, tensor in named_state(model).items():
        owner, _, key = name.rpartition(".")
        size = tensor.numel() * tensor.element_size()
        after = layers[owner] if key == "weight" and owner in layers else float((others or {}).get(name, size))
        if key == "weight" and owner in sites:
            kind = _kind_of(sites[owner])
        elif tensor.dim() > 1 and not any(name.startswith(f"{place}.") for place in lists):
            kind = EMBEDDINGS
        else:
            kind = REST
        found[kind].append((tensor.numel(), size, after))
    return tuple(
        KindSize(kind, len(rows), *(sum(column) for column in zip(*rows, strict=True)))
        for kind, rows in found.items()
        if rows
    )


def _sites(model: nn.Module) -> dict[str, Site]:
    """The layers that can be compressed, whether they are to be or not."""
    try:
        located = locate_layers(model, layers="blocks")
    except NoMatchError:
        return {}
    return {site.name: site for sublayer in located.sublayers for site in sublayer.sites}


def _kind_of(site: Site) -> str:
    part = "attention" if site.parts[0].space != "hidden" else "experts" if site.mixture else "MLP"
    readers, writers = (kind for kind in KINDS if kind.startswith(f"{part} "))
    return readers if site.role.reads_stream else writers
