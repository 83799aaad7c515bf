"""``fips compare``: methods on a model, with the runs kept that were made before one failed."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fips.app.compare import Comparison, Run, compare, method_config, write_comparison
from fips.app.fitting import fitting_data
from fips.app.sources import Source
from fips.config import DataConfig, known_methods, same_data
from fips.errors import BudgetError
from fips.files.output import Output, require_empty
from fips.models.timm import PixelBatches, is_timm_model
from fips.plan.plan import plan_compression
from fips.record import environment

__all__ = ["compare_source"]

log = logging.getLogger("fips.app.comparing")


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
    progress: Any = None,
) -> Comparison:
    """Compare methods (None: all) on a model and write table, JSON and plot to a directory that is absent or empty."""
    require_empty(output)
    if same_data(evaluation, calibration):
        log.warning("scoring on the data that is calibrated on, where models are better than on other data")
    original = Source.named(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    methods = methods or known_methods()
    for method in methods:
        method_config(method, bits=sizes[0], seed=0, layers=layers)
    empty = original.empty(compressed=False)
    facts = {
        "source": Path(source).name,
        "calibration": calibration.model_dump(mode="json", exclude_none=True),
        "evaluation": evaluation.model_dump(mode="json", exclude_none=True),
        "environment": environment(original.device),
    }
    done: list[Run] = []
    total = len(methods) * len(sizes) * len(seeds)

    def on_run(run: Run) -> None:
        done.append(run)
        if progress is not None:
            progress(len(done), total)

    with Output(output) as target:
        calibration = _fitting_comparison(empty, calibration, methods, sizes[0], original.device)
        scored, _ = original.batches(evaluation, empty, purpose="evaluation")
        model = original.dense()

        def examples(seed: int) -> Any:
            batches, _ = original.batches(calibration.replace(seed=seed), empty, purpose="calibration")
            return PixelBatches(batches) if is_timm_model(model) else batches

        try:
            result = compare(
                model, examples, scored, methods=methods, sizes=sizes, seeds=seeds, layers=layers, on_run=on_run
            )
            with target.writing("the comparison"):
                write_comparison(result, target.scratch, facts=facts)
            target.commit()
        except BaseException as error:
            if done and target.kept is None and target.scratch.is_dir():
                place = _keep_runs(done, target, facts)
                error.add_note(
                    f"{len(done)} of {total} runs are in `{place}`, to be read: the same command begins anew"
                )
            raise
    return result


def _fitting_comparison(
    model: nn.Module, data: DataConfig, methods: Sequence[str], size: float, device: torch.device
) -> DataConfig:
    """Batches that fit whichever of the methods needs most."""
    chosen = "batch_size" in data.model_fields_set
    configs = [method_config(method, bits=size, seed=0) for method in methods]
    for config in {config.method: config for config in configs}.values():
        with suppress(BudgetError):
            plan = plan_compression(model, config)
            data, _ = fitting_data(model, plan, config, data, device=device, chosen=chosen)
    return data


def _keep_runs(done: Sequence[Run], target: Output, facts: Mapping[str, Any]) -> Path:
    """Keep the runs of a comparison that did not come to its end."""
    with suppress(OSError):
        runs = {**facts, "runs": [asdict(run) for run in done]}
        (target.scratch / "compare.json").write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
        return target.keep()
    place = Path(tempfile.mkdtemp(prefix="fips-compare-"))
    (place / "compare.json").write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
    return place
