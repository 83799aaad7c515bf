"""Images and texts as batches a model accepts, read through the ``datasets`` library.

``describe_source`` decides from names and a look at the disk what a source is; ``load_batches`` turns it into
``Batches``. Choices of samples are ``numpy.random.default_rng(seed).permutation(n)[:num_samples]``, so a smaller
number of samples is a subset of a larger one.

Shapes: B examples of a batch, W tokens of a window, N tokens of a document.
"""

from __future__ import annotations

import codecs
import glob
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fips.config import DataConfig
from fips.errors import DataError

__all__ = ["IGNORED_LABEL", "Batches", "Kind", "Purpose", "Source", "describe_source", "load_batches"]

Kind = Literal["image", "text"]
Purpose = Literal["calibration", "evaluation"]

IGNORED_LABEL = -100
"""Label of positions that are not scored, as in every loss of ``transformers``."""
MAX_SEQUENCE_LENGTH = 2048
DEFAULT_CALIBRATION_WINDOWS = 128
ROW_SEPARATOR = "\n\n"
"""Put between the rows of a text without `document_separator`, as is usual for WikiText-2 perplexities."""

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
TABLE_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
TEXT_SUFFIXES = frozenset(
    {".c", ".cpp", ".go", ".h", ".html", ".java", ".js", ".md", ".py", ".rs", ".rst", ".tex", ".text", ".ts", ".txt"}
)
SPLIT_NAMES = frozenset({"train", "training", "validation", "valid", "val", "dev", "test", "testing"})
WHOLE = "whole"
"""Name of the only split of a local source that is not divided into splits."""
PREFERRED_SPLITS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("image", "calibration"): ("train", "training"),
    ("text", "calibration"): ("train", "training"),
    ("image", "evaluation"): ("validation", "valid", "val", "dev", "test", "testing"),
    ("text", "evaluation"): ("test", "testing", "validation", "valid", "val", "dev"),
}
FILES_EXAMINED = 1000
SHUFFLE_BUFFER = 10_000
TEXTS_PER_CALL = 256

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a source is, known without reading its examples."""

    name: str
    """As the user wrote it."""
    kind: Kind | None
    """None when only the columns of the data tell."""
    builder: str
    """`imagefolder`, `text`, `parquet`, `json`, `csv`, or the id of a hub dataset."""
    configuration: str | None = None
    """Configuration of a hub dataset."""
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Glob patterns by split; empty: the dataset itself knows its splits."""
    streaming: bool = False
    """Read only as many rows as are needed."""


