"""The number of examples in a batch of calibration that the memory of a device takes."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from fips.app.tables import format_bytes
from fips.calibration.sweep import CHUNKS
from fips.config import CompressionConfig, DataConfig
from fips.data import Kind
from fips.data.load import window_length
from fips.data.text import DEFAULT_CALIBRATION_WINDOWS
from fips.errors import ConfigError
from fips.estimate import MemoryNeed, available_memory, calibration_memory
from fips.models.reading import kind_of, longest_sequence
from fips.models.tasks import task_name
from fips.models.timm import TimmProcessor, is_timm_model
from fips.models.transformers import example_inputs
from fips.plan.plan import CompressionPlan

__all__ = ["examples_of", "fitting_data"]

log = logging.getLogger("fips.memory")


def fitting_data(
    model: nn.Module,
    plan: CompressionPlan,
    config: CompressionConfig,
    data: DataConfig,
    *,
    device: torch.device,
    chosen: bool,
    only_planned: bool = False,
    mapped: int = 0,
) -> tuple[DataConfig, MemoryNeed | None]:
    """``data`` with a batch size whose calibration fits into the memory there is, and the memory it needs.

    ``model`` is on the meta device; ``mapped`` bytes of its weights stay in their files (``Source.mapped_bytes``).

    A batch size that the user has ``chosen`` is kept or refused. The default one is small enough for every one of the
    ``CHUNKS`` parts that moments are made of to have a batch, and lowered further with a warning. Where not
    even one example fits, a run is refused; a plan alone (``only_planned``) may be meant for another machine and gets
    a warning. Nothing is said where the need cannot be told. Raises ``ConfigError``.
    """
    kind = kind_of(model)
    need = calibration_memory(model, plan, config, examples_of(model, data), device=device, mapped=mapped)
    available = available_memory(device, mapped=mapped)
    count = data.num_samples or (DEFAULT_CALIBRATION_WINDOWS if kind == "text" else 1 << 60)
    if not chosen:
        data = data.replace(batch_size=max(1, min(data.batch_size, count // CHUNKS)))
    wanted = min(data.batch_size, count)
    if need is None or available is None or need.fits(wanted, available):
        return data, need
    largest = need.largest(available)
    words = _words(need, wanted, available, kind, model, data)
    if largest == 0:
        least = f"{words}, and one alone about {format_bytes(need.total(1))}"
        if only_planned and not chosen:
            log.warning("%s: this plan needs a machine with more memory, or shorter examples", least)
            return data, need
        raise ConfigError(
            f"{least}; use a machine with more memory"
            + (", a smaller `--sequence-length`" if kind == "text" else "")
            + ", or `--method fips-paper`, which needs less"
        )
    if chosen:
        raise ConfigError(f"`batch_size` {wanted} does not fit: {words}; use at most `--batch-size {largest}`")
    log.warning("%s: calibrating with batches of %d", words, largest)
    return data.replace(batch_size=largest), need


def _words(need: MemoryNeed, count: int, available: int, kind: Kind, model: nn.Module, data: DataConfig) -> str:
    what = (
        f"texts of {window_length(data, longest_sequence(model), 'calibration')} tokens" if kind == "text" else "images"
    )
    return (
        f"batches of {count} {what} need about {format_bytes(need.total(count))} of memory, "
        f"{format_bytes(available)} are free"
    )


def examples_of(model: nn.Module, data: DataConfig) -> Any:
    """A function that makes up so many examples on the meta device."""
    if is_timm_model(model):
        transform = TimmProcessor.of(model)
        return lambda count: torch.empty(count, 3, transform.height, transform.width, device="meta")
    if kind_of(model) == "text":
        length = window_length(data, longest_sequence(model), "calibration")
        names = ["input_ids", "decoder_input_ids"] if task_name(model) == "seq2seq-lm" else ["input_ids"]
        return lambda count: {name: torch.empty(count, length, dtype=torch.int64, device="meta") for name in names}
    made: dict[str, Tensor] = example_inputs(model)
    return lambda count: {name: value[:1].to("meta").expand(count, *value.shape[1:]) for name, value in made.items()}
