"""What a data source is, decided from names and a look at the disk, before any example is read."""

from __future__ import annotations

import codecs
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fips.data.batches import Kind
from fips.errors import DataError

__all__ = ["HUB_SHORTCUTS", "TABLE_BUILDERS", "WHOLE", "Source", "describe_source"]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
TABLE_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
TEXT_SUFFIXES = frozenset(
    {".c", ".cpp", ".go", ".h", ".html", ".java", ".js", ".md", ".py", ".rs", ".rst", ".tex", ".text", ".ts", ".txt"}
)
SPLIT_NAMES = frozenset({"train", "training", "validation", "valid", "val", "dev", "test", "testing"})
WHOLE = "whole"
"""Name of the only split of a local source that is not divided into splits."""
FILES_EXAMINED = 1000


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


def describe_source(source: str) -> Source:
    """Decide what ``source`` is from its name and from the names of at most 1,000 files.

    In this order: an existing directory or file; something that looks like a path but does not exist (an error);
    a well-known name (`wikitext`, `c4`, `imagenet-1k`); a hub id, optionally `id:configuration`.
    """
    if not source.strip():
        raise DataError("`source` is empty; give an image folder, a text file or a `datasets` id")
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return _describe_directory(source, path)
    if os.path.isfile(path):
        return _describe_file(source, path)
    if os.path.exists(path):
        raise DataError(
            f"`{source}` is neither a regular file nor a directory, and data are read several times; write what it "
            "gives to a file, and name that"
        )
    if _looks_like_path(source):
        raise DataError(
            f"`{source}` looks like a path, but there is no such file or directory; "
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
        raise DataError(f"`{source}` is a single image; give a folder with one sub-folder per class")
    _check_utf8(path)
    return Source(name=source, kind="text", builder="text", files=files)


def _check_utf8(path: Path) -> None:
    """The first 64 KiB; the rest is checked when the file is read."""
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except OSError as error:
        raise DataError(f"cannot read `{path}`: {error.strerror}; give a file that can be read") from None
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        raise DataError(
            f"`{path}` is not UTF-8 text (byte {error.start}); "
            f"wanted a text file, an image folder, or one of {', '.join(TABLE_BUILDERS)}"
        ) from None


def _describe_directory(source: str, path: Path) -> Source:
    """The most frequent type among the first files decides; files of other types are ignored."""
    types = Counter(_file_type(file) for file in itertools.islice(_walk(path), FILES_EXAMINED))
    del types[""]
    if not types:
        raise DataError(
            f"`{source}` is a directory without images, texts or tables; wanted files such as .jpeg, .png, "
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