HUB_SHORTCUTS: Mapping[str, Source] = {
    "wikitext": Source(name="wikitext", kind="text", builder="Salesforce/wikitext", configuration="wikitext-2-raw-v1"),
    "c4": Source(
        name="c4",
        kind="text",
        builder="allenai/c4",
        files={
            "train": ("en/c4-train.00000-of-01024.json.gz",),
            "validation": ("en/c4-validation.00000-of-00008.json.gz",),
        },
        streaming=True,
    ),
    "imagenet-1k": Source(
        name="imagenet-1k",
        kind="image",
        builder="ILSVRC/imagenet-1k",
        files={"train": ("data/train-00000-of-*.parquet",), "validation": ("data/validation-*.parquet",)},
    ),
}
"""Well-known names; `files` keeps C4 and ImageNet from being downloaded whole (train: the first shard)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """Batches for ``model(**batch)``: sized, iterable any number of times, identical each time.

    Images: ``pixel_values`` and, where the data has them, ``labels`` (B,). Text: ``input_ids`` (B, W); for
    evaluation also ``labels`` (B, W), -100 where a position is context or padding and not scored, and
    ``attention_mask`` (B, W) in batches with padding (on the right). Images are read and decoded batch by batch.
    """

    kind: Kind
    description: dict[str, Any]
    """Where the examples come from and how they were chosen, ready for JSON."""
    num_samples: int
    """Images, or text windows."""
    num_bytes: int | None = None
    """Evaluation of text: UTF-8 bytes that the scored tokens stand for."""
    class_names: tuple[str, ...] | None = None
    """Images: names of the classes in the order of their labels, where the data tells."""
    max_label: int | None = None
    """Images: the largest label among the samples, None without labels."""
    chunks: Sequence[Sequence[int]] = field(repr=False)
    """Indices of the examples of every batch."""
    collate: Callable[[Sequence[int]], dict[str, Tensor]] = field(repr=False)
    """Makes one batch."""

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self.collate, self.chunks)


def load_batches(
    config: DataConfig, *, processor: Any, kind: Kind, purpose: Purpose, context_length: int | None = None
) -> Batches:
    """The examples ``config`` asks for, prepared by ``processor`` for a model that reads ``kind``.

    ``processor`` is the image processor or tokenizer of the model, ``context_length`` the most tokens the model
    accepts. Everything that can be refused without reading the data is refused first.

    Calibration: images in random order, by default all; full text windows of W tokens, by default 128.
    Evaluation: images in the order of the data; text windows that score every token exactly once, except the
    first of a document when the tokenizer has no beginning-of-sequence token.
    """
    source = describe_source(config.source)
    _check_request(source, config, processor=processor, kind=kind, purpose=purpose)
    length = _window_length(config, context_length) if kind == "text" else None
    rows, split = _load_rows(source, config, kind=kind, purpose=purpose)
    description: dict[str, Any] = {
        "source": config.source,
        "split": None if split == WHOLE else split,
        "purpose": purpose,
        "seed": config.seed,
        "batch_size": config.batch_size,
    }
    if length is None:
        return _image_batches(rows, config, processor, description)
    return _text_batches(rows, config, processor, length, description)


# What a source is


def describe_source(source: str) -> Source:
    """Decide what ``source`` is from its name and from the names of at most 1,000 files.

    In this order: an existing directory or file; something that looks like a path but does not exist (an error);
    a well-known name (`wikitext`, `c4`, `imagenet-1k`); a hub id, optionally `id:configuration`.
    """
    if not source.strip():
        raise DataError("`source` is empty; give an image folder, a text file or a `datasets` id")
    path = Path(source).expanduser()
    if path.is_dir():
        return _describe_directory(source, path)
    if path.is_file():
        return _describe_file(source, path)
    if _looks_like_path(source):
        raise DataError(
            f"`source={source}` looks like a path, but there is no such file or directory; "
            "correct the path, or give a hub id such as `wikitext` or `owner/name:configuration`"
        )
    if source in HUB_SHORTCUTS:
        return HUB_SHORTCUTS[source]
    builder, _, configuration = source.partition(":")
    return Source(name=source, kind=None, builder=builder, configuration=configuration or None)


def _looks_like_path(source: str) -> bool:
    name = source.partition(":")[0]
    has_suffix = re.fullmatch(r"\.[a-z][a-z0-9]{0,7}", Path(name).suffix.lower()) is not None
    return has_suffix or source.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in source


def _describe_file(source: str, path: Path) -> Source:
    builder = TABLE_BUILDERS.get(path.suffix.lower())
    files = {WHOLE: (glob.escape(str(path.resolve())),)}
    if builder is not None:
        return Source(name=source, kind=None, builder=builder, files=files)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise DataError(f"`source={source}` is a single image; give a folder with one sub-folder per class")
    _check_utf8(path)
    return Source(name=source, kind="text", builder="text", files=files)


def _check_utf8(path: Path) -> None:
    """The first 64 KiB; the rest is checked when the file is read."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        raise DataError(
            f"`source={path}` is not UTF-8 text (byte {error.start}); "
            f"wanted a text file, an image folder, or one of {', '.join(TABLE_BUILDERS)}"
        ) from None


def _describe_directory(source: str, path: Path) -> Source:
    """The most frequent type among the first files decides; files of other types are ignored."""
    types = Counter(_file_type(file) for file in itertools.islice(_walk(path), FILES_EXAMINED))
    del types[""]
    if not types:
        raise DataError(
            f"`source={source}` is a directory without images, texts or tables; wanted files such as .jpeg, .png, "
            f".txt, {', '.join(TABLE_BUILDERS)}, in class sub-folders for images"
        )
    builder = types.most_common(1)[0][0]
    if builder == "imagefolder":
        return Source(name=source, kind="image", builder=builder, files=_image_patterns(path))
    files = [file for file in _walk(path) if _file_type(file) == builder]
    kind: Kind | None = "text" if builder == "text" else None
    return Source(name=source, kind=kind, builder=builder, files=_group_by_split(path, files))


