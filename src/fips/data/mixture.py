"""Calibration data of several sources in given shares: ``a.txt:0.7,owner/name:0.3``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fips.config import DataConfig
from fips.data.batches import IGNORED_LABEL, Batches, chunk
from fips.errors import DataError

__all__ = ["counts_of", "mixed_batches", "mixture_of"]


def mixture_of(source: str) -> dict[str, float] | None:
    """The sources of a mixture with their shares, which are divided by their sum; None for a single source.

    A name with a comma that exists as a file or directory is a single source. Raises ``DataError`` where a share lacks
    or is no positive number.
    """
    if "," not in source or os.path.exists(os.path.expanduser(source)):
        return None
    found: dict[str, float] = {}
    for part in source.split(","):
        name, _, share = part.strip().rpartition(":")
        try:
            number = float(share)
        except ValueError:
            number = 0.0
        if not name or not 0 < number < float("inf"):
            raise DataError(f"`{source}` is a list, and `{part.strip()}` has no share; write `a.txt:0.7,b.txt:0.3`")
        if name in found:
            raise DataError(f"`{source}` names `{name}` twice; add up its shares")
        found[name] = number
    return {name: number / sum(found.values()) for name, number in found.items()}


def counts_of(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """How many of ``total`` samples each source gives: rounded down, the rest to those that lost most by it."""
    if total < len(shares):
        raise DataError(f"`num_samples={total}` is less than the {len(shares)} sources that are mixed; use more")
    counts = {name: max(1, int(share * total)) for name, share in shares.items()}
    lost = sorted(shares, key=lambda name: counts[name] - shares[name] * total)
    for name in lost[: max(0, total - sum(counts.values()))]:
        counts[name] += 1
    return counts


def mixed_batches(parts: Mapping[str, Batches], config: DataConfig, padding: int, **description: Any) -> Batches:
    """The samples of several sources in one random order."""
    sources = list(parts.values())
    samples = [(source, index) for source, part in enumerate(sources) for index in _samples(part)]
    order = np.random.default_rng(config.seed).permutation(len(samples))
    first = sources[0]
    return Batches(
        kind=first.kind,
        task=first.task,
        description={
            **description,
            "source": config.source,
            "seed": config.seed,
            "batch_size": config.batch_size,
            "num_samples": len(samples),
            "mixture": [part.description for part in sources],
        },
        num_samples=len(samples),
        chunks=chunk([int(index) for index in order], config.batch_size),
        collate=partial(_collate, sources, samples, padding),
    )


def _samples(part: Batches) -> list[int]:
    return [index for indices in part.chunks for index in indices]


def _collate(
    sources: Sequence[Batches], samples: Sequence[tuple[int, int]], padding: int, indices: Sequence[int]
) -> dict[str, Tensor]:
    rows = [sources[source].batch([index]) for source, index in (samples[one] for one in indices)]
    names = [name for name in rows[0] if all(name in row for row in rows) and name != "attention_mask"]
    batch = {name: _stacked([row[name] for row in rows], _filler(name, padding)) for name in names}
    if "input_ids" in batch:
        lengths_E1 = torch.tensor([[row["input_ids"].shape[1]] for row in rows])
        mask_EW = torch.arange(batch["input_ids"].shape[1]) < lengths_E1
        if not mask_EW.all():
            batch["attention_mask"] = mask_EW.long()
    return batch


def _filler(name: str, padding: int) -> int:
    return {"input_ids": padding, "labels": IGNORED_LABEL}.get(name, 0)


def _stacked(rows: Sequence[Tensor], filler: int) -> Tensor:
    """Rows of one example each, of tokens padded to the longest."""
    if rows[0].dim() != 2:
        return torch.cat(list(rows))
    width = max(row.shape[1] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1]), value=filler) for row in rows])
