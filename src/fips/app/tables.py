"""Plans and results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.table import Column, Table

from fips.app.outline import Outline, PackedOutline
from fips.config import Recipe
from fips.models import Sublayer
from fips.plan.footprint import bytes_enough, format_bytes
from fips.plan.groups import GroupPlan
from fips.plan.kinds import KindSize
from fips.plan.plan import CompressionPlan
from fips.record import CompressionReport

__all__ = [
    "block_table",
    "comparison_table",
    "error_lines",
    "format_bytes",
    "kind_table",
    "layer_table",
    "left_dense_lines",
    "natural",
    "packed_table",
    "parameter_lines",
    "plan_table",
    "recipe_table",
    "record_lines",
    "result_table",
    "share_line",
    "skipped_lines",
    "smallest_line",
]


def layer_table(plan: CompressionPlan) -> Table:
    """All layers that will be compressed, with roles and shapes, by the MLP or block and the group they are in."""
    table = Table("group", "part of", "kind", "layers (role: in x out)", title="Layers found", title_justify="left")
    for group in plan.groups:
        for sublayer in group.group.sublayers:
            table.add_row(group.group.name, sublayer.name, sublayer.kind, _describe_sites(sublayer))
    return table


def _describe_sites(sublayer: Sublayer) -> str:
    return ", ".join(
        f"{site.name.removeprefix(f'{sublayer.name}.')} ({site.role}: {site.inputs} x {site.outputs})"
        for site in sublayer.sites
    )


def plan_table(groups: Sequence[GroupPlan]) -> Table:
    """One line per group: width x hidden features of all matrices, rank, kept entries, bytes and their share."""
    title = f"Plan (factors stored as {groups[0].fmt}, {str(groups[0].dtype).removeprefix('torch.')})"
    blocks = Column("blocks", overflow="fold")
    table = Table("group", blocks, "shape", "rank", "kept", "bytes", "share", title=title)
    table.title_justify = "left"
    for plan in groups:
        table.add_row(
            plan.group.name,
            _span(plan.group.blocks or [sublayer.name for sublayer in plan.group.sublayers]),
            f"{plan.group.width}x{plan.group.hidden}",
            str(plan.rank),
            f"{plan.kept:,}" if plan.kept < 1_000_000 else f"{plan.kept / 1e6:.1f} M",
            format_bytes(plan.factored.bytes),
            f"{plan.factored.bytes / plan.dense.bytes:.1%}",
        )
    return table


def _span(blocks: Sequence[str]) -> str:
    """``encoder.layer.0`` ... ``encoder.layer.3`` as ``layer.0-3``."""
    first, last = (".".join(name.split(".")[-2:]) for name in (blocks[0], blocks[-1]))
    return first if len(blocks) == 1 else f"{first}-{last.rpartition('.')[2]}"


def kind_table(kinds: Sequence[KindSize]) -> Table:
    """Tensors, weights, bits per weight and bytes of every kind of layer, before and after, and of all."""
    names = ("tensors", "weights", "bits per weight", "bytes")
    right = [Column(name, justify="right", no_wrap=True) for name in names]
    table = Table(Column("kind", no_wrap=True), *right, title="Sizes", title_justify="left")
    for kind in kinds:
        table.add_row(*_kind_row(kind))
    table.add_section()
    table.add_row(*_kind_row(_all(kinds)))
    return table


def _kind_row(kind: KindSize) -> tuple[str, ...]:
    before, after = format_bytes(kind.bytes_before), format_bytes(kind.bytes_after)
    bits = f"{kind.bits_before:.3g}"
    if kind.bytes_after != kind.bytes_before:
        before, bits = f"{before} -> {after}", f"{bits} -> {kind.bits_after:.3g}"
    return kind.kind, f"{kind.tensors:,}", _count(kind.weights), bits, before


def _all(kinds: Sequence[KindSize]) -> KindSize:
    return KindSize(
        "all",
        sum(kind.tensors for kind in kinds),
        sum(kind.weights for kind in kinds),
        sum(kind.bytes_before for kind in kinds),
        sum(kind.bytes_after for kind in kinds),
    )


def share_line(kinds: Sequence[KindSize]) -> str:
    """What the whole file takes of what it took."""
    total = _all(kinds)
    share, times = total.bytes_after / total.bytes_before, total.bytes_before / total.bytes_after
    return f"whole file: {share:.1%} of what it was, {times:.2f}x smaller"


def _count(number: int) -> str:
    """Three digits, ``1.23 M``, exact below a thousand."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def parameter_lines(outline: Outline) -> list[str]:
    """What is left of the parameters of the layers, where a share of them was asked for: with bytes instead the default
    decides by trials how many it keeps, often all."""
    before, after = outline.plan.dense.parameters, outline.plan.factored.parameters
    if "budget" not in outline.smallest:
        return []
    return [f"parameters of these layers: {_count(before)} -> {_count(after)} ({after / before:.1%})"]


