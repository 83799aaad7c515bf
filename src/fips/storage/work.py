"""Where a run keeps what it has finished, so that after a crash the same command goes on from there.

A work directory holds ``run.json``, which says what the run is made of, ``log.txt`` with a line for every finished
block, ``seconds.txt`` with the time that it took, and for every finished piece a file of tensors and fields with their
SHA-256. A file appears by one rename when it is complete: whatever ends the process, what is there is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fips.errors import OutputError
from fips.files.output import require_apart, require_file, require_outside_models

__all__ = ["WorkDirectory", "kept_seconds", "kept_work"]

RUN, LOG, SECONDS = "run.json", "log.txt", "seconds.txt"
SUFFIX = ".safetensors"
UNSET = object()
MOST_SHOWN = 3
"""Differences to the run of a work directory that an error names."""


class WorkDirectory:
    """Finished pieces by name; ``fingerprint`` is everything that they depend on.

    Raises ``OutputError`` if the directory cannot be written, belongs to a run with another fingerprint, or is
    something else.
    """

    def __init__(self, path: str | Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._fingerprint = json.loads(json.dumps(fingerprint, default=str))
        self._check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / RUN).exists():
                _write(self.path / RUN, json.dumps(self._fingerprint, indent=2).encode())
        except OSError as error:
            raise OutputError(
                f"cannot write work directory `{self.path}`: {error.strerror or error}; choose another with `--work`"
            ) from None
        self.earlier_seconds = kept_seconds(self.path)
        """What earlier runs took until they kept their last piece."""
        self._opened = time.perf_counter()

    def _check(self) -> None:
        found = _run_of(self.path)
        if found is None:
            return
        differing = sorted(
            name for name in {*found, *self._fingerprint} if found.get(name) != self._fingerprint.get(name)
        )
        if differing:
            changes = _changes(found, self._fingerprint)
            shown = f" ({'; '.join(changes[:MOST_SHOWN])})" if changes else ""
            raise OutputError(
                f"work directory `{self.path}` belongs to a run with other {', '.join(differing)}{shown}; remove it to "
                "start anew, or choose another with `--work`"
            )

    def has(self, name: str) -> bool:
        """Whether a piece is finished."""
        return self._file(name).exists()

    def get(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and fields of a finished piece; None if it is not. Raises ``OutputError`` if its file is damaged."""
        path = self._file(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - no mapping
            digest = _digest(tensors, metadata["fields"])
            if metadata.get("sha256", digest) != digest:  # there was none in pieces before
                raise ValueError("its SHA-256 is not the one it was written with")
            return tensors, json.loads(metadata["fields"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise OutputError(f"`{path}` is damaged ({error}); remove it and give the same command again") from None

    def put(self, name: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
        """Keep a finished piece. Raises ``OutputError`` if it cannot be written."""
        try:
            held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            text = json.dumps(fields)
            _write(self._file(name), save(held, metadata={"fields": text, "sha256": _digest(held, text)}))
            _write(self.path / SECONDS, f"{self.earlier_seconds + time.perf_counter() - self._opened:.3f}".encode())
        except OSError as error:
            raise OutputError(
                f"cannot keep finished work in `{self.path}`: {error.strerror or error}; what is there is whole: free "
                "space and give the same command again"
            ) from None

    def log(self, line: str) -> None:
        """Add a line with the time to the log."""
        with suppress(OSError), (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")

    def _file(self, name: str) -> Path:
        return self.path / f"{name.replace('/', '_')}{SUFFIX}"


def _run_of(path: Path) -> dict[str, Any] | None:
    """What the run is made of that a work directory belongs to; None where there is nothing yet."""
    try:
        found: Any = json.loads((path / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise OutputError(
                f"`{path}` is no work directory of fips (it has no {RUN}); choose another with `--work`"
            ) from None
        return None
    except NotADirectoryError:
        raise OutputError(f"work directory `{path}` is a file, or lies in one; choose another with `--work`") from None
    except OSError as error:
        raise OutputError(
            f"cannot read work directory `{path}`: {error.strerror or error}; choose another with `--work`"
        ) from None
    except ValueError as error:
        raise OutputError(f"cannot read `{path / RUN}`: {error}; remove the work directory") from None
    if not isinstance(found, dict):
        raise OutputError(
            f"`{path / RUN}` must hold a JSON object, got {type(found).__name__}; remove the work directory"
        )
    return found


def kept_seconds(path: Path) -> float:
    """How long earlier runs took to make what a work directory holds; zero where nothing is kept yet."""
    try:
        return float((path / SECONDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0


def _require_place(path: Path, output: Path) -> None:
    """Raise ``OutputError`` where a work directory cannot be."""
    require_apart(output, path)
    require_outside_models(path)
    try:
        if _run_of(path) is None:
            require_file(path / RUN)
    except OSError as error:
        raise OutputError(
            f"cannot write work directory `{path}`: {error.strerror or error}; choose another with `--work`"
        ) from None


@dataclass(slots=True)
class Keeper:
    """What becomes of a work directory."""

    finished: bool = False
    """Whether its result is safe, so that it is not needed however the command ends."""


@contextmanager
def kept_work(path: Path, output: Path, *, first: bool, keep: bool) -> Iterator[Keeper]:
    """A block of work with its directory: removed at the end by the ``first`` process, unless told to ``keep`` it.

    What is finished stays where the block does not reach its end, and its error says so. What somebody else put into
    the directory stays, too. Raises ``OutputError`` before the block if the directory cannot be written, or if it and
    the ``output`` of the work are not apart.
    """
    keeper = Keeper()
    if first:
        _require_place(path, output)
    try:
        yield keeper
        keeper.finished = True
    except BaseException as error:
        if not keeper.finished and _is_there(path) and any(path.glob(f"*{SUFFIX}")):
            error.add_note(f"what is finished is in `{path}`: the command that began it goes on from there")
            keep = True
        raise
    finally:
        if first and not keep and _is_there(path):
            _remove(path)


def _remove(path: Path) -> None:
    """Take away what a work directory wrote, and the directory where nothing else is in it."""
    half_written = (f".*{SUFFIX}.*", f".{SECONDS}.*", f".{RUN}.*")  # of processes that were killed, see `_write`
    pieces = [one for pattern in (f"*{SUFFIX}", *half_written) for one in path.glob(pattern)]
    with suppress(OSError):
        for one in (*pieces, *(path / name for name in (LOG, SECONDS, RUN))):
            one.unlink(missing_ok=True)
        path.rmdir()


def _is_there(path: Path) -> bool:
    with suppress(OSError):
        return (path / RUN).exists()
    return False


def _digest(tensors: Mapping[str, Tensor], fields: str) -> str:
    """SHA-256 of what a piece holds."""
    digest = hashlib.sha256(fields.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    """A file that is complete or absent, by whichever of several processes."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _changes(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs in what two runs are made of, and what is written there; digests say nothing and are left out."""
    changes = []
    for name in sorted({*there, *now}):
        old, new = there.get(name, UNSET), now.get(name, UNSET)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _changes(old, new)
        elif old != new and not (_is_digest(old) or _is_digest(new)):
            changes.append(f"{name}: {_short(old)} there, {_short(new)} now")
    return changes


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value) is not None


def _short(value: Any) -> str:
    text = "unset" if value is UNSET else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
