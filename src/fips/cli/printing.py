"""Results of the commands as text or JSON on stdout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fips.cli.console import stdout

CACHED_BYTES = 32 * 2**20
"""Dense matrices of this many bytes may stay in a processor's caches from one token to the next."""
NO_FASTER = 0.95
"""Speed-up from which on a case counts as slower; what is above may be noise."""


def print_json(value: Any) -> None:
    stdout.write(json.dumps(value, indent=2) + "\n")


def print_plan(outline: Any, *, as_json: bool, with_layers: bool = False, estimate: Any = None) -> None:
    from fips.app.tables import (
        kind_table,
        layer_table,
        parameter_lines,
        plan_table,
        share_line,
        skipped_lines,
        smallest_line,
    )

    if as_json:
        print_json({**outline.to_dict(), **({} if estimate is None else {"estimate": estimate.to_dict()})})
        return
    plan = outline.plan
    if with_layers:
        stdout.print(layer_table(plan))
    if any(group.rank for group in plan.groups):  # otherwise groups share nothing that is planned
        stdout.print(plan_table(plan.groups))
    stdout.print(kind_table(outline.kinds))
    lines = [share_line(outline.kinds)]
    if outline.unused is not None:
        lines.append(outline.unused)
    lines += [*parameter_lines(outline), smallest_line(outline), *skipped_lines(plan)]
    if estimate is not None:
        lines.append(estimate.line())
    for line in lines:
        stdout.tell(line)


def print_packed(packed: Any, *, as_json: bool) -> None:
    from fips.app.tables import block_table, error_lines, kind_table, packed_table, record_lines, share_line

    if as_json:
        print_json(packed.to_dict())
        return
    stdout.print(packed_table(packed))
    if packed.block_errors:
        stdout.print(block_table(packed.block_errors))
    stdout.print(kind_table(packed.kinds))
    lines = [share_line(packed.kinds), *error_lines(packed)]
    lines += ["no record beside the weights"] if packed.report is None else record_lines(packed.report)
    for line in lines:
        stdout.tell(line)


def tell_file(source: str | None) -> None:
    """Sizes of a GGUF file are those of its numbers as floats, in which it is read."""
    from fips.app.tables import format_bytes
    from fips.models.gguf import is_gguf_source

    if source is not None and is_gguf_source(source):
        file = Path(source)
        size = f" takes {format_bytes(file.stat().st_size)}" if file.is_file() else " is smaller"
        stdout.tell(f"the sizes before compression are those of its numbers as floats; the GGUF file itself{size}")


def print_compression(done: Any, output: Path, *, as_json: bool) -> None:
    from fips.app.page import PAGE
    from fips.app.tables import format_bytes, left_dense_lines, result_table
    from fips.record import scores

    if as_json:
        record = {"output": str(output), "tensor_bytes": done.tensor_bytes, "directory_bytes": done.file_bytes}
        print_json({**record, **done.report.to_dict()})
        return
    stdout.print(result_table(done.report))
    for line in (*left_dense_lines(done.report.plan), *done.report.notes):
        stdout.tell(line)
    if distilled := done.report.distillation():
        stdout.tell(f"distilled: {distilled}")
    if done.report.quality is not None:
        for score in scores(done.report.quality):
            stdout.tell(f"{score.name}: {score.line()}")
    before = done.report.plan["model"]["bytes"]
    peak = done.report.peak_memory_bytes
    stdout.tell(
        f"{format_bytes(before)} -> {format_bytes(done.tensor_bytes)} of tensors, {done.report.seconds:.0f} s, "
        f"peak memory {'not measured' if peak is None else format_bytes(peak)}"
    )
    if (output / PAGE).is_file():
        stdout.tell(f"report: {output / PAGE}")
    stdout.tell(f'written to {output}; load it with fips.load("{output}")')


def print_evaluation(name: str, result: Any) -> None:
    from rich.table import Table

    stdout.print(name, highlight=False, soft_wrap=True)
    table = Table("measure", "value")
    fields = result.to_dict()
    for key, value in {**fields, **(fields["against"] or {})}.items():
        if value is not None and not isinstance(value, dict | list):
            table.add_row(key, _number(value) if isinstance(value, float) else str(value))
    stdout.print(table)


def _number(value: float) -> str:
    """Four places, or three digits of a small number, as a KL may be."""
    return f"{value:.4f}" if abs(value) >= 0.1 else f"{value:.3g}"


def print_tasks(metrics: dict[str, dict[str, float]]) -> None:
    from rich.table import Table

    table = Table("task", "metric", "value")
    for task, values in metrics.items():
        for name, value in values.items():
            table.add_row(task, name, f"{value:.4f}")
    stdout.print(table)


def print_bench(result: dict[str, Any]) -> None:
    from rich.table import Column, Table

    from fips.app.tables import format_bytes

    names = list(result["peak_memory_bytes"])
    table = Table(Column("median ± half spread, ms", no_wrap=True), *names, "speedup", "per second")
    for name, case in result["cases"].items():
        sides = (
            f"{1e3 * case[side]['median_s']:.2f} ± "
            f"{500 * (case[side]['quartiles_s'][1] - case[side]['quartiles_s'][0]):.2f}"
            for side in names
        )
        table.add_row(
            name, *sides, ", ".join(f"{gain:.2f}" for gain in _gains(case)), f"{case['compressed']['per_second']:.0f}"
        )
    stdout.print(table)
    for words, sizes in (("file", result["file_bytes"]), ("peak memory", result["peak_memory_bytes"])):
        parts = (f"{format_bytes(sizes[side]) if sizes[side] else '-'} {side}" for side in names)
        stdout.tell(f"{words}: {', '.join(parts)}")
    for side, first in result["first_answer"].items():
        if first is not None:
            seconds = f"{first['load_s']:.1f} s to load, then {first['first_s']:.1f} s for the first {first['case']}"
            stdout.tell(f"{side}: {seconds}")
    runtime = result["runtime"]
    stdout.tell(
        f"packed layers: {format_bytes(runtime['stored_bytes'])} stored, {format_bytes(runtime['extra_bytes'])} beside "
        f"them at run time, {format_bytes(runtime['dense_bytes'])} as dense matrices"
    )
    slower = any(min(_gains(case)) < NO_FASTER for case in result["cases"].values())
    if slower and runtime["dense_bytes"] < CACHED_BYTES:
        stdout.tell(
            "slower than dense, as packed layers this small are: the processor's caches hold them either way, and "
            "calling one costs more; `fips merge` writes dense layers"
        )


def _gains(case: dict[str, Any]) -> list[float]:
    """Of one case over every other model."""
    found = case["speedup"]
    return list(found.values()) if isinstance(found, dict) else [found]
