"""The manifest of a directory, and its JSON files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fips.errors import CheckpointError
from fips.files.output import MANIFEST, complete_directory, require_free
from fips.files.untrusted import file_inside, parse_object, read_bytes

__all__ = [
    "MANIFEST",
    "complete_directory",
    "read_json",
    "require_free",
    "verify_manifest",
    "write_json",
    "write_manifest",
]

EDITABLE = "README.md"
"""The model card is for people to edit; its bytes are not checked."""
FOR_PEOPLE = {".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf"}
"""Kinds of files that may be added to a directory, since no loader reads them."""
FORMAT_VERSION = 1


def write_manifest(directory: Path) -> None:
    """Record size and SHA-256 of every file; written last, its presence says the directory is complete."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in (EDITABLE, MANIFEST))
    entries = {str(path.relative_to(directory)): _fingerprint(path) for path in files}
    write_json(directory / MANIFEST, {"format_version": FORMAT_VERSION, "files": entries})


def verify_manifest(directory: Path, read: Iterable[str]) -> None:
    """Raise ``CheckpointError`` unless the files of a directory are the ones written, no more and no fewer.

    ``read`` are the files that loading reads: each must be listed. Files that are not listed are refused, since some
    loader may take them for part of the model; only hidden ones, licenses, pictures and texts for people may be added.
    """
    where = f"`{directory / MANIFEST}`"
    entries = _entries(read_json(directory / MANIFEST), where)
    unlisted = next((name for name in read if name not in entries), None)
    if unlisted is not None:
        raise CheckpointError(
            f"{where} does not list `{unlisted}`, which belongs to the model; copy the directory again"
        )
    for name, expected in entries.items():
        _verify_file(file_inside(directory, name, where=where), expected)
    for name in _files_of(directory):
        if name not in entries and not _is_for_people(name):
            raise CheckpointError(
                f"`{directory / name}` is not among the files written ({MANIFEST} does not list it); remove it, or "
                "load with verify=False if you added it on purpose"
            )


def _entries(manifest: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The listed files, each with ``bytes`` and ``sha256``."""
    version = manifest.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format_version {version!r}, this fips reads {FORMAT_VERSION}; "
            "install the fips version that wrote it"
        )
    entries = manifest.get("files")
    if not isinstance(entries, dict):
        raise CheckpointError(f"{where}: `files` wants an object of file names, got {type(entries).__name__}")
    for name, entry in entries.items():
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or type(entry.get("sha256")) is not str:
            raise CheckpointError(f"{where}: `files.{name[:100]}` wants a number `bytes` and a text `sha256`")
    return entries


def _verify_file(path: Path, expected: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
        found = _fingerprint(path)["sha256"] if size == expected["bytes"] else None
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror}") from None
    if found is None:
        raise CheckpointError(f"`{path}` has {size} bytes, written were {expected['bytes']}; copy it again")
    if found != expected["sha256"]:
        raise CheckpointError(
            f"`{path}` was altered after it was written (SHA-256 differs); copy it again, or load with "
            "verify=False if you changed it on purpose"
        )


def _files_of(directory: Path) -> Iterator[str]:
    """Names of everything in a directory that is no directory, the manifest left out."""
    try:
        for path in sorted(directory.rglob("*")):
            if path.is_symlink() or not path.is_dir():
                name = path.relative_to(directory).as_posix()
                if name != MANIFEST:
                    yield name
    except OSError as error:
        raise CheckpointError(f"cannot read `{directory}`: {error.strerror}") from None


def _is_for_people(name: str) -> bool:
    """Whether no loader reads a file of this name: the card, licenses, pictures, what version control hides."""
    parts = Path(name).parts
    return (
        any(part.startswith(".") for part in parts)
        or parts[-1].upper().startswith(("LICENSE", "NOTICE"))
        or Path(name).suffix.lower() in FOR_PEOPLE
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ``CheckpointError`` if the file is missing, too large or not strictly one."""
    return parse_object(read_bytes(path), where=f"`{path}`")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
