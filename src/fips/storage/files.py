"""The manifest of a directory, and its JSON files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fips.errors import CheckpointError
from fips.storage.output import MANIFEST, complete_directory, require_free

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
FORMAT_VERSION = 1


def write_manifest(directory: Path) -> None:
    """Record size and SHA-256 of every file; written last, its presence says the directory is complete."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != EDITABLE)
    entries = {str(path.relative_to(directory)): _fingerprint(path) for path in files}
    write_json(directory / MANIFEST, {"format_version": FORMAT_VERSION, "files": entries})


def verify_manifest(directory: Path) -> None:
    """Raise ``CheckpointError`` naming the first listed file that is missing, cut short or altered."""
    manifest = read_json(directory / MANIFEST)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"`{directory / MANIFEST}` has format_version {version!r}, this fips reads {FORMAT_VERSION}; "
            "install the fips version that wrote it"
        )
    for name, expected in manifest.get("files", {}).items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"`{path}` is missing; copy the directory again")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"`{path}` has {size} bytes, written were {expected['bytes']}; copy it again")
        if _fingerprint(path)["sha256"] != expected["sha256"]:
            raise CheckpointError(
                f"`{path}` was altered after it was written (SHA-256 differs); copy it again, or load with "
                "verify=False if you changed it on purpose"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ``CheckpointError`` if the file is missing or not one."""
    if not path.is_file():
        raise CheckpointError(f"`{path}` is missing; `{path.parent}` is not a complete fips directory")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"`{path}` is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"`{path}` must hold a JSON object, got {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