def smallest_line(outline: Outline) -> str:
    """The smallest size that can be asked for."""
    least = outline.smallest
    if "budget" in least:
        return f"smallest size: --budget {least['budget']:g}"
    return f"smallest size: --bits {least['bits']:g}, {bytes_enough(int(least['bytes']))} for the whole file"


def packed_table(packed: PackedOutline) -> Table:
    """One line per packed layer, below the module it is in."""
    with_basis = any(layer.rank for layer in packed.layers)
    measured = any(layer.held_out is not None for layer in packed.layers)
    table = Table(Column("layer", overflow="fold"), title="Packed layers", title_justify="left")
    table.add_column("in x out", no_wrap=True)
    table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("pattern", no_wrap=True)
    table.add_column("values", no_wrap=True)
    if with_basis:
        table.add_column("rank", justify="right", no_wrap=True)
    if measured:
        table.add_column("held out", justify="right", no_wrap=True)
    layers = sorted(packed.layers, key=lambda layer: natural(layer.name))
    for parent, members in groupby(layers, key=lambda layer: layer.name.rpartition(".")[0]):
        table.add_section()
        table.add_row(parent, style="bold")
        for layer in members:
            row = [f"  {layer.name.rpartition('.')[2]}", f"{layer.inputs}x{layer.outputs}", f"{layer.bits:.2f}"]
            row += [layer.pattern, layer.values, *([str(layer.rank or "")] if with_basis else [])]
            row += ["" if layer.held_out is None else f"{layer.held_out:.3f}"] if measured else []
            table.add_row(*row)
    return table


