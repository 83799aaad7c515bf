"""Rows of a source through the ``datasets`` library: which split, which column, errors in one line."""

from __future__ import annotations

import glob
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from fips.config import DataConfig
from fips.data.batches import Kind, Purpose
from fips.data.source import HUB_SHORTCUTS, TABLE_BUILDERS, WHOLE, Source
from fips.errors import DataError
from fips.files.hub import hub_where_reached

__all__ = [
    "LABELS",
    "class_column",
    "columns_in_words",
    "features_of",
    "find_column",
    "find_columns",
    "first_line",
    "load_rows",
    "loading_errors",
    "streams",
    "taken",
    "text_columns",
    "wrong_kind",
]

log = logging.getLogger("fips.data")

LABELS = ("label", "labels")
"""Columns that classes are looked for in."""

PREFERRED_SPLITS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("image", "calibration"): ("train", "training"),
    ("text", "calibration"): ("train", "training"),
    ("image", "evaluation"): ("validation", "valid", "val", "dev", "test", "testing"),
    ("text", "evaluation"): ("test", "testing", "validation", "valid", "val", "dev"),
}


def load_rows(source: Source, config: DataConfig, *, kind: Kind, purpose: Purpose) -> tuple[Any, str]:
    """The rows of the chosen split, as a ``Dataset`` (``IterableDataset`` when streaming), and the split's name.

    Local images stay where they are: ``datasets`` writes an index of their paths to its own cache directory.
    Local text is neither copied nor cached; tables and hub data are converted once, in that cache.
    """
    available = list(source.files) if source.files else _inspect_hub(source, config, kind)
    split = choose_split(available, config, kind=kind, purpose=purpose)
    if source.builder == "text":
        return _read_texts(source.files[split]), split
    arguments: dict[str, Any] = {"streaming": True} if streams(source, config, purpose) else {}
    if source.files:
        arguments["data_files"] = {split: list(source.files[split])}
        if source.builder in TABLE_BUILDERS.values():
            _require_rows(source.name, source.files[split])
    with loading_errors(source.name, local=is_local(source)), progress_bars(shown=not is_local(source)):
        rows = datasets.load_dataset(source.builder, source.configuration, split=split, **arguments)
    return rows, split


def _require_rows(name: str, patterns: Sequence[str]) -> None:
    """Raise ``DataError`` for tables without a row, which ``datasets`` refuses with errors of its parsers."""
    files = _matching(patterns)
    if files and all(_is_empty(file) for file in files):
        raise DataError(f"`{name}` has no rows: `{files[0]}` is empty; give data with at least one")


def _is_empty(path: str) -> bool:
    """Whether a table has no row: a header at most."""
    if os.path.getsize(path) == 0:
        return True
    if path.endswith(".parquet"):
        with suppress(pa.ArrowInvalid):  # what is damaged is for `datasets` to say
            return bool(pq.read_metadata(path).num_rows == 0)
    if path.endswith((".csv", ".tsv")):
        with open(path, "rb") as file:
            return len(list(itertools.islice(filter(bytes.strip, file), 2))) < 2
    return False


def streams(source: Source, config: DataConfig, purpose: Purpose) -> bool:
    """Whether rows are read only as far as they are needed; raises ``DataError`` for what cannot be read so."""
    if config.stream and source.builder in ("text", "imagefolder"):
        raise DataError(
            f"`{source.name}` is read where it lies; `stream` is for tables and `datasets` ids: leave it out"
        )
    if config.stream is not None:
        return config.stream
    hub = not is_local(source) and not source.files and source.name not in HUB_SHORTCUTS
    return source.streaming or (hub and purpose == "calibration")


