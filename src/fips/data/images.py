"""Images as batches of pixels, decoded one batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets
import torch
from torch import Tensor

from fips.config import DataConfig
from fips.data.batches import Batches, choose, chunk
from fips.data.rows import class_column, find_column, first_line
from fips.errors import DataError
from fips.models.tasks import IMAGES, Task

__all__ = ["DEFAULT_CALIBRATION_IMAGES", "decode", "image_batches"]

DEFAULT_CALIBRATION_IMAGES = 1024
"""Drawn at random; all of ImageNet would take days and tell no more."""


def image_batches(rows: Any, config: DataConfig, processor: Any, description: dict[str, Any], task: Task) -> Batches:
    """Batches of ``pixel_values`` (batch, channels, height, width), with ``labels`` (batch,) where the data has them.

    Raises ``DataError`` without a column of images, or for labels that the model does not have.
    """
    column = find_column(rows.features, config, "image")
    label_column = class_column(rows.features)
    kept = rows.select_columns([column] if label_column is None else [column, label_column])
    scored = description["purpose"] == "evaluation"
    indices = choose(len(kept), config, default=None if scored else DEFAULT_CALIBRATION_IMAGES)
    if scored:
        indices.sort()  # neighbors on disk are read together
    kept = kept.select(indices).cast_column(column, datasets.Image(mode="RGB"))
    labels, names = _labels(
        kept, label_column, required_by=config.source if scored and task.name == IMAGES.name else None
    )
    collate = partial(_collate_images, kept, column, processor, labels)
    probe = collate([0])["pixel_values"]
    return Batches(
        kind="image",
        task=task.name,
        description={
            **description,
            "num_samples": len(kept),
            "size": list(probe.shape[1:]),
            "processor": type(processor).__name__,
            "num_classes": None if names is None else len(names),
        },
        num_samples=len(kept),
        class_names=names,
        max_label=None if labels is None else int(labels.max()),
        chunks=chunk(range(len(kept)), config.batch_size),
        collate=collate,
    )


def _labels(rows: Any, column: str | None, *, required_by: str | None) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Labels (N,) as int64 and the names of the classes; both None unless every image is labeled."""
    if column is None:
        return None, None
    values = rows[column][:]
    if any(value is None or value < 0 for value in values):
        if required_by is None:
            return None, None
        raise DataError(
            f"`{required_by}` has images without a label (missing or negative) in column `{column}`; "
            "use a labeled split, for example `split: validation`"
        )
    feature = rows.features[column]
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return torch.tensor(values, dtype=torch.int64), names


def _collate_images(
    rows: Any, column: str, processor: Any, labels_N: Tensor | None, indices: Sequence[int]
) -> dict[str, Tensor]:
    images = [decode(rows, column, index) for index in indices]
    batch: dict[str, Tensor] = {"pixel_values": processor(images=images, return_tensors="pt")["pixel_values"]}
    if labels_N is not None:
        batch["labels"] = labels_N[list(indices)]
    return batch


def decode(rows: Any, column: str, index: int) -> Any:
    """One RGB image, turned upright; the error for a file that no decoder accepts names it."""
    try:
        return rows[index][column]
    except Exception as error:
        encoded = rows.cast_column(column, datasets.Image(decode=False))[index][column]
        raise DataError(
            f"image `{encoded['path'] or f'row {index}'}` cannot be decoded: {first_line(error)}; replace or remove it"
        ) from error
