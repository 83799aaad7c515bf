"""Images with texts for language models that see, prepared by the processor of the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets
from torch import Tensor

from fips.config import DataConfig
from fips.data.batches import Batches, choose, chunk
from fips.data.images import decode
from fips.data.rows import find_column, first_line
from fips.data.text import DEFAULT_CALIBRATION_WINDOWS
from fips.errors import DataError
from fips.models.tasks import Task

__all__ = ["has_pictures", "picture_batches"]


def has_pictures(features: Any) -> bool:
    return any(isinstance(feature, datasets.Image) for feature in features.values())


def picture_batches(rows: Any, config: DataConfig, processor: Any, description: dict[str, Any], task: Task) -> Batches:
    """Batches of all inputs that the processor makes of an image and a text, by default of 128 rows.

    The two are a question of a user in the chat template of the model, or the image token before the text where it has
    none. For calibration only. Raises ``DataError`` without a column of each, or for an evaluation.
    """
    if description["purpose"] == "evaluation":
        raise DataError(
            f"`{config.source}` has images beside texts, which `{task.model}` is calibrated on but not scored; "
            "evaluate on texts alone"
        )
    image = find_column(rows.features, config.replace(column=None), "image")
    words = {name: feature for name, feature in rows.features.items() if name != image}
    text = find_column(words, config, "text")
    indices = choose(len(rows), config, default=DEFAULT_CALIBRATION_WINDOWS)
    kept = rows.select_columns([image, text]).select(indices).cast_column(image, datasets.Image(mode="RGB"))
    collate = partial(_collate, kept, image, text, processor)
    collate([0])
    return Batches(
        kind="text",
        task=task.name,
        description={**description, "num_samples": len(kept), "columns": [image, text],
                     "processor": type(processor).__name__},
        num_samples=len(kept),
        chunks=chunk(range(len(kept)), config.batch_size),
        collate=collate,
    )  # fmt: skip


def _collate(rows: Any, image: str, text: str, processor: Any, indices: Sequence[int]) -> dict[str, Tensor]:
    pictures = [decode(rows, image, index) for index in indices]
    texts = [_prompt(processor, rows[index][text] or "") for index in indices]
    try:
        found = processor(images=[[one] for one in pictures], text=texts, padding=True, return_tensors="pt")
    except Exception as error:  # each processor has its own demands
        raise DataError(
            f"`{type(processor).__name__}` cannot read an image with a text: {first_line(error)}; in Python any batch "
            "can be given to `fips.compress`"
        ) from error
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _prompt(processor: Any, text: str) -> str:
    if getattr(processor, "chat_template", None) is None:
        return f"{getattr(processor, 'image_token', '<image>')}\n{text}"
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
