"""What the ways of a layer cost on this machine: measured once, kept in memory and in a file.

The file is a cache. Whatever is wrong with it or with its place, the worst that follows is that something is measured
again: what cannot be read is left out, what cannot be written stays in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fips.kernels import cpu

__all__ = ["TIE", "Timings", "Way", "fingerprint", "measure", "timings_file"]

log = logging.getLogger("fips.kernels")

Way = Literal["packed", "decode", "merge", "merged"]
Seconds = dict[str, dict[str, float]]
"""By signature of a product and by way."""

TIE = 1.05
LARGEST_FILE = 16 << 20
"""Bytes of a file that is read; one of a year's use has a few thousand."""


class Timings:
    """Seconds of every way by signature, in memory and in a file of this machine. Threads may share it."""

    def __init__(self) -> None:
        self._seconds: Seconds | None = None
        self._renew_lock()
        if hasattr(os, "register_at_fork"):  # the thread that held it does not live on in the child
            os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

    def fastest(self, signature: str, ways: tuple[Way, ...], compute: Callable[[Way], Tensor]) -> Way:
        """The first way within ``TIE`` of the fastest; those not yet measured are, one thread at a time."""
        with self._lock:
            known = self._known().get(signature, {})
            if any(way not in known for way in ways):
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    return ways[0]
                known = {**known, **measure(ways, compute)}
                self._known()[signature] = known
                self._save()
                log.debug("%s: %s", signature, known)
        best = min(known[way] for way in ways)
        return next(way for way in ways if known[way] <= TIE * best)

    def forget(self) -> None:
        """Read the file anew at the next call."""
        with self._lock:
            self._seconds = None

    def _known(self) -> Seconds:
        if self._seconds is None:
            path = _place()
            self._seconds = {} if path is None else _read(path)
        return self._seconds

    def _save(self) -> None:
        path = _place()
        if path is None:
            return
        self._seconds = {**_read(path), **self._known()}  # another process may have written meanwhile
        text = json.dumps({"machine": _machine(), "seconds": self._seconds}, indent=1) + "\n"
        try:
            _write(path, text)
        except (OSError, ValueError) as error:
            log.debug("timings are kept for this process only: %s", error)


def _read(path: Path) -> Seconds:
    """What a file holds that can be used."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_FILE:  # reading a pipe would wait for ever
            return {}
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        log.debug("%s cannot be used: %s", path, error)
        return {}
    seconds = record.get("seconds") if isinstance(record, dict) else None
    return {key: _usable(entry) for key, entry in seconds.items()} if isinstance(seconds, dict) else {}


def _usable(entry: object) -> dict[str, float]:
    items = entry.items() if isinstance(entry, dict) else ()
    return {way: float(time) for way, time in items if way in get_args(Way) and _is_time(time)}


def _is_time(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < 1e9 and math.isfinite(value)


def _write(path: Path, text: str) -> None:
    """Whole or not at all, whoever else writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(scratch)
        raise


def _place() -> Path | None:
    """``timings_file``, or None where there is no such place."""
    try:
        return timings_file()
    except (OSError, RuntimeError, ValueError) as error:  # without $HOME, of a user without an entry
        log.debug("timings are kept for this process only: %s", error)
        return None


@torch.no_grad()
def measure(ways: tuple[Way, ...], compute: Callable[[Way], Tensor]) -> dict[str, float]:
    """Median seconds of each way: alternating runs, at least 3 and at most 9, about 30 ms for all."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways:
        compute(way)
    begin = time.perf_counter()
    for run in range(9):
        for way in ways:
            start = time.perf_counter()
            _wait(compute(way))
            seconds[way].append(time.perf_counter() - start)
        if run >= 2 and time.perf_counter() - begin > 0.03:
            break
    return {way: statistics.median(runs) for way, runs in seconds.items()}


def _wait(y: Tensor) -> None:
    if y.device.type == "cuda":
        torch.cuda.synchronize(y.device)


def fingerprint() -> str:
    """A name for this machine and the versions that timings depend on."""
    return hashlib.sha256(json.dumps(_machine(), sort_keys=True).encode()).hexdigest()[:16]


def timings_file() -> Path:
    """Where choices are remembered: in ``$FIPS_CACHE`` or the user's cache directory.

    Raises ``RuntimeError`` where neither is named and the user has no home.
    """
    cache = os.environ.get("FIPS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fips"
    return Path(cache) / f"timings-{fingerprint()}.json"


def _machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "isa": list(cpu.isa_names()),
        "abi": cpu.ABI,
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
