"""Plans and results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from fips.models import Sublayer
from fips.plan.groups import GroupPlan
from fips.plan.plan import CompressionPlan
from fips.record import CompressionReport

__all__ = [
    "comparison_table",
    "format_bytes",
    "layer_table",
    "left_dense_lines",
    "plan_table",
    "result_table",
    "size_table",
    "skipped_lines",
]


def format_bytes(count: int) -> str:
    """Three digits, ``1.23 MB`` or ``865 MB`` (10^6 bytes), exact below 1 kB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5 or unit == "GB":
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{count} B" if unit == "B" else f"{value:.{digits}f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


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
    """One line per group: width, hidden features of all matrices, rank, kept entries, bytes before and after."""
    title = f"Plan (factors stored as {groups[0].fmt}, {str(groups[0].dtype).removeprefix('torch.')})"
    table = Table("group", "blocks", "width x hidden", "rank", "kept", "bytes", "after", "share", title=title)
    table.title_justify = "left"
    for plan in groups:
        table.add_row(
            plan.group.name,
            _span(plan.group.blocks or [sublayer.name for sublayer in plan.group.sublayers]),
            f"{plan.group.width}x{plan.group.hidden}",
            str(plan.rank),
            f"{plan.kept:,}" if plan.kept < 1_000_000 else f"{plan.kept / 1e6:.1f} M",
            format_bytes(plan.dense.bytes),
            format_bytes(plan.factored.bytes),
            f"{plan.factored.bytes / plan.dense.bytes:.1%}",
        )
    return table


def _span(blocks: Sequence[str]) -> str:
    """``encoder.layer.0`` ... ``encoder.layer.3`` as ``layer.0-3``."""
    first, last = (".".join(name.split(".")[-2:]) for name in (blocks[0], blocks[-1]))
    return first if len(blocks) == 1 else f"{first}-{last.rpartition('.')[2]}"


def size_table(plan: CompressionPlan) -> Table:
    """Parameters and bytes of the compressed layers and of the whole model, before and after."""
    table = Table("", "parameters", "after", "share", "bytes", "after", "share", title="Size", title_justify="left")
    rows = (
        ("layers", plan.dense.parameters, plan.factored.parameters, plan.dense.bytes, plan.factored.bytes),
        ("model", plan.model_parameters, plan.compressed_parameters, plan.model_bytes, plan.compressed_bytes),
    )
    for name, parameters, parameters_after, size, size_after in rows:
        table.add_row(
            name,
            f"{parameters:,}",
            f"{parameters_after:,}",
            f"{parameters_after / parameters:.1%}",
            format_bytes(size),
            format_bytes(size_after),
            f"{size_after / size:.1%}",
        )
    return table


def result_table(report: CompressionReport) -> Table:
    """One line per group: what it became, relative error of its block outputs at the start and at the end, and time."""
    columns = ("group", "blocks", "rank", "formats", "values", "error of the start", "final error", "time")
    table = Table(*columns, title="Result", title_justify="left")
    table.caption = "errors: MSE of the block outputs / their variance, mean over blocks, calibration data"
    for result, group in zip(report.groups, report.plan["groups"], strict=True):
        table.add_row(
            result["name"],
            str(len(result["blocks"])),
            str(group["rank"]),
            group["format"],
            group.get("values", "float"),
            _number(result["relative_error_start"], ".5f"),
            _number(result["relative_error_final"], ".5f"),
            f"{result['seconds']:.1f} s",
        )
    return table


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