def _walk(root: Path) -> Iterator[Path]:
    """All visible files below ``root``, sorted, without reading them."""
    for directory, names, files in os.walk(root, followlinks=True):
        names[:] = sorted(name for name in names if not name.startswith((".", "__")))
        yield from (Path(directory, name) for name in sorted(files) if not name.startswith("."))


def _file_type(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "imagefolder"
    return "text" if suffix in TEXT_SUFFIXES else TABLE_BUILDERS.get(suffix, "")


def _image_patterns(root: Path) -> dict[str, tuple[str, ...]]:
    """Sub-folders are splits if all of them have names of splits, else they are classes."""
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    prefix = glob.escape(str(root.resolve()))
    if folders and all(name.lower() in SPLIT_NAMES for name in folders):
        return {name: (f"{prefix}/{name}/**",) for name in folders}
    return {WHOLE: (f"{prefix}/**",)}


def _group_by_split(root: Path, files: Iterable[Path]) -> dict[str, tuple[str, ...]]:
    """Files by the split that their top folder or name tells (`test/a.txt`, `train-00000.parquet`), if all tell one."""
    groups: dict[str, list[str]] = {}
    for file in files:
        parts = file.relative_to(root).parts
        words = [*parts[:-1][:1], *re.split(r"[-._ ]", Path(parts[-1]).stem)]
        split = next((word for word in words if word.lower() in SPLIT_NAMES), WHOLE)
        groups.setdefault(split, []).append(glob.escape(str(file.resolve())))
    if WHOLE in groups:
        return {WHOLE: tuple(itertools.chain.from_iterable(groups.values()))}
    return {split: tuple(names) for split, names in groups.items()}


# Checks and loading


def _check_request(source: Source, config: DataConfig, *, processor: Any, kind: Kind, purpose: Purpose) -> None:
    """Refuse what cannot work before any example is read."""
    if source.kind not in (None, kind):
        raise DataError(_wrong_kind(config, kind))
    if processor is None:
        what = "an image processor (preprocessor_config.json)" if kind == "image" else "a tokenizer (tokenizer.json)"
        raise DataError(f"`source={config.source}` needs {what} of the model, got none; save it next to the weights")
    if kind == "image":
        unused = [name for name in ("sequence_length", "document_separator") if getattr(config, name) is not None]
        if unused:
            raise DataError(f"`{'`, `'.join(unused)}` only applies to text, but the model reads images; remove it")
    if config.document_separator == "":
        raise DataError("`document_separator` is empty; leave it out to read the text as one stream")
    if source.streaming and purpose == "evaluation" and config.num_samples is None:
        raise DataError(f"`source={config.source}` is too large to evaluate whole; set `num_samples`, for example 256")


def _wrong_kind(config: DataConfig, kind: Kind) -> str:
    got, wanted = ("text", "images") if kind == "image" else ("images", "text")
    hint = (
        "a folder with one sub-folder per class" if kind == "image" else "a text file, or a hub id such as `wikitext`"
    )
    return f"`source={config.source}` holds {got}, but the model reads {wanted}; give {hint}"


def _window_length(config: DataConfig, context_length: int | None) -> int:
    if config.sequence_length is None:
        return min(context_length or MAX_SEQUENCE_LENGTH, MAX_SEQUENCE_LENGTH)
    if context_length is not None and config.sequence_length > context_length:
        raise DataError(
            f"`sequence_length={config.sequence_length}` is more than the {context_length} tokens the model accepts; "
            f"use at most {context_length}"
        )
    return config.sequence_length


def _load_rows(source: Source, config: DataConfig, *, kind: Kind, purpose: Purpose) -> tuple[Any, str]:
    """The rows of the chosen split, as a ``Dataset`` (``IterableDataset`` when streaming), and the split's name.

    Local images stay where they are: ``datasets`` writes an index of their paths to its own cache directory.
    Local text is neither copied nor cached; tables and hub data are converted once, in that cache.
    """
    available = list(source.files) if source.files else _inspect_hub(source, config, kind)
    split = _choose_split(available, config, kind=kind, purpose=purpose)
    if source.builder == "text":
        return _read_texts(source.files[split]), split
    arguments: dict[str, Any] = {"streaming": True} if source.streaming else {}
    if source.files:
        arguments["data_files"] = {split: list(source.files[split])}
    with _loading_errors(source.name, local=_is_local(source)), _progress_bars(shown=not _is_local(source)):
        rows = datasets.load_dataset(source.builder, source.configuration, split=split, **arguments)
    return rows, split


def _is_local(source: Source) -> bool:
    return source.builder in {"imagefolder", "text", *TABLE_BUILDERS.values()}


def _inspect_hub(source: Source, config: DataConfig, kind: Kind) -> list[str]:
    """Names of the splits of a hub dataset; refuses the wrong kind before the download where its card tells."""
    with _loading_errors(source.name, local=False):
        builder = datasets.load_dataset_builder(source.builder, source.configuration)
        splits = list(builder.info.splits or builder.config.data_files or ())
        if not splits:
            splits = list(datasets.get_dataset_split_names(source.builder, source.configuration))
    if builder.info.features is not None:
        _find_column(builder.info.features, config, kind)
    return [str(name) for name in splits]


def _choose_split(available: Sequence[str], config: DataConfig, *, kind: Kind, purpose: Purpose) -> str:
    if list(available) == [WHOLE]:
        if config.split is not None:
            raise DataError(
                f"`source={config.source}` is not divided into splits, got `split={config.split}`; leave it out"
            )
        return WHOLE
    names = ", ".join(f"`{name}`" for name in available)
    if config.split is not None:
        if config.split not in available:
            raise DataError(f"`source={config.source}` has no split `{config.split}`; it has {names}")
        return config.split
    found = {name.lower(): name for name in available}
    for name in PREFERRED_SPLITS[kind, purpose]:
        if name in found:
            return found[name]
    raise DataError(f"`source={config.source}` has no usual split for {purpose}; set `split` to one of {names}")


def _read_texts(patterns: Sequence[str]) -> Any:
    """One row per file, newlines exactly as in the file (the `text` builder of ``datasets`` would change CRLF)."""
    texts = []
    for name in sorted(itertools.chain.from_iterable(glob.glob(pattern) for pattern in patterns)):
        try:
            with open(name, encoding="utf-8", newline="") as file:
                texts.append(file.read())
        except UnicodeDecodeError as error:
            raise DataError(f"`{name}` is not UTF-8 text (byte {error.start}); convert or remove it") from None
    return datasets.Dataset.from_dict({"text": texts})


@contextmanager
def _loading_errors(source: str, *, local: bool) -> Iterator[None]:
    """Turn whatever ``datasets`` and the hub client raise while loading into one line with the next step."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if local:
            hint = "check that the files are complete and of the type their suffix says"
        else:
            hint = "check the id (`owner/name:configuration`), the network and the login, or give a local path"
        raise DataError(f"`source={source}` cannot be loaded: {_first_line(error)}; {hint}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    detail = f" ({_first_line(cause)})" if isinstance(cause, Exception) else ""
    return (lines[0].rstrip(".:;") if lines else type(error).__name__) + detail


@contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    """Hide the bars of ``datasets`` while indexing local files; downloads keep them."""
    disabled_before = datasets.are_progress_bars_disabled()
    if not shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled_before:
            datasets.enable_progress_bars()


def _find_column(features: Any, config: DataConfig, kind: Kind) -> str:
    """The column with the images or texts: the one asked for, `text` or `image`, else the only one of that type."""
    columns = ", ".join(f"`{name}` ({getattr(it, 'dtype', type(it).__name__)})" for name, it in features.items())
    candidates: list[str] = [name for name, feature in features.items() if _holds(feature, kind)]
    other: Kind = "text" if kind == "image" else "image"
    has_other = any(_holds(feature, other) for feature in features.values())
    if config.column is not None:
        if config.column not in candidates:
            raise DataError(
                f"`column={config.column}` is no {kind} column of `source={config.source}`; its columns: {columns}"
            )
        return config.column
    if kind in candidates:
        return kind
    if has_other and (kind == "text" or not candidates):
        raise DataError(_wrong_kind(config, kind))
    if len(candidates) != 1:
        what = f"several {kind} columns, set `column`" if candidates else f"no {kind} column"
        raise DataError(f"`source={config.source}` has {what}; its columns: {columns}")
    return candidates[0]


def _holds(feature: Any, kind: Kind) -> bool:
    if kind == "image":
        return isinstance(feature, datasets.Image)
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _choose(available: int, config: DataConfig, *, default: int | None = None) -> np.ndarray:
    """Indices of the samples in random order: the first of a seeded permutation, all of it without a limit."""
    wanted = config.num_samples if config.num_samples is not None else min(default or available, available)
    if wanted > available:
        raise DataError(
            f"`num_samples={wanted}` is more than the {available} samples of `source={config.source}`; "
            f"use at most {available}, or leave it out"
        )
    return np.random.default_rng(config.seed).permutation(available)[:wanted]


def _chunks(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


# Images


def _image_batches(rows: Any, config: DataConfig, processor: Any, description: dict[str, Any]) -> Batches:
    column = _find_column(rows.features, config, "image")
    label_column = _find_label_column(rows.features)
    kept = rows.select_columns([column] if label_column is None else [column, label_column])
    indices = _choose(len(kept), config)
    scored = description["purpose"] == "evaluation"
    if scored:
        indices.sort()  # neighbors on disk are read together
    kept = kept.select(indices).cast_column(column, datasets.Image(mode="RGB"))
    labels, names = _labels(kept, label_column, required_by=config.source if scored else None)
    collate = partial(_collate_images, kept, column, processor, labels)
    probe = collate([0])["pixel_values"]
    return Batches(
        kind="image",
        description={
            **description,
            "num_samples": len(kept),
            "size": list(probe.shape[1:]),
            "processor": type(processor).__name__,
            "num_classes": None if names is None else len(names),
        },
        num_samples=len(kept),
        class_names=names,
        max_label=None if labels is None else int(labels.max()),
        chunks=_chunks(range(len(kept)), config.batch_size),
        collate=collate,
    )


def _find_label_column(features: Any) -> str | None:
    """`label` or `labels` if there is one with classes or integers, else the only column with classes."""
    classes: list[str] = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    for name in ("label", "labels"):
        feature = features.get(name)
        if name in classes or (isinstance(feature, datasets.Value) and "int" in feature.dtype):
            return name
    return classes[0] if len(classes) == 1 else None


def _labels(rows: Any, column: str | None, *, required_by: str | None) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Labels (N,) as int64 and the names of the classes; both None unless every image is labeled."""
    if column is None:
        return None, None
    values = rows[column][:]
    if any(value is None or value < 0 for value in values):
        if required_by is None:
            return None, None
        raise DataError(
            f"`source={required_by}` has images without a label (missing or negative) in column `{column}`; "
            "use a labeled split, for example `split: validation`"
        )
    feature = rows.features[column]
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return torch.tensor(values, dtype=torch.int64), names


def _collate_images(
    rows: Any, column: str, processor: Any, labels_N: Tensor | None, indices: Sequence[int]
) -> dict[str, Tensor]:
    images = [_decode(rows, column, index) for index in indices]
    batch: dict[str, Tensor] = {"pixel_values": processor(images=images, return_tensors="pt")["pixel_values"]}
    if labels_N is not None:
        batch["labels"] = labels_N[list(indices)]
    return batch


def _decode(rows: Any, column: str, index: int) -> Any:
    """One RGB image, turned upright; the error for a file that no decoder accepts names it."""
    try:
        return rows[index][column]
    except Exception as error:
        encoded = rows.cast_column(column, datasets.Image(decode=False))[index][column]
        raise DataError(
            f"image `{encoded['path'] or f'row {index}'}` cannot be decoded: {_first_line(error)}; replace or remove it"
        ) from error


# Text


@dataclass(frozen=True, slots=True)
class _Document:
    """Tokens (N,) of one text, and the UTF-8 bytes each of them stands for (N,)."""

    tokens: Tensor
    num_bytes: np.ndarray


@dataclass(frozen=True, slots=True)
class _Window:
    """Input tokens (W,), the first of which is context when scoring, and the bytes the others stand for."""

    tokens: Tensor
    num_bytes: int


def _text_batches(rows: Any, config: DataConfig, tokenizer: Any, length: int, description: dict[str, Any]) -> Batches:
    scored = description["purpose"] == "evaluation"
    limit = config.num_samples or (None if scored else DEFAULT_CALIBRATION_WINDOWS)
    streamed = isinstance(rows, datasets.IterableDataset)
    separate = streamed or config.document_separator is not None
    texts = _documents(_texts(rows, config), config.document_separator) if separate else _texts(rows, config)
    parts = texts if separate else iter([ROW_SEPARATOR.join(texts)])
    documents = _tokenize(parts, tokenizer, count_bytes=scored, enough=length * limit if streamed and limit else None)
    bos = _bos_token(tokenizer)
    windows = _scored_windows(documents, length, bos) if scored else _full_windows(documents, length, bos)
    num_tokens = sum(len(document.tokens) for document in documents)
    if not windows:
        raise DataError(
            f"`source={config.source}` has {num_tokens} tokens of text, a window needs {2 if scored else length}; "
            "give more text" + ("" if scored else " or lower `sequence_length`")
        )
    chosen = _choose(len(windows), config, default=limit)
    description |= {
        "sequence_length": length,
        "document_separator": config.document_separator,
        "row_separator": None if separate else ROW_SEPARATOR,
        "num_documents": len(documents),
        "num_tokens": num_tokens,
        "bos_token": bos,
    }
    return _window_batches([windows[index] for index in chosen], config, tokenizer, description)


def _texts(rows: Any, config: DataConfig) -> Iterator[str]:
    """The text of every row; a stream is shuffled within a buffer of 10,000 rows."""
    with _loading_errors(config.source, local=False):
        features = rows.features
        if isinstance(rows, datasets.IterableDataset):
            features = features or datasets.Dataset.from_list(list(rows.take(1))).features
            rows = rows.shuffle(seed=config.seed, buffer_size=SHUFFLE_BUFFER)
        column = _find_column(features, config, "text")
        for row in rows.select_columns([column]):
            yield row[column] or ""


def _documents(texts: Iterable[str], separator: str | None) -> Iterator[str]:
    """The parts between separators, without surrounding whitespace, without empty ones."""
    for text in texts:
        for part in [text] if separator is None else text.split(separator):
            if document := part.strip():
                yield document


def _bos_token(tokenizer: Any) -> int | None:
    """The beginning-of-sequence token, if the tokenizer puts it before every text by itself."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos] else None


def _tokenize(texts: Iterable[str], tokenizer: Any, *, count_bytes: bool, enough: int | None) -> list[_Document]:
    """Every text on its own, without special tokens; stops reading at ``enough`` tokens."""
    offsets = count_bytes and tokenizer.is_fast
    if count_bytes and not offsets:
        log.warning("%s has no character offsets: bytes are spread evenly over tokens", type(tokenizer).__name__)
    documents, total, texts = [], 0, iter(texts)
    while batch := list(itertools.islice(texts, TEXTS_PER_CALL)):
        encoded = tokenizer(
            batch, add_special_tokens=False, return_offsets_mapping=offsets, verbose=False
        )  # verbose=False: texts longer than the model's context are cut into windows here
        for index, (text, tokens) in enumerate(zip(batch, encoded["input_ids"], strict=True)):
            num_bytes_N = _bytes_per_token(text, len(tokens), encoded["offset_mapping"][index] if offsets else None)
            documents.append(_Document(torch.tensor(tokens, dtype=torch.int64), num_bytes_N))
            total += len(tokens)
        if enough is not None and total >= enough:
            break
    return [document for document in documents if len(document.tokens)]


def _bytes_per_token(text: str, num_tokens: int, offsets: Sequence[tuple[int, int]] | None) -> np.ndarray:
    """UTF-8 bytes from the end of the token before to the end of each token (N,); their sum is the whole text.

    ``offsets`` are the character spans of the tokens. A character that is spread over several tokens counts for
    the first of them. Without offsets every token counts the same, up to rounding.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    ends_bytes = np.concatenate([[0], np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF))])
    if offsets is None or num_tokens == 0:
        return np.diff(np.linspace(0, ends_bytes[-1], num_tokens + 1).astype(np.int64))
    ends = np.maximum.accumulate(np.array([end for _, end in offsets]))
    ends[-1] = len(text)
    return np.diff(ends_bytes[ends], prepend=0)