def natural(name: str) -> list[tuple[int, str]]:
    """Numbers in the order of numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def block_table(errors: Mapping[str, float]) -> Table:
    """Errors of the outputs of blocks."""
    table = Table("block", Column("error", justify="right"), title="Blocks", title_justify="left")
    for name, error in errors.items():
        table.add_row(name, f"{error:.3g}")
    return table


def error_lines(packed: PackedOutline) -> list[str]:
    """What the errors of these tables are."""
    lines = []
    if any(layer.held_out is not None for layer in packed.layers):
        lines.append("held out: a layer's error on data it was not fitted to, over that on the data it was fitted to")
    if packed.block_errors:
        lines.append("error: MSE of a block's output over its variance, on calibration data")
    return lines


def record_lines(report: CompressionReport) -> list[str]:
    """How a packed directory came to be."""
    data = report.data
    parts = [f"method {report.config.method}"]
    if report.source is not None:
        parts.append(f"made from {report.source}")
    if data.get("source") is not None:
        parts.append(f"calibrated on {data.get('num_samples', '?')} examples of {data['source']}")
    parts.append(f"in {report.seconds:.0f} s")
    distilled = report.distillation()
    return ["; ".join(parts), *([f"distilled: {distilled}"] if distilled else []), *report.notes]


def result_table(report: CompressionReport) -> Table:
    """One line per group: what it became, relative error of its block outputs, and time.

    The error of the start is shown where something was trained after it, the rank where there is a basis.
    """
    plans = report.plan["groups"]
    with_basis = any(group["rank"] for group in plans)
    trained = any(result["relative_error_start"] != result["relative_error_final"] for result in report.groups)
    distilled = getattr(getattr(report.config, "distill", None), "steps", 0) > 0
    numbers = ["rank"] if with_basis else [], ["bits"], ["start"] if trained else [], ["error", "time"]
    rank, bits, start, rest = ([Column(name, justify="right", no_wrap=True) for name in names] for names in numbers)
    # Where there is little room these are broken between words: no number is, and no header.
    group, patterns, values = (Column(name, min_width=len(name)) for name in ("group", "patterns", "values"))
    table = Table(group, *rank, *bits, patterns, values, *start, *rest, title="Result", title_justify="left")
    table.caption = (
        "error: MSE of the block outputs / their variance, mean over blocks, calibration data"
        + ("; start: before training" if trained else "")
        + ("; distilling lessens another error, that of the predictions" if trained and distilled else "")
    )  # fmt: skip
    table.caption_justify = "left"
    for result, group in zip(report.groups, plans, strict=True):
        table.add_row(
            _group_name(result),
            *([str(group["rank"])] if with_basis else []),
            f"{8 * group['factored']['bytes'] / group['dense']['parameters']:.2f}",
            group["format"],
            group.get("values", "float"),
            *([_number(result["relative_error_start"], ".3g")] if trained else []),
            _number(result["relative_error_final"], ".3g"),
            _seconds(result["seconds"]),
        )
    return table


def _group_name(result: Mapping[str, Any]) -> str:
    """With the number of its blocks; embedding and head are none."""
    count = len(result["blocks"])
    return f"{result['name']}: {count} block{'s' if count > 1 else ''}" if count else str(result["name"])


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


def _number(value: float | None, digits: str) -> str:
    return "not measured" if value is None else format(value, digits)


def skipped_lines(plan: CompressionPlan) -> list[str]:
    return [f"skipped {item.name}: {item.reason}" for item in plan.skipped]


def left_dense_lines(plan: dict[str, Any]) -> list[str]:
    """One line per reason for which layers stayed dense, from the plan of a report."""
    left = plan.get("left_dense", {"layers": []})
    lines = []
    for reason in dict.fromkeys(item["reason"] for item in left["layers"]):
        names = [item["name"] for item in left["layers"] if item["reason"] == reason]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"left dense {shown}: {reason}")
    if lines:
        size = plan["layers"]["factored"]["bytes"]
        lines.append(
            f"the size asked for is that of the compressed layers ({format_bytes(size)}); those left dense take "
            f"{format_bytes(left['bytes'])} more"
        )
    return lines


def recipe_table(recipes: Mapping[str, Recipe]) -> Table:
    """One line per recipe: its name, model and size, which are not broken, and what it is for."""
    entries = {}
    for name, recipe in recipes.items():
        setting = recipe.compression
        size = setting.size or (f"{setting.budget:g} of the parameters" if setting.budget else f"{setting.bits:g} bits")
        entries[f"{name}\n{recipe.model or 'any model'}\n{size}"] = recipe.description
    table = Table(Column("recipe, model, size", no_wrap=True), "description", show_lines=True)
    for row in entries.items():
        table.add_row(*row)
    return table


def comparison_table(comparison: Any) -> Table:
    """One row per method and size, the original's quality in the title."""
    title = f"{comparison.metric} of the original: {comparison.original:.4g}"
    table = Table("method", "bits", comparison.metric, "KL", "agreement", "time", title=title)
    table.title_justify = "left"
    for row in comparison.rows():
        if row["quality"] is None:
            table.add_row(row["method"], f"{row['bits']:g}", "does not fit", "", "", "")
            continue
        table.add_row(
            row["method"],
            f"{row['stored_bits']:.2f}",
            f"{row['quality']:.4g}",
            _number(row["kl"], ".4g"),
            "" if row["agreement_percent"] is None else f"{row['agreement_percent']:.2f} %",
            f"{row['seconds']:.0f} s",
        )
    return table
