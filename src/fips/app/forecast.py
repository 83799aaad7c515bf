"""What a run is about to take, said before it begins."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fips.app.fitting import examples_of
from fips.app.tables import format_bytes
from fips.config import CompressionConfig, DataConfig
from fips.data.images import DEFAULT_CALIBRATION_IMAGES
from fips.data.text import DEFAULT_CALIBRATION_WINDOWS
from fips.estimate import MemoryNeed, Speed, available_memory, operations, timed_dtype
from fips.models.reading import kind_of
from fips.plan.plan import CompressionPlan
from fips.record import peak_memory_bytes

__all__ = ["Forecast", "forecast"]


COUNTED = 40
"""Seconds below which what is not counted, such as the choice between formats, takes longer than what is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Estimates, None where they cannot be told."""

    device: str
    examples: int
    operations: float | None = None
    """Floating-point operations, a multiplication with its addition counted as two."""
    seconds: float | None = None
    """On this machine, from the speed of products, factorisations and rounding that was just measured."""
    memory_bytes: int | None = None
    """Of the device, the least that calibration takes, with the model but for its ``mapped_bytes``."""
    mapped_bytes: int = 0
    """Weights that stay in their files on a CPU, read again where memory is short."""
    program_bytes: int = 0
    """The most that this process has taken until now, with Python and its libraries, where that is the same memory."""
    available_bytes: int | None = None
    free_disk_bytes: int | None = None
    """Where the output is written."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """All that is known, for people."""
        parts = []
        if self.seconds is not None and self.operations is not None:
            duration = f"about {_duration(self.seconds)}" if self.seconds > COUNTED else "a minute or less"
            parts.append(f"{duration} ({self.operations:.1e} operations)")
        else:
            parts.append("time not known beforehand")
        if self.memory_bytes is not None:
            free = "" if self.available_bytes is None else f" of {format_bytes(self.available_bytes)} free"
            parts.append(f"tensors in memory {format_bytes(self.memory_bytes)}{free}")
            beside = (
                (self.program_bytes, "the program itself"),
                (self.mapped_bytes, "weights that stay in their files"),
            )
            words = " and ".join(f"{format_bytes(size)} of {name}" for size, name in beside if size)
            parts[-1] += words and f" beside {words}"
        if self.free_disk_bytes is not None:
            parts.append(f"{format_bytes(self.free_disk_bytes)} free on the disk")
        return f"estimate for {self.examples} examples on {self.device}: " + "; ".join(parts)


def forecast(
    model: nn.Module,
    plan: CompressionPlan,
    config: CompressionConfig,
    data: DataConfig,
    need: MemoryNeed | None,
    *,
    device: torch.device,
    count: int | None = None,
    output: Path | None = None,
) -> Forecast:
    """Of compressing a model, given on the meta device, after a second of measuring how fast ``device`` is.

    ``count`` is the number of examples, where the data has been seen.
    """
    if count is None:
        default = DEFAULT_CALIBRATION_WINDOWS if kind_of(model) == "text" else DEFAULT_CALIBRATION_IMAGES
        count = data.num_samples or default
    work = operations(model, plan, config, examples_of(model, data), count=count, device=device)
    seconds = None if work is None else Speed.measured(device, timed_dtype(config, model, device)).seconds(work)
    return Forecast(
        device=str(device),
        examples=count,
        operations=None if work is None else work.total,
        seconds=seconds,
        memory_bytes=None if need is None else need.total(min(data.batch_size, count)),
        mapped_bytes=0 if need is None else need.mapped,
        program_bytes=peak_memory_bytes(device) if device.type == "cpu" else 0,
        available_bytes=available_memory(device, mapped=0 if need is None else need.mapped),
        free_disk_bytes=None if output is None else _free(output),
    )


def _free(path: Path) -> int | None:
    """On the disk of a path that may not be there yet."""
    place = Path(os.path.abspath(path))
    found = next((one for one in (place, *place.parents) if one.exists()), None)
    return None if found is None else shutil.disk_usage(found).free


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