def _scored_windows(documents: Iterable[_Document], length: int, bos: int | None) -> list[_Window]:
    """Windows of one token of context and up to W - 1 scored tokens, which together cover every document once.

    The context is the beginning-of-sequence token, or without one the token before, so that only the first token
    of a document is never scored.
    """
    windows = []
    for document in documents:
        tokens_N = document.tokens
        for start in range(0 if bos is not None else 1, len(tokens_N), length - 1):
            stop = start + length - 1
            context = tokens_N[start - 1 : start] if bos is None else torch.tensor([bos])
            num_bytes = int(document.num_bytes[start:stop].sum())
            windows.append(_Window(torch.cat([context, tokens_N[start:stop]]), num_bytes))
    return windows


def _full_windows(documents: Iterable[_Document], length: int, bos: int | None) -> list[_Window]:
    """Consecutive windows of exactly W tokens; documents follow each other.

    The beginning-of-sequence token, if there is one, opens every window and every document. Tokens that do not
    fill the last window are left out.
    """
    windows: list[_Window] = []
    parts: list[Tensor] = []
    room = length
    for document in documents:
        start = 0
        while start < len(document.tokens):
            if bos is not None and (start == 0 or not parts):
                parts.append(torch.tensor([bos]))
                room -= 1
            parts.append(document.tokens[start : start + room])
            start += len(parts[-1])
            room -= len(parts[-1])
            if room == 0:
                windows.append(_Window(torch.cat(parts), 0))
                parts, room = [], length
    return windows