def taken(rows: Any, config: DataConfig, count: int, *, buffer: int) -> Any:
    """The first rows of a shuffled stream as a table; pictures stay encoded."""
    features = features_of(rows)
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    plain = datasets.Features({**features, **{name: datasets.Image(decode=False) for name in pictures}})
    with loading_errors(config.source, local=False):
        rows = rows.cast(plain) if pictures else rows
        found = list(rows.shuffle(seed=config.seed, buffer_size=buffer).take(count))
    if config.num_samples is not None and len(found) < config.num_samples:
        raise DataError(
            f"`num_samples={config.num_samples}` is more than the {len(found)} rows of `{config.source}`; use "
            f"at most {len(found)}, or leave it out"
        )
    return datasets.Dataset.from_list(found, features=plain).cast(features)


def is_local(source: Source) -> bool:
    return source.builder in {"imagefolder", "text", *TABLE_BUILDERS.values()}


def _inspect_hub(source: Source, config: DataConfig, kind: Kind) -> list[str]:
    """Names of the splits of a hub dataset; refuses the wrong kind before the download where its card tells."""
    if source.name not in HUB_SHORTCUTS:
        log.info("there is no file or directory `%s`: looking for a dataset of this name on the hub", source.name)
    with loading_errors(source.name, local=False):
        builder = datasets.load_dataset_builder(source.builder, source.configuration)
        splits = list(builder.info.splits or builder.config.data_files or ())
        if not splits:
            splits = list(datasets.get_dataset_split_names(source.builder, source.configuration))
    features = builder.info.features
    if features is not None and (kind == "image" or not any(map(_holds_words, features.values()))):
        find_column(features, config, kind)  # raises where there is nothing to read
    return [str(name) for name in splits]


def choose_split(available: Sequence[str], config: DataConfig, *, kind: Kind, purpose: Purpose) -> str:
    if list(available) == [WHOLE]:
        if config.split is not None:
            raise DataError(f"`{config.source}` is not divided into splits, got `split={config.split}`; leave it out")
        return WHOLE
    names = ", ".join(f"`{name}`" for name in available)
    if config.split is not None:
        if config.split not in available:
            raise DataError(f"`{config.source}` has no split `{config.split}`; it has {names}")
        return config.split
    found = {name.lower(): name for name in available}
    for name in PREFERRED_SPLITS[kind, purpose]:
        if name in found:
            return found[name]
    raise DataError(f"`{config.source}` has no usual split for {purpose}; set `split` to one of {names}")


def _matching(patterns: Sequence[str]) -> list[str]:
    return sorted(itertools.chain.from_iterable(glob.glob(pattern) for pattern in patterns))


def _read_texts(patterns: Sequence[str]) -> Any:
    """One row per file, newlines exactly as in the file (the `text` builder of ``datasets`` would change CRLF)."""
    texts = []
    for name in _matching(patterns):
        try:
            with open(name, encoding="utf-8", newline="") as file:
                texts.append(file.read())
        except UnicodeDecodeError as error:
            raise DataError(f"`{name}` is not UTF-8 text (byte {error.start}); convert or remove it") from None
    return datasets.Dataset.from_dict({"text": texts})


@contextmanager
def loading_errors(source: str, *, local: bool) -> Iterator[None]:
    """Turn whatever ``datasets`` and the hub client raise while loading into one line with the next step."""
    try:
        with nullcontext() if local else hub_where_reached():
            yield
    except DataError:
        raise
    except Exception as error:
        if local:
            hint = "check that the files are complete and of the type their suffix says" + _linked(source)
        else:
            hint = "no file or directory has this name: check it, or the id, network and login"
        raise DataError(f"`{source}` cannot be loaded: {first_line(error)}; {hint}") from error


def _linked(source: str) -> str:
    """What to know of folders inside a folder that are links."""
    links: list[str] = []
    with suppress(OSError):  # no folder
        links = [entry.name for entry in os.scandir(source) if entry.is_symlink() and entry.is_dir()]
    return f", and give copies in place of links such as `{min(links)}`, which are not followed" if links else ""


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    detail = f" ({first_line(cause)})" if isinstance(cause, Exception) else ""
    return (lines[0].rstrip(".:;") if lines else type(error).__name__) + detail


