"""What a model consists of and what it becomes, by kind of layer: of a plan, and of a directory that was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fips.app.sources import empty_model
from fips.config import CompressionConfig
from fips.files.manifest import read_json
from fips.files.untrusted import file_inside
from fips.layers.linear import BASES
from fips.models.experts import experts_apart
from fips.models.wrappers import unwrap
from fips.plan.kinds import KindSize, layer_bytes, sizes_by_kind
from fips.plan.least import round_up
from fips.plan.plan import CompressionPlan, settle_size, size_note, uses_size
from fips.plan.rest import rest_sizes
from fips.plan.size import sizes_of, smallest_sizes
from fips.record import CompressionReport
from fips.storage.checkpoint import local_directory
from fips.storage.layout import Layout
from fips.storage.quantizer import read_report
from fips.storage.weights import Stored, StoredWeights, check_layout

__all__ = ["Outline", "PackedLayer", "PackedOutline", "outline_of_directory", "outline_of_plan"]


@dataclass(frozen=True, slots=True)
class Outline:
    """A plan with the sizes of everything in the model."""

    plan: CompressionPlan
    kinds: tuple[KindSize, ...]
    smallest: dict[str, float]
    """What could be asked for at least: ``bits`` and the ``bytes`` of the whole file then, or the ``budget``."""
    unused: str | None = None
    """Why a size of the whole file is not used up, where it is not."""

    def to_dict(self) -> dict[str, Any]:
        kinds = [kind.to_dict() for kind in self.kinds]
        return {**self.plan.to_dict(), "kinds": kinds, "smallest": self.smallest, "unused": self.unused}


def outline_of_plan(model: nn.Module, plan: CompressionPlan, config: CompressionConfig) -> Outline:
    """Of the model that a plan was made for, which may be on the meta device."""
    model = unwrap(model)
    with experts_apart(model):
        return _outline(model, plan, config)


def _outline(model: nn.Module, plan: CompressionPlan, config: CompressionConfig) -> Outline:
    groups = [group.group for group in plan.groups]
    if config.budget is not None:
        smallest = {"budget": float(round_up(max(smallest_sizes(model, groups, config).values())))}
    else:
        sizes = sizes_of(model, groups, config)
        smallest = {"bits": float(round_up(sizes.least_bits)), "bytes": sizes.least_bytes}
    others = rest_sizes(model, [site.name for group in groups for site in group.sites], config)
    unused = None
    if config.budget is None:
        settled = settle_size(plan, model, config)
        unused = None if uses_size(settled, plan.groups) else size_note(config, settled, plan.groups)
    return Outline(plan, sizes_by_kind(model, layer_bytes(plan), others), smallest, unused)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedLayer:
    """One packed layer as its file says it."""

    name: str
    inputs: int
    outputs: int
    rank: int
    """Vectors of its basis, 0 without one."""
    pattern: str
    values: str
    bits: float
    """Stored bits per weight: values, scales, pattern, and its part of the basis."""
    held_out: float | None
    """Its error on data that it was not fitted to over that on the data it was fitted to, where that was measured."""


@dataclass(frozen=True, slots=True)
class PackedOutline:
    """A packed directory: what it holds and what the record beside it says."""

    layers: tuple[PackedLayer, ...]
    kinds: tuple[KindSize, ...]
    block_errors: dict[str, float]
    """By block: MSE of its output over the variance of that, on calibration data; where it was measured."""
    report: CompressionReport | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "kinds": [kind.to_dict() for kind in self.kinds],
            "block_errors": self.block_errors,
            "report": None if self.report is None else self.report.to_dict(),
        }


def outline_of_directory(source: str, *, trust_remote_code: bool = False) -> PackedOutline:
    """Of a packed directory, from its ``config.json``, the headers of its weights and its record; reads no weights.

    Raises ``CheckpointError`` for a directory that is damaged.
    """
    path = local_directory(source)
    config = file_inside(path, "config.json", where=f"`{path}`")
    layout = Layout.parse(read_json(config).get("quantization_config"), where=f"`{config}`")
    weights = StoredWeights.of_directory(path)
    check_layout(layout, weights)
    report = read_report(path)
    ratios = {} if report is None else report.overfit
    sizes = _layer_bytes(layout, weights.tensors)
    layers = []
    for name, entry in layout.layers.items():
        inputs, outputs = layout.features(entry)
        layers.append(
            PackedLayer(
                name=name,
                inputs=inputs,
                outputs=outputs,
                rank=0 if entry.basis is None else layout.rank(entry),
                pattern=entry.format,
                values=entry.values,
                bits=8 * sizes[name] / (inputs * outputs),
                held_out=ratios.get(name),
            )
        )
    others = {name: _nbytes(stored) for name, stored in weights.tensors.items()}
    original = empty_model(str(path), trust_remote_code=trust_remote_code)
    if report is not None and report.config.rest_dtype is not None:  # the directory tells the type of now
        original.to(dtype=_type_before(report, original))
    kinds = sizes_by_kind(original, sizes, others)
    return PackedOutline(tuple(layers), kinds, _block_errors(report), report)


def _type_before(report: CompressionReport, model: nn.Module) -> torch.dtype:
    """The type of the model that was compressed, told by the bytes of its weights."""
    size = round(report.plan["model"]["bytes"] / report.plan["model"]["parameters"])
    now = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return {4: torch.float32, 8: torch.float64}.get(size, now if now.itemsize == size else torch.bfloat16)


def _layer_bytes(layout: Layout, tensors: Mapping[str, Stored]) -> dict[str, float]:
    """By layer: its own tensors, but for the bias, which compression leaves, and its part of the basis."""
    sizes = dict.fromkeys(layout.layers, 0.0)
    for key, stored in tensors.items():
        name, _, part = key.rpartition(".")
        if name in sizes and part != "bias":
            sizes[name] += _nbytes(stored)
    for basis in layout.bases:
        ending = f"{BASES}.{basis}.weight"
        size = sum(_nbytes(stored) for key, stored in tensors.items() if f".{key}".endswith(f".{ending}"))
        members = {name: entry.hidden for name, entry in layout.layers.items() if entry.basis == basis}
        for name, hidden in members.items():
            sizes[name] += size * hidden / sum(members.values())
    return sizes


def _nbytes(stored: Stored) -> int:
    count = stored.dtype.itemsize
    for side in stored.shape:
        count *= side
    return count


def _block_errors(report: CompressionReport | None) -> dict[str, float]:
    found = {}
    for group in [] if report is None else report.groups:
        for block in group["blocks"]:
            if block.get("relative_final") is not None:
                found[block["name"]] = float(block["relative_final"])
    return found
