"""What a model is fed: batches that are made when asked for, and the choice of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from fips.config import DataConfig
from fips.errors import DataError
from fips.models.tasks import TaskName

__all__ = ["IGNORED_LABEL", "Batches", "Kind", "Purpose", "choose", "chunk"]

Kind = Literal["image", "text"]
Purpose = Literal["calibration", "evaluation"]

IGNORED_LABEL = -100
"""Label of positions that are not scored, as in every loss of ``transformers``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """Batches for ``model(**batch)``: sized, iterable any number of times, identical each time.

    Images: ``pixel_values`` and, where the data has them, ``labels`` (B,); they are read and decoded batch by batch.
    Text: ``input_ids`` (B, W), and ``attention_mask`` (B, W) in batches with padding (on the right). ``labels`` are, by
    ``task``, with -100 for what is not scored:

    * ``causal-lm``: (B, W), the tokens themselves, each predicted at the position before;
    * ``masked-lm``, ``token-classification``: (B, W), what is predicted at the same position;
    * ``seq2seq-lm``: (B, T), the tokens of the target;
    * ``text-classification``: (B,), classes;
    * ``embedding``: (B/2,), the score of every two texts that follow each other; none for texts without scores.
    """

    same_every_pass: ClassVar[bool] = True
    kind: Kind
    task: TaskName = "causal-lm"
    """What the model they are for predicts, which says how they are scored."""
    description: dict[str, Any]
    """Where the examples come from and how they were chosen, ready for JSON."""
    num_samples: int
    """Images, texts or windows of text."""
    num_bytes: int | None = None
    """Evaluation of text: UTF-8 bytes that the scored tokens stand for."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes in the order of their labels, where the data tells."""
    max_label: int | None = None
    """The largest class among the samples, None without labels."""
    chunks: Sequence[Sequence[int]] = field(repr=False)
    """Indices of the examples of every batch."""
    collate: Callable[[Sequence[int]], Mapping[str, Tensor | None]] = field(repr=False)
    """Makes one batch; what is None counts as absent."""

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self.batch, self.chunks)

    def only(self, numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """The batches with these numbers."""
        return (self.batch(self.chunks[number]) for number in numbers)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The examples with these numbers, without what is None."""
        return {name: value for name, value in self.collate(indices).items() if value is not None}


def choose(available: int, config: DataConfig, *, default: int | None = None) -> np.ndarray:
    """Indices of the samples in random order: the first of a seeded permutation, all of it without a limit."""
    wanted = config.num_samples if config.num_samples is not None else min(default or available, available)
    if wanted > available:
        raise DataError(
            f"`num_samples={wanted}` is more than the {available} samples of `{config.source}`; "
            f"use at most {available}, or leave it out"
        )
    return np.random.default_rng(config.seed).permutation(available)[:wanted]


def chunk(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
