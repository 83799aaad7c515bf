"""From a setting to batches: everything that can be refused without reading the data is refused first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

import datasets
from torch import nn

from fips.config import DataConfig
from fips.data.batches import Batches, Kind, Purpose
from fips.data.chats import require_template
from fips.data.encoded import encoded_batches
from fips.data.images import DEFAULT_CALIBRATION_IMAGES, image_batches
from fips.data.labelled import (
    class_batches,
    pair_batches,
    score_batches,
    score_column,
    target_columns,
    word_batches,
)
from fips.data.mixture import counts_of, mixed_batches, mixture_of
from fips.data.pictures import has_pictures, picture_batches
from fips.data.rows import features_of, load_rows, streams, taken, wrong_kind
from fips.data.source import WHOLE, Source, describe_source
from fips.data.text import DEFAULT_CALIBRATION_WINDOWS, SHUFFLE_BUFFER, text_batches
from fips.errors import ConfigError, DataError, ModelError
from fips.models.reading import kind_of, longest_sequence, processor_of
from fips.models.tasks import CAUSAL, IMAGES, Task, task_of
from fips.models.timm import PixelBatches, is_timm_model

__all__ = ["load_batches", "load_data", "window_length"]

MAX_SEQUENCE_LENGTH = 2048
IMAGE_BUFFER = 2000
"""Rows of a stream of images that are shuffled among each other."""
CALIBRATION_LENGTH = 512
"""Tokens of a window where layers are only looked at: with 128 windows 65,536. On SmolLM2-135M at 4.2 bits the KL to
the original fell from 0.087 to 0.077 and 0.073 as 8, 16 and 32 thousand tokens were used, half as much at each step."""


TABLES: Mapping[str, str] = {
    "text-classification": "texts with a `label` column",
    "token-classification": "lists of words with a label for each",
    "seq2seq-lm": "two columns of text, `--column SOURCE,TARGET`",
}
"""What models are scored on that no plain text holds."""


def load_data(
    source: str, model: nn.Module, *, processor: Any = None, purpose: Purpose = "calibration", **options: Any
) -> Any:
    """The examples of a source as batches for ``model``: to give to ``fips.compress``, or to ``fips.evaluate``.

    ``source`` is an image folder (one sub-folder per class), a text file, or a ``datasets`` id with an optional
    configuration, ``id:configuration``; ``options`` are the other fields of ``DataConfig``, such as ``num_samples`` and
    ``sequence_length``. ``processor`` is the tokenizer or image processor of the model, by default the one that lies
    where the model was loaded from. Evaluation, ``purpose="evaluation"``, scores every token once and takes all images.

    Raises ``ConfigError`` for an unknown option, ``DataError`` for data that is not there or not what the model reads,
    ``ModelError`` for a model that needs more than a text or an image.
    """
    if purpose not in get_args(Purpose):
        raise ConfigError(f"`purpose` must be {' or '.join(get_args(Purpose))}, got {purpose!r}")
    config, kind, task = DataConfig(source=source, **options), kind_of(model), task_of(model)
    if processor is None:
        place = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
        processor = processor_of(place, model) if place or is_timm_model(model) else None
    batches = load_batches(
        config, processor=processor, kind=kind, purpose=purpose, context_length=longest_sequence(model), task=task
    )
    return PixelBatches(batches) if is_timm_model(model) and purpose == "calibration" else batches


def load_batches(
    config: DataConfig,
    *,
    processor: Any,
    kind: Kind,
    purpose: Purpose,
    context_length: int | None = None,
    task: Task | None = None,
) -> Batches:
    """The examples ``config`` asks for, prepared by ``processor`` for a model that reads ``kind``.

    ``processor`` is the image processor or tokenizer of the model, ``context_length`` the most tokens the model
    accepts, ``task`` what it predicts: by default classes of images, or the next token. Everything that can be refused
    without reading the data is refused first.

    Calibration: images in random order, by default 1,024; text windows or texts, by default 128.
    Evaluation: all images, texts or windows. Windows of W tokens score every token exactly once, except the first of a
    document when the tokenizer has no beginning-of-sequence token. Encoders read texts with their special tokens;
    those of masked language models have some tokens hidden, for either purpose.
    """
    task = task or (IMAGES if kind == "image" else CAUSAL)
    shares = mixture_of(config.source)
    if shares is not None:
        return _mixed(
            shares, config, processor=processor, kind=kind, purpose=purpose, context_length=context_length, task=task
        )
    source = describe_source(config.source)
    _check_request(source, config, processor=processor, kind=kind, purpose=purpose, task=task)
    length = window_length(config, context_length, purpose) if kind == "text" else None
    rows, split = load_rows(source, config, kind=kind, purpose=purpose)
    description: dict[str, Any] = {
        "source": config.source,
        "split": None if split == WHOLE else split,
        "purpose": purpose,
        "seed": config.seed,
        "batch_size": config.batch_size,
        **{name: value for name in ("column", "chat", "stream") if (value := getattr(config, name))},
    }
    streamed = isinstance(rows, datasets.IterableDataset)
    if length is None:
        if streamed:
            rows = taken(rows, config, config.num_samples or DEFAULT_CALIBRATION_IMAGES, buffer=IMAGE_BUFFER)
        return image_batches(rows, config, processor, description, task)
    sees, processor = processor, getattr(processor, "tokenizer", processor)
    if sees is not processor and has_pictures(features_of(rows)):
        if streamed:
            rows = taken(rows, config, config.num_samples or DEFAULT_CALIBRATION_WINDOWS, buffer=IMAGE_BUFFER)
        return picture_batches(rows, config, sees, description, task)
    if task.name == "causal-lm":
        return text_batches(rows, config, processor, length, description)
    builder = _builder(features_of(rows), config, task, scored=purpose == "evaluation")
    if streamed and builder is not encoded_batches:
        rows = taken(rows, config, config.num_samples or DEFAULT_CALIBRATION_WINDOWS, buffer=SHUFFLE_BUFFER)
    return builder(rows, config, processor, length, description, task)


def _mixed(shares: Mapping[str, float], config: DataConfig, **options: Any) -> Batches:
    """Samples of several sources, so many of each as its share says."""
    if options["purpose"] == "evaluation":
        raise DataError(f"`{config.source}` is a mixture, which is for calibration; evaluate on each by itself")
    default = DEFAULT_CALIBRATION_WINDOWS if options["kind"] == "text" else DEFAULT_CALIBRATION_IMAGES
    counts = counts_of(shares, config.num_samples or default)
    for name in counts:
        _check_request(
            describe_source(name), config.replace(source=name),
            **{key: value for key, value in options.items() if key != "context_length"},
        )  # fmt: skip
    parts = {
        name: load_batches(config.replace(source=name, num_samples=count), **options) for name, count in counts.items()
    }
    return mixed_batches(
        parts, config, getattr(options["processor"], "pad_token_id", None) or 0, purpose=options["purpose"]
    )


def _builder(features: Any, config: DataConfig, task: Task, *, scored: bool) -> Callable[..., Batches]:
    """What makes texts of rows for a model that is no causal language model."""
    if config.chat:
        return encoded_batches
    if task.name == "seq2seq-lm" and (scored or not task.reads_text_alone or target_columns(features, config)):
        return pair_batches
    if task.name == "text-classification" and (scored or "," in (config.column or "")):
        return class_batches
    if task.name == "token-classification" and scored:
        return word_batches
    if task.name == "embedding" and scored and score_column(features, config):
        return score_batches
    return encoded_batches


def _check_request(
    source: Source, config: DataConfig, *, processor: Any, kind: Kind, purpose: Purpose, task: Task
) -> None:
    """Refuse what cannot work before any example is read."""
    if task.name == "other" and purpose == "evaluation":
        raise ModelError(
            f"`{task.model}` has no metric here: language models, masked ones, encoder-decoders, classifiers of "
            "images, texts or words, and models without a head have; evaluate it in a loop of your own"
        )
    sees = hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")
    if source.kind not in (None, kind) and not (sees and source.kind == "image"):
        raise DataError(wrong_kind(config, kind))
    if processor is None:
        what = "an image processor (preprocessor_config.json)" if kind == "image" else "a tokenizer (tokenizer.json)"
        raise DataError(f"`{config.source}` needs {what} of the model, got none; save it next to the weights")
    if kind == "image":
        unused = [name for name in ("sequence_length", "document_separator") if getattr(config, name) is not None]
        unused += ["chat"] if config.chat else []
        if unused:
            raise DataError(f"`{'`, `'.join(unused)}` only applies to text, but the model reads images; remove it")
    if config.document_separator == "":
        raise DataError("`document_separator` is empty; leave it out to read the text as one stream")
    if config.chat:
        if config.document_separator is not None:
            raise DataError("every chat is a document of its own; leave `document_separator` out, or `chat`")
        require_template(getattr(processor, "tokenizer", processor))
    if source.kind == "text" and task.name in TABLES and (purpose == "evaluation" or not task.reads_text_alone):
        raise DataError(
            f"`{config.source}` is plain text, and `{task.model}` needs {TABLES[task.name]}; give a table "
            "(.csv, .jsonl, .parquet) or a `datasets` id that has them"
        )
    if streams(source, config, purpose) and purpose == "evaluation" and config.num_samples is None:
        raise DataError(f"`{config.source}` is too large to evaluate whole; set `num_samples`, for example 256")


def window_length(config: DataConfig, context_length: int | None, purpose: Purpose) -> int:
    """Tokens of a text window; raises ``DataError`` if the model does not accept as many as asked for."""
    if config.sequence_length is None:
        most = CALIBRATION_LENGTH if purpose == "calibration" else MAX_SEQUENCE_LENGTH
        return min(context_length or most, most)
    if context_length is not None and config.sequence_length > context_length:
        raise DataError(
            f"`sequence_length={config.sequence_length}` is more than the {context_length} tokens the model accepts; "
            f"use at most {context_length}"
        )
    return config.sequence_length
