"""Where a benchmark writes: made when its options are read, lest hours of measuring end at a missing directory."""

from __future__ import annotations

from pathlib import Path

__all__ = ["result_directory", "result_file"]


def result_directory(text: str) -> Path:
    """A directory, made with those above it."""
    path = Path(text).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def result_file(text: str) -> Path:
    """A file in a directory that is made."""
    path = Path(text).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
