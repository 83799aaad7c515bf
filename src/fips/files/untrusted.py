"""Reading what a stranger may have written: strict JSON, and names of files that stay inside their directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from fips.errors import CheckpointError

__all__ = ["file_inside", "no_nan", "parse_object", "read_bytes"]

MAX_JSON_BYTES = 32 << 20
"""Larger than the index of any checkpoint; a header or a configuration is some kilobytes."""
MAX_DEPTH = 64
"""Objects and lists inside each other: the deepest configurations of transformers have 6."""


class _NotStrictError(ValueError):
    """Something that the parser of Python lets pass."""


def read_bytes(path: Path, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; raises ``CheckpointError`` naming it otherwise."""
    try:
        if not path.is_file():
            raise CheckpointError(f"`{path}` is missing; `{path.parent}` is not a complete fips directory")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read `{path}`: {error}") from None
    if len(content) > limit:
        raise CheckpointError(f"`{path}` has more than {limit:,} bytes, which no fips directory needs")
    return content


def parse_object(content: bytes, *, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, at most 64 levels deep; ``where`` names its place in errors.

    Raises ``CheckpointError`` for everything else: other encodings than UTF-8, numbers of thousands of digits, lists.
    """
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
        depth = _depth(found)
    except RecursionError:
        depth = MAX_DEPTH + 1
    except ValueError as error:  # of the encoding, of the grammar, of long numbers, of ours
        raise CheckpointError(f"{where} is not valid JSON: {' '.join(str(error).split())[:200]}") from None
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{where} is not valid JSON for a model: more than {MAX_DEPTH} levels deep")
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} must hold a JSON object, got {type(found).__name__}")
    return found


def no_nan(fields: dict[str, Any], *, where: str) -> None:
    """Raise ``CheckpointError`` naming the first field that is NaN: no setting of a model is."""
    for name, value in _leaves(fields, ""):
        if isinstance(value, float) and value != value:
            raise CheckpointError(f"{where}: `{name}` is NaN; wants a number")


def file_inside(directory: Path, name: Any, *, where: str) -> Path:
    """The regular file ``name`` of a directory; ``where`` says in errors who names it.

    Raises ``CheckpointError`` unless the name is relative, plain (no ``..``, nothing that could be shortened) and leads
    to a file in the directory, links followed. In the cache of the hub files are links to its ``blobs``.
    """
    if not isinstance(name, str) or not _is_plain(name):
        shown = repr(name)[:100]
        raise CheckpointError(f"{where} names the file {shown}; wants the name of a file inside `{directory}`")
    path = directory / name
    try:
        if not path.is_file():
            raise CheckpointError(f"`{path}` is missing; copy the directory again")
        real = path.resolve()
        homes = [home.resolve() for home in (directory, *_blobs(directory))]
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"cannot read `{path}`: {error}") from None
    if not any(real.is_relative_to(home) for home in homes):
        raise CheckpointError(f"`{path}` is a link to `{real}`, outside the directory; copy the file itself there")
    return path


def _is_plain(name: str) -> bool:
    pure = PurePosixPath(name)
    return (
        0 < len(name) < 1024
        and name.isprintable()
        and not pure.is_absolute()
        and ".." not in pure.parts
        and str(pure) == name
        and name != "."
        and "\\" not in name
    )


def _blobs(directory: Path) -> Iterator[Path]:
    """Where the cache of the hub keeps the files of a snapshot, if the directory is one."""
    if directory.parent.name == "snapshots":
        yield directory.parent.parent / "blobs"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _NotStrictError(f"the key {twice[:100]!r} is there twice")
    return found


def _depth(found: Any) -> int:
    """Levels of objects and lists, counted no further than one beyond what is allowed."""
    level, depth = [found], 0
    while level and depth <= MAX_DEPTH:
        level = [item for value in level if isinstance(value, dict | list) for item in _items(value)]
        depth += 1
    return depth


def _items(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}.{index}")
    else:
        yield name, value
