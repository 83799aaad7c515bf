"""Tasks of the lm-eval harness on a model in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fips.errors import ConfigError, DataError
from fips.files.hub import hub_where_reached
from fips.optional import require

__all__ = ["run_tasks"]

COUNTS = ("sample_len", "sample_count")
"""What lm-eval writes among the metrics of a task that says how large it is."""


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
) -> dict[str, dict[str, float]]:
    """``{task: {metric: value}}`` as the stock ``lm_eval`` command computes them, standard errors included.

    ``include_path`` adds a directory of task files. Raises ``ConfigError`` for an unknown task, ``DataError`` if a
    task's data set cannot be read, ``MissingPackageError`` without lm-eval.
    """
    harness = require("lm_eval", extra="lm-eval", purpose="evaluation on tasks")
    manager = require("lm_eval.tasks", extra="lm-eval", purpose="evaluation on tasks").TaskManager(
        include_path=None if include_path is None else str(include_path)
    )
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(f"`--tasks`: lm-eval knows no task `{unknown[0]}`; `lm-eval ls tasks` lists them")
    wrapped = require("lm_eval.models.huggingface", extra="lm-eval", purpose="evaluation on tasks").HFLM
    try:
        with torch.no_grad(), _only_errors(), hub_where_reached():
            wrapper = wrapped(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            outcome = harness.simple_evaluate(
                model=wrapper,
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                log_samples=False,
            )
    except (OSError, ConnectionError) as error:
        raise DataError(
            f"cannot read the data of {', '.join(tasks)}: {' '.join(str(error).split())[:200]}; run it once while "
            "online, which keeps the data in the cache of `datasets`, or describe tasks on your own files with "
            "`--include-path`"
        ) from None
    return {task: _numbers(metrics) for task, metrics in outcome["results"].items()}


@contextmanager
def _only_errors() -> Iterator[None]:
    """Without the warnings of lm-eval that it is given a model in memory, which is meant."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Without names, counts and ``N/A``; ``acc,none`` (metric, filter) becomes ``acc``."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float) and name not in COUNTS}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items()}
