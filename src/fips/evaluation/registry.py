"""The metrics by what a model predicts: one object per task, each in a file of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, TypeVar

from torch import nn

from fips.data import Batches
from fips.errors import DataError
from fips.evaluation.predictor import Predictor, Progress
from fips.evaluation.results import EvaluationResult
from fips.models.tasks import TaskName

__all__ = ["Evaluator", "evaluator_for", "register"]


class Evaluator(ABC):
    """How models of one task are scored."""

    task: ClassVar[TaskName]

    @abstractmethod
    def check(self, model: nn.Module, batches: Batches, *, compared: bool) -> None:
        """Raise what can be said without a pass; the model may lie on the meta device."""

    @abstractmethod
    def run(self, models: Sequence[Predictor], batches: Batches, progress: Progress | None) -> EvaluationResult:
        """Score the first model, and compare it with the second where there are two."""


_EVALUATORS: dict[str, Evaluator] = {}
T = TypeVar("T", bound=type[Evaluator])


def register(kind: T) -> T:
    _EVALUATORS[kind.task] = kind()
    return kind


def evaluator_for(batches: Batches) -> Evaluator:
    """Of the task that batches were made for."""
    if not isinstance(batches, Batches):
        raise DataError(
            f"`batches` of an evaluation know what they score, got `{type(batches).__name__}`; make them by "
            '`fips.load_data(source, model, purpose="evaluation")`'
        )
    found = _EVALUATORS.get(batches.task)
    if found is None:
        raise DataError(
            f"these batches are for `{batches.task}`, which has no metric here; there are some for "
            f"{', '.join(sorted(_EVALUATORS))}"
        )
    return found