@contextmanager
def progress_bars(*, shown: bool) -> Iterator[None]:
    """Hide the bars of ``datasets`` while indexing local files; downloads keep them."""
    disabled_before = datasets.are_progress_bars_disabled()
    if not shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled_before:
            datasets.enable_progress_bars()


def find_column(features: Any, config: DataConfig, kind: Kind) -> str:
    """The column with the images or texts: the one asked for, `text` or `image`, else the only one of that type."""
    columns = columns_in_words(features)
    candidates: list[str] = [name for name, feature in features.items() if _holds(feature, kind)]
    other: Kind = "text" if kind == "image" else "image"
    has_other = any(_holds(feature, other) for feature in features.values())
    if config.column is not None:
        if config.column not in candidates:
            raise DataError(
                f"`column={config.column}` is no {kind} column of `{config.source}`; its columns: {columns}"
            )
        return config.column
    if kind in candidates:
        return kind
    if has_other and (kind == "text" or not candidates):
        raise DataError(wrong_kind(config, kind))
    if len(candidates) != 1:
        what = f"several {kind} columns, set `column`" if candidates else f"no {kind} column"
        lists = kind == "text" and not candidates and any(not hasattr(it, "dtype") for it in features.values())
        advice = (
            "; chats (lists of messages) are read with `--chat`, other lists have to be written as one string"
            if lists
            else ""
        )
        raise DataError(f"`{config.source}` has {what}; its columns: {columns}{advice}")
    return candidates[0]


def find_columns(features: Any, config: DataConfig, kind: Kind, *, without: str | None = None) -> list[str]:
    """One column, found as ``find_column`` does, or those that ``column`` names with commas between them."""
    if without is not None and without != config.column:
        features = {name: feature for name, feature in features.items() if name != without}
    if config.column is None or config.column in features or "," not in config.column:
        return [find_column(features, config, kind)]
    return [find_column(features, config.replace(column=name.strip()), kind) for name in config.column.split(",")]


def columns_in_words(features: Any) -> str:
    return ", ".join(f"`{name}` ({getattr(it, 'dtype', type(it).__name__)})" for name, it in features.items())


def text_columns(features: Any) -> list[str]:
    return [name for name, feature in features.items() if _holds(feature, "text")]


def features_of(rows: Any) -> Any:
    """Columns and their types; those of a stream may have to be read from its first row."""
    if rows.features is None:
        return datasets.Dataset.from_list(list(rows.take(1))).features
    return rows.features


def class_column(features: Any, *, named: bool = False) -> str | None:
    """`label` or `labels` if it holds classes or integers, or names if it may, else the only column with classes."""
    classes: list[str] = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    for name in LABELS:
        feature = features.get(name)
        numbers = isinstance(feature, datasets.Value) and "int" in feature.dtype
        if name in classes or numbers or (named and _holds(feature, "text")):
            return name
    return classes[0] if len(classes) == 1 else None


def _holds_words(feature: Any) -> bool:
    """Whether there is a text in it, such as the messages of a chat or one of two languages."""
    if isinstance(feature, Mapping):
        return any(map(_holds_words, feature.values()))
    if isinstance(feature, list):
        return any(map(_holds_words, feature))
    languages = getattr(feature, "languages", None)  # of a translation
    return _holds(feature, "text") or bool(languages) or _holds_words(getattr(feature, "feature", {}))


def _holds(feature: Any, kind: Kind) -> bool:
    if kind == "image":
        return isinstance(feature, datasets.Image)
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def wrong_kind(config: DataConfig, kind: Kind) -> str:
    got, wanted = ("text", "images") if kind == "image" else ("images", "text")
    hint = (
        "a folder with one sub-folder per class" if kind == "image" else "a text file, or a hub id such as `wikitext`"
    )
    return f"`{config.source}` holds {got}, but the model reads {wanted}; give {hint}"