def _window_batches(windows: list[_Window], config: DataConfig, tokenizer: Any, description: dict[str, Any]) -> Batches:
    """Batches in the order of the windows for calibration, longest first for evaluation (little padding)."""
    scored = description["purpose"] == "evaluation"
    description = {**description, "num_samples": len(windows)}
    if scored:
        windows = sorted(windows, key=lambda window: -len(window.tokens))
        description |= {
            "num_scored_tokens": sum(len(window.tokens) - 1 for window in windows),
            "num_bytes": sum(window.num_bytes for window in windows),
            "num_unknown_tokens": _count_unknown(windows, tokenizer),
        }
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Batches(
        kind="text",
        description=description,
        num_samples=len(windows),
        num_bytes=description.get("num_bytes"),
        chunks=_chunks(range(len(windows)), config.batch_size),
        collate=partial(_collate_windows, windows, padding, scored),
    )


def _count_unknown(windows: Iterable[_Window], tokenizer: Any) -> int:
    """Scored tokens that stand for text outside the vocabulary, which makes bits per byte look too small."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return 0
    count = sum(int((window.tokens[1:] == unknown).sum()) for window in windows)
    if count:
        log.warning(
            "%d scored tokens are unknown to the tokenizer; bits per byte is too small by what they hide", count
        )
    return count


def _collate_windows(
    windows: Sequence[_Window], padding: int, scored: bool, indices: Sequence[int]
) -> dict[str, Tensor]:
    tokens = [windows[index].tokens for index in indices]
    lengths_B1 = torch.tensor([[len(window)] for window in tokens])
    input_ids_BW = pad_sequence(tokens, batch_first=True, padding_value=padding)
    batch = {"input_ids": input_ids_BW}
    if not scored:
        return batch
    mask_BW = torch.arange(input_ids_BW.shape[1]) < lengths_B1
    batch["labels"] = input_ids_BW.masked_fill(~mask_BW, IGNORED_LABEL)
    batch["labels"][:, 0] = IGNORED_LABEL
    if not mask_BW.all():
        batch["attention_mask"] = mask_BW.long()
    return batch
