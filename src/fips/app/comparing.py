"""``fips compare``: methods on a model, with finished runs kept so that the same command goes on from them."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fips.app.compare import Comparison, compare, method_config, write_comparison
from fips.app.fitting import fitting_data
from fips.app.sources import Source
from fips.bars import Bars
from fips.calibration.inputs import CalibrationData, digest
from fips.compression import circumstances
from fips.config import DataConfig, all_settings, same_data
from fips.data import Batches
from fips.errors import BudgetError
from fips.files.output import Output, require_empty
from fips.methods.registry import method_of
from fips.models.timm import PixelBatches, is_timm_model
from fips.plan.plan import plan_compression
from fips.record import environment
from fips.storage.work import WorkDirectory, kept_work

__all__ = ["compare_source", "untrained_methods"]

log = logging.getLogger("fips.app.comparing")


def untrained_methods(size: float) -> list[str]:
    """All methods but those that train, which take hours where others take minutes; without named settings of them."""
    return [name for name in all_settings() if not method_of(method_config(name, bits=size, seed=0)).trains_blocks]


def compare_source(
    source: str,
    calibration: DataConfig,
    evaluation: DataConfig,
    output: Path,
    *,
    methods: Sequence[str] | None,
    sizes: Sequence[float],
    seeds: Sequence[int],
    layers: str = "blocks",
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    bars: Bars | None = None,
) -> Comparison:
    """Compare methods on a model and write table, JSON and plot to a directory that is absent or empty.

    ``methods``: None for all that train nothing.

    Finished runs are kept in a work directory beside it until all are there: the same command goes on from them, with
    other methods and sizes too.
    """
    require_empty(output)
    original = Source.named(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    methods = methods or untrained_methods(sizes[0])
    for method, size, seed in itertools.product(methods, sizes, seeds):
        method_config(method, bits=size, seed=seed, layers=layers)
    if same_data(evaluation, calibration):
        log.warning("scoring on the data that is calibrated on, where models are better than on other data")
    empty = original.empty(compressed=False)
    facts = {
        "source": Path(source).name,
        "calibration": calibration.model_dump(mode="json", exclude_none=True),
        "evaluation": evaluation.model_dump(mode="json", exclude_none=True),
        "environment": environment(original.device),
    }
    place = Path(os.path.abspath(output))
    work = place.with_name(f"{place.name}.work")
    with Output(output) as target, kept_work(work, output, first=True, keep=False):
        calibration = _fitting_comparison(empty, calibration, methods, sizes, layers, original.device)
        scored, _ = original.batches(evaluation, empty, purpose="evaluation")
        model = original.dense()

        def examples(seed: int) -> Any:
            batches, _ = original.batches(calibration.replace(seed=seed), empty, purpose="calibration")
            return PixelBatches(batches) if is_timm_model(model) else batches

        keys = {
            "calibration": {seed: _key(model, examples(seed), seed) for seed in seeds},
            "evaluation": _rough(scored),
        }
        made_of = {"comparison": layers} | circumstances(model, keys, precision="auto")
        result = compare(
            model, examples, scored, methods=methods, sizes=sizes, seeds=seeds, layers=layers,
            store=WorkDirectory(work, made_of), bars=bars,
        )  # fmt: skip
        with target.writing("the comparison"):
            write_comparison(result, target.scratch, facts=facts)
        target.commit()
    return result


def _require_one_that_fits(model: nn.Module, methods: Sequence[str], sizes: Sequence[float], layers: str) -> None:
    """Raise ``BudgetError`` where no method fits into any of the sizes, with the reason of the first at the largest."""
    reasons = []
    for method in methods:
        for size in sorted(sizes, reverse=True):
            try:
                plan_compression(model, method_config(method, bits=size, seed=0, layers=layers))
                return
            except BudgetError as error:
                reasons.append(f"`{method}` at {size:g} bits: {error}")
    raise BudgetError(f"no method fits into any of the sizes; {reasons[0]}")


def _key(model: nn.Module, batches: Any, seed: int) -> str:
    """A digest of calibration data."""
    data = CalibrationData(model, batches, seed=seed)
    data.check()
    return data.key()


def _rough(scored: Batches) -> list[Any]:
    """What tells other evaluation data, which may be long, apart: its description, its first and its last batch."""
    ends = sorted({0, len(scored) - 1})
    return [scored.description, scored.num_samples, *map(digest, scored.only(ends))]


def _fitting_comparison(
    model: nn.Module,
    data: DataConfig,
    methods: Sequence[str],
    sizes: Sequence[float],
    layers: str,
    device: torch.device,
) -> DataConfig:
    """Batches that fit whichever of the methods needs most. Raises ``BudgetError`` where no method fits at any size."""
    _require_one_that_fits(model, methods, sizes, layers)
    chosen = "batch_size" in data.model_fields_set
    configs = [method_config(method, bits=sizes[0], seed=0) for method in methods]
    for config in {config.method: config for config in configs}.values():
        with suppress(BudgetError):
            plan = plan_compression(model, config)
            data, _ = fitting_data(model, plan, config, data, device=device, chosen=chosen)
    return data
