"""``fips evaluate``: a compressed directory or a dense model on data or on lm-eval tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fips.app.sources import Source
from fips.config import DataConfig
from fips.data import Batches
from fips.errors import ModelError
from fips.evaluation import EvaluationResult, check_evaluation, evaluate, require_comparable
from fips.integrations.lm_eval import run_tasks
from fips.models.tasks import task_name
from fips.models.transformers import load_processor

__all__ = ["Evaluable", "evaluable_source", "evaluate_tasks"]


@dataclass(frozen=True, slots=True)
class Evaluable:
    """A model with its examples, and the original it is compared with; ``evaluate`` says how good it is."""

    model: nn.Module
    original: nn.Module | None
    batches: Batches
    processor: Any
    """Tokenizer or image processor."""

    def evaluate(self, progress: Any = None) -> EvaluationResult:
        return evaluate(self.model, self.batches, against=self.original, progress=progress)


def evaluable_source(
    source: str,
    data: DataConfig,
    *,
    against: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Evaluable:
    """A compressed directory or a dense model, and ``against``, read after everything cheap has been checked."""
    own = Source.named(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    empty = own.empty()
    batches, processor = own.batches(data, empty, purpose="evaluation")
    check_evaluation(empty, batches, compared=against is not None)
    other = None if against is None else replace(own, name=against)
    if other is not None:
        require_comparable(empty, other.empty())
    original = None if other is None else other.model()
    return Evaluable(own.model(), original, batches, processor)


def evaluate_tasks(
    source: str,
    tasks: Sequence[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, float]]:
    """Metrics of lm-eval tasks for a compressed directory or a dense language model."""
    own = Source.named(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    empty = own.empty()
    if task_name(empty) != "causal-lm":
        raise ModelError(f"`--tasks` are for language models, `{source}` holds a `{type(empty).__name__}`: give --data")
    tokenizer = load_processor(source, "text", trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise ModelError(f"`{source}` has no tokenizer, which tasks need; save one beside the model")
    return run_tasks(
        own.model(),
        tokenizer,
        tasks,
        batch_size=batch_size or 8,
        limit=limit,
        num_fewshot=num_fewshot,
        include_path=include_path,
    )
