"""The report of a packed directory as one HTML file that needs nothing else: a function of what is known about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from fips.app.outline import PackedLayer, PackedOutline
from fips.app.tables import error_lines, format_bytes, left_dense_lines, natural, share_line
from fips.files.names import without_directories
from fips.plan.kinds import EMBEDDINGS, KindSize
from fips.record import CompressionReport, scores, size_asked_for

__all__ = ["GENERATOR", "PAGE", "Example", "Side", "report_page", "sides_of"]

PAGE = "fips_report.html"
"""Its name in a directory that ``fips compress`` writes; listed in the manifest as every file of the run is."""
GENERATOR = '<meta name="generator" content="fips report">'
"""In every page: how a file is known that may be written over."""
TEMPLATES = Path(__file__).parent / "templates"
MOST_COLUMNS = 8
"""Layers of a block beside each other; where a block has more, every layer has a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """What one of the two models says: what both say first, and where they part."""

    name: str
    same: str
    other: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One example that the models were shown."""

    caption: str
    sides: tuple[Side, ...]
    prompt: str | None = None
    picture: str | None = None
    """A ``data:`` address."""


def sides_of(texts: Mapping[str, str]) -> tuple[Side, ...]:
    """From what each model says, by name: what all begin with, and the rest."""
    columns = enumerate(zip(*texts.values(), strict=False))
    shortest = min(map(len, texts.values()))
    start = next((index for index, signs in columns if len(set(signs)) > 1), shortest)
    return tuple(Side(name=name, same=text[:start], other=text[start:]) for name, text in texts.items())


def report_page(
    packed: PackedOutline, *, name: str, quality: Mapping[str, Any] | None = None, examples: Sequence[Example] = ()
) -> str:
    """HTML of one file, without scripts and without anything from a network.

    ``name`` is that of the directory, ``quality`` an ``EvaluationResult.to_dict()``, by default the one in the record.
    Everything from files is escaped, and paths of a machine are cut down to their last parts.
    """
    if packed.report is not None:
        shown = without_directories({**packed.report.to_dict(), "evaluated": quality})
        quality = shown.pop("evaluated")
        packed = replace(packed, report=CompressionReport.from_dict(shown))
    else:
        quality = without_directories(quality)
    report = packed.report
    if report is not None:
        quality = quality or report.quality
        report.quality = None  # shown in a table of its own
    return _template().render(
        title=(None if report is None else report.source) or name,
        subtitle=_subtitle(report, name),
        tiles=_tiles(packed, quality),
        falls=list(_falls(packed.kinds)),
        share=share_line(packed.kinds).removeprefix("whole file: "),
        scores=scores(quality) if quality else [],
        scored_on=_scored_on(quality) if quality else "",
        examples=examples,
        marked=any(side.other for example in examples for side in example.sides),
        layers=_layers(packed),
        facts=[row for row in report.rows() if row[0] != "note"] if report else [],
        notes=_notes(report) if report else [],
        phases=_phases(report) if report else [],
        lists=_lists(report) if report else [],
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("report.html.jinja")


def _subtitle(report: CompressionReport | None, name: str) -> str:
    if report is None:
        return f"{name}, a model packed by fips"
    parts = [f"compressed into {name}", *([] if report.created is None else [f"on {report.created[:10]}"])]
    version = report.environment.get("fips")
    parts.append(f"by fips {version}" if version else "by fips")
    return f"{' '.join(parts)}; asked for: {size_asked_for(report)}"


def _tiles(packed: PackedOutline, quality: Mapping[str, Any] | None) -> list[dict[str, str]]:
    before, after = (sum(getattr(kind, side) for kind in packed.kinds) for side in ("bytes_before", "bytes_after"))
    weights = sum(layer.inputs * layer.outputs for layer in packed.layers)
    bits = sum(layer.bits * layer.inputs * layer.outputs for layer in packed.layers) / weights
    tiles = [
        {"value": f"{format_bytes(before)} → {format_bytes(after)}", "name": "the whole file"},
        {"value": f"{before / after:.2f}x smaller", "name": f"{after / before:.1%} of what it was"},
        {"value": f"{bits:.2f} bits", "name": f"per weight of {len(packed.layers)} compressed layers"},
    ]
    if quality:
        first = scores(quality)[0]
        value = first.after if first.before is None else f"{first.before} → {first.after}"
        tiles.append({"value": value, "name": first.name})
    else:
        tiles.append({"value": "not evaluated", "name": "quality"})
    return tiles


def _falls(kinds: Sequence[KindSize]) -> Iterator[dict[str, Any]]:
    """The rows of a waterfall: before, what every kind of layer loses, after."""
    sizes = _sizes(kinds)
    total = sum(before for before, _ in sizes.values())
    yield _stack("before", {key: before for (key, _), (before, _) in sizes.items()}, total)
    level = float(total)
    for (key, name), (before, after) in sizes.items():
        low, high = sorted((level, level - before + after))
        kind = "saved" if after <= before else "grown"
        words = format_bytes(before)
        if round(after) != before:
            words += f" → {format_bytes(after)}"
        yield {"name": name, "key": key, "words": words, "parts": [_part(kind, low, high - low, total)]}
        level -= before - after
    yield _stack("after", {key: after for (key, _), (_, after) in sizes.items()}, total)


def _sizes(kinds: Sequence[KindSize]) -> dict[tuple[str, str], tuple[int, float]]:
    """Bytes before and after of MLPs, attention, embeddings and the rest, by style and name."""
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for kind in kinds:
        first = kind.kind.partition(" ")[0]
        place = {"MLP": ("mlp", "MLP"), "attention": ("attention", "attention")}.get(first)
        place = place or (("embeddings", kind.kind) if kind.kind == EMBEDDINGS else ("rest", kind.kind))
        before, after = found.get(place, (0, 0.0))
        found[place] = (before + kind.bytes_before, after + kind.bytes_after)
    return found


def _stack(name: str, sizes: Mapping[str, float], total: float) -> dict[str, Any]:
    parts, level = [], 0.0
    for key, size in sizes.items():
        parts.append(_part(key, level, size, total))
        level += size
    return {"name": name, "key": None, "words": format_bytes(level), "parts": parts}


def _part(kind: str, left: float, width: float, total: float) -> dict[str, str]:
    return {"kind": kind, "left": _percent(left, total), "width": _percent(width, total)}


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole if whole else 0:.2f}"


def _scored_on(quality: Mapping[str, Any]) -> str:
    return f"On {quality.get('scored_on', 'examples')}, of {quality['data'].get('source', 'data in memory')}."


def _layers(packed: PackedOutline) -> dict[str, Any]:
    """Blocks as rows and their layers as columns, or a row for every layer where blocks have many."""
    layers = sorted(packed.layers, key=lambda layer: natural(layer.name))
    places = {layer.name: _place(layer.name, packed.block_errors) for layer in layers}
    blocks = {name: block for name, (block, _) in places.items()}
    columns = list(dict.fromkeys(rest for _, rest in places.values()))
    row_for_each = len(columns) > MOST_COLUMNS
    if row_for_each:
        places = {name: (name, "stored as") for name in places}
        columns = ["stored as"]
    most_bits = max(1, -int(-max(layer.bits for layer in layers) // 1))  # rounded up
    most_error = max(packed.block_errors.values(), default=0.0)
    rows: dict[str, dict[str, PackedLayer]] = {}
    for layer in layers:
        block, rest = places[layer.name]
        rows.setdefault(block, {})[rest] = layer
    shapes = {rest: _one_shape([cells[rest] for cells in rows.values() if rest in cells]) for rest in columns}
    of_rows = {row: blocks[next(iter(cells.values())).name] for row, cells in rows.items()}
    first = {block: row for row, block in reversed(of_rows.items())}
    errors = {row: packed.block_errors.get(block) for block, row in first.items()}
    return {
        "head": "layer" if row_for_each else "block",
        "head_width": min(16, 2 + max(map(len, rows)) // 2),
        "columns": [{"parts": rest.split("."), "shape": shapes[rest]} for rest in columns],
        "with_errors": any(error is not None for error in errors.values()),
        "most_bits": most_bits,
        "legend": error_lines(packed),
        "rows": [
            {
                "name": row,
                "cells": [_cell(cells[rest], most_bits, shapes[rest]) if rest in cells else None for rest in columns],
                "error": None if (error := errors.get(row)) is None else f"{error:.3g}",
                "error_width": _percent(error or 0.0, most_error),
            }
            for row, cells in rows.items()
        ],
    }


def _place(name: str, blocks: Mapping[str, float]) -> tuple[str, str]:
    """The block of a layer and its name in there; without a record the block is what the last number of it names."""
    known = next((block for block in blocks if name.startswith(f"{block}.")), None)
    if known is not None:
        return known, name.removeprefix(f"{known}.")
    parts = name.split(".")
    last = max((index for index, part in enumerate(parts[:-1]) if part.isdigit()), default=-1)
    return (".".join(parts[: last + 1]), ".".join(parts[last + 1 :])) if last >= 0 else (name, "layer")


def _one_shape(layers: Sequence[PackedLayer]) -> str | None:
    """The shape of layers that all have the same."""
    shapes = {_shape(layer) for layer in layers}
    return shapes.pop() if len(shapes) == 1 else None


def _shape(layer: PackedLayer) -> str:
    return f"{layer.inputs}x{layer.outputs}"


def _cell(layer: PackedLayer, most_bits: float, said: str | None) -> dict[str, Any]:
    """What a layer is, with its shape unless the head of its column has ``said`` it."""
    shape = "" if said else f", {_shape(layer)}"
    pattern = "" if layer.pattern == "full" else f", {layer.pattern}"
    basis = f", rank {layer.rank}" if layer.rank else ""
    return {
        "bits": f"{layer.bits:.2f}",
        "width": _percent(layer.bits, most_bits),
        "kind": "attention" if any(word in layer.name.lower() for word in ("attn", "attention")) else "mlp",
        "stored": f"{layer.values}{pattern}{basis}{shape}",
        "held_out": None if layer.held_out is None else f"{layer.held_out:.3f}",
    }


def _notes(report: CompressionReport) -> list[list[tuple[str, bool]]]:
    """Every note in parts, each with whether it is code: what stood between backticks."""
    told = report.notes
    skipped = [
        f"skipped `{item['name']}`: {item['reason']}"
        for item in report.plan["skipped"]
        if not any(item["name"] in note and item["reason"] in note for note in told)
    ]
    notes = [*told, *left_dense_lines(report.plan), *skipped]
    return [[(part, bool(index % 2)) for index, part in enumerate(note.split("`"))] for note in notes]


def _phases(report: CompressionReport) -> list[dict[str, str]]:
    """Seconds of the stages, and what is left of the whole."""
    rows = sorted(report.phases.items(), key=lambda row: -row[1])
    rest = report.seconds - sum(report.phases.values())
    if rows and rest > 0:
        rows.append(("all else", rest))
    return [
        {"name": name, "width": _percent(seconds, report.seconds), "words": f"{seconds:.1f} s"}
        for name, seconds in rows
    ]


def _lists(report: CompressionReport) -> list[tuple[str, list[tuple[str, str]]]]:
    lists = [
        ("Data", _flat(report.data)),
        ("Machine and versions", _flat(report.environment)),
        ("Settings", _flat(report.config.model_dump(mode="json"))),
    ]
    return [(heading, rows) for heading, rows in lists if rows]


def _flat(fields: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values of everything that is set."""
    rows = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif value is not None and value != []:
            rows.append((f"{prefix}{name}", ", ".join(map(_word, value)) if isinstance(value, list) else _word(value)))
    return rows


def _word(value: Any) -> str:
    """A value as text; one that would not be seen, such as a line break, as Python writes it."""
    return repr(value) if isinstance(value, str) and value.strip() != value else str(value)
