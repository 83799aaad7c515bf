"""What a model is fed: batches that are made when asked for, and the choice of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from fips.config import DataConfig
from fips.errors import DataError

__all__ = ["IGNORED_LABEL", "Batches", "Kind", "Purpose", "choose", "chunk"]

Kind = Literal["image", "text"]
Purpose = Literal["calibration", "evaluation"]

IGNORED_LABEL = -100
"""Label of positions that are not scored, as in every loss of ``transformers``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """Batches for ``model(**batch)``: sized, iterable any number of times, identical each time.

    Images: ``pixel_values`` and, where the data has them, ``labels`` (B,). Text: ``input_ids`` (B, W); for
    evaluation also ``labels`` (B, W), -100 where a position is context or padding and not scored, and
    ``attention_mask`` (B, W) in batches with padding (on the right). Images are read and decoded batch by batch.
    """

    same_every_pass: ClassVar[bool] = True
    kind: Kind
    description: dict[str, Any]
    """Where the examples come from and how they were chosen, ready for JSON."""
    num_samples: int
    """Images, or text windows."""
    num_bytes: int | None = None
    """Evaluation of text: UTF-8 bytes that the scored tokens stand for."""
    class_names: tuple[str, ...] | None = None
    """Images: names of the classes in the order of their labels, where the data tells."""
    max_label: int | None = None
    """Images: the largest label among the samples, None without labels."""
    chunks: Sequence[Sequence[int]] = field(repr=False)
    """Indices of the examples of every batch."""
    collate: Callable[[Sequence[int]], dict[str, Tensor]] = field(repr=False)
    """Makes one batch."""

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self.collate, self.chunks)

    def only(self, numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """The batches with these numbers."""
        return (self.collate(self.chunks[number]) for number in numbers)


def choose(available: int, config: DataConfig, *, default: int | None = None) -> np.ndarray:
    """Indices of the samples in random order: the first of a seeded permutation, all of it without a limit."""
    wanted = config.num_samples if config.num_samples is not None else min(default or available, available)
    if wanted > available:
        raise DataError(
            f"`num_samples={wanted}` is more than the {available} samples of `source={config.source}`; "
            f"use at most {available}, or leave it out"
        )
    return np.random.default_rng(config.seed).permutation(available)[:wanted]


def chunk(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
