"""What is shown to others of a record, without the directories of the machine it was made on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

__all__ = ["base_name", "without_directories"]

SOURCES = ("source", "model", "against")
"""Fields of a record that hold a path or a hub id and nothing else."""
_LOCAL = re.compile(r"(file:|~|\.{0,2}[/\\]|[A-Za-z]:[/\\]|\.{1,2}$)")
_PATH = re.compile(r"""(?<![\w/\\.<~])(?:file:(?://)?)?(?:~\w*|[A-Za-z]:(?=[/\\]))?[/\\](?![/\\])[^\s`'"<>|,;:()]*""")
_ROOTED = re.compile(r"(file:|~|/|[A-Za-z]:)")


def base_name(source: str) -> str:
    """The last part of a path of this machine; a hub id, or a path below the working directory, as it is."""
    if not _LOCAL.match(source):
        return source
    path = source.removeprefix("file:").replace("\\", "/")
    if path.rstrip("/").rpartition("/")[2] in (".", ".."):
        path = str(Path(path).resolve())
    return PurePosixPath(path).name or "/"


def without_directories(record: Any) -> Any:
    """JSON with base names in place of paths: in the fields named in ``SOURCES``, and of absolute paths in any text.

    What such a field holds is also found where a text repeats it, spaces included.
    """
    places = sorted({place for place in _places(record) if base_name(place) != place}, key=len, reverse=True)
    return _shown(record, places)


def _places(record: Any) -> Iterator[str]:
    if isinstance(record, Mapping):
        for key, value in record.items():
            if key in SOURCES and isinstance(value, str):
                yield value
            else:
                yield from _places(value)
    elif isinstance(record, list | tuple):
        for value in record:
            yield from _places(value)


def _shown(record: Any, places: list[str], key: str = "") -> Any:
    if isinstance(record, Mapping):
        return {name: _shown(value, places, name) for name, value in record.items()}
    if isinstance(record, list | tuple):
        return [_shown(value, places) for value in record]
    if not isinstance(record, str):
        return record
    if key in SOURCES:
        return base_name(record)
    for place in places:
        if len(place) > 2:  # `.` and `..` are in every text
            record = record.replace(place, base_name(place))
    return _PATH.sub(_last_part, record)


def _last_part(found: re.Match[str]) -> str:
    return base_name(found[0]) if _ROOTED.match(found[0]) else found[0]
