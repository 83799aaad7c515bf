"""Texts with labels: one for each, one for every word of each, another text, or a score of how alike two are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import datasets
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fips.config import DataConfig
from fips.data.batches import IGNORED_LABEL, Batches, choose, chunk
from fips.data.rows import LABELS, class_column, columns_in_words, find_columns, text_columns
from fips.data.text import DEFAULT_CALIBRATION_WINDOWS
from fips.errors import DataError
from fips.models.tasks import Task

__all__ = ["class_batches", "pair_batches", "score_batches", "score_column", "target_columns", "word_batches"]

SCORES = ("score", "similarity_score", "similarity", *LABELS)
"""Columns that say how alike two texts are."""
WORDS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "pos_tags", "upos", "chunk_tags", *LABELS)
TARGETS = (
    ("source", "target"), ("document", "summary"), ("article", "highlights"), ("text", "summary"),
    ("dialogue", "summary"), ("input", "output"), ("question", "answer"),
)  # fmt: skip
"""Usual names of columns with sources and targets."""
Fields = Mapping[str, Sequence[int]]
T = TypeVar("T")


def class_batches(
    rows: Any, config: DataConfig, tokenizer: Any, length: int, description: dict[str, Any], task: Task
) -> Batches:
    """Texts, or pairs of them (two columns), cut to ``length`` tokens, with ``labels`` (batch,) for an evaluation."""
    scored = description["purpose"] == "evaluation"
    label_column = class_column(rows.features, named=True)
    columns = find_columns(rows.features, config, "text", without=label_column)
    if len(columns) > 2:
        raise DataError(f"`column={config.column}` names {len(columns)} columns; a classifier reads one text or two")
    if label_column is None and scored:
        raise DataError(
            f"`{config.source}` has no column of labels (`{'`, `'.join(LABELS)}`), which accuracy needs; its "
            f"columns: {columns_in_words(rows.features)}"
        )
    kept = _chosen(rows, config, scored=scored)
    encoded = _encode(tokenizer, *(kept[column][:] for column in columns), length=length)
    labels, names = (None, None)
    if scored and label_column is not None:
        labels, names = _classes(kept[label_column][:], rows.features[label_column], label_column, config, task)
    return _batches(
        encoded, None if labels is None else torch.tensor(labels), config, tokenizer, task,
        {**description, "sequence_length": length, "columns": columns, "num_classes": names and len(names)},
        class_names=names, max_label=None if labels is None else max(labels),
    )  # fmt: skip


def _classes(
    values: Sequence[Any], feature: Any, column: str, config: DataConfig, task: Task
) -> tuple[list[int], tuple[str, ...] | None]:
    """Labels as the numbers the model gives classes, and the names of the classes where the data numbers them."""
    if any(value is None or (isinstance(value, int) and value < 0) for value in values):
        raise DataError(
            f"`{config.source}` has rows without a label (missing or negative) in column `{column}`; use a "
            "labelled split, for example `split: validation`"
        )
    if isinstance(feature, datasets.ClassLabel):
        return list(values), tuple(feature.names)
    return _numbers(values, config, task), None


def _numbers(values: Sequence[Any], config: DataConfig, task: Task) -> list[int]:
    """Labels given as names in the model's own numbers."""
    if not values or not isinstance(values[0], str):
        return [int(value) for value in values]
    known = {name: number for number, name in enumerate(task.labels or ())}
    unknown = sorted(set(values) - known.keys())
    if unknown:
        raise DataError(
            f"`{config.source}` has the label `{unknown[0]}`, which `{task.model}` does not know; it knows "
            f"{', '.join(f'`{name}`' for name in list(known)[:8])}: rename them, or give their numbers"
        )
    return [known[value] for value in values]


def word_batches(
    rows: Any, config: DataConfig, tokenizer: Any, length: int, description: dict[str, Any], task: Task
) -> Batches:
    """Lists of words cut to ``length`` tokens, with ``labels`` (batch, W) at the first token of every word."""
    lists = {name: feature.feature for name, feature in rows.features.items() if hasattr(feature, "feature")}
    words = _first([name for name in WORDS if name in lists])
    tags = _first([name for name in TAGS if name in lists])
    if words is None or tags is None:
        raise DataError(
            f"`{config.source}` has no lists of words (`{'`, `'.join(WORDS)}`) with a label for each (`"
            f"{'`, `'.join(TAGS)}`), which `{task.model}` is scored on; its columns: {columns_in_words(rows.features)}"
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"`{type(tokenizer).__name__}` does not say which tokens belong to a word; give a tokenizer.json"
        )
    kept = _chosen(rows, config, scored=True)
    encoded = tokenizer(kept[words][:], is_split_into_words=True, truncation=True, max_length=length, verbose=False)
    names = tuple(lists[tags].names) if isinstance(lists[tags], datasets.ClassLabel) else None
    labels = []
    for index, values in enumerate(kept[tags][:]):
        values = list(values) if names is not None else _numbers(values, config, task)
        places = encoded.word_ids(index)
        starts = [place is not None and place not in places[:at] for at, place in enumerate(places)]
        labels.append(
            torch.tensor(
                [values[place] if start else IGNORED_LABEL for start, place in zip(starts, places, strict=True)]
            )
        )
    return _batches(
        _fields(encoded, tokenizer), labels, config, tokenizer, task,
        {**description, "sequence_length": length, "columns": [words, tags], "num_classes": names and len(names)},
        class_names=names, max_label=max((int(one.max()) for one in labels if len(one)), default=None),
    )  # fmt: skip


def target_columns(features: Any, config: DataConfig) -> tuple[str, str] | None:
    """The columns with sources and targets, or the languages of a ``translation`` column; None if there are none."""
    names = set(text_columns(features))
    translation = features.get("translation")
    languages = list(translation) if isinstance(translation, Mapping) else list(getattr(translation, "languages", []))
    if config.column is not None:
        first, _, second = (name.strip() for name in config.column.partition(","))
        asked = {first, second}
        return (first, second) if names >= asked or set(languages) >= asked else None
    return _first([pair for pair in TARGETS if names >= set(pair)])


def pair_batches(
    rows: Any, config: DataConfig, tokenizer: Any, length: int, description: dict[str, Any], task: Task
) -> Batches:
    """Sources cut to ``length`` tokens, with targets as ``labels`` (batch, T), for calibration too."""
    columns = target_columns(rows.features, config)
    if columns is None:
        raise DataError(
            f"`{task.model}` reads a source and predicts a target: `{config.source}` needs two columns of text, "
            f"named by `--column SOURCE,TARGET`; its columns: {columns_in_words(rows.features)}"
        )
    kept = _chosen(rows, config, scored=description["purpose"] == "evaluation")
    if columns[0] in rows.features:
        sources, targets = (kept[column][:] for column in columns)
    else:
        sources, targets = ([row[column] for row in kept["translation"][:]] for column in columns)
    encoded = _encode(tokenizer, sources, length=length)
    answers = tokenizer(text_target=targets, truncation=True, max_length=length, verbose=False)["input_ids"]
    return _batches(
        encoded, [torch.tensor(one) for one in answers], config, tokenizer, task,
        {**description, "sequence_length": length, "columns": list(columns)},
    )  # fmt: skip


def score_column(features: Any, config: DataConfig) -> str | None:
    """The column that says how alike the two texts of a row are; None if rows are no such pairs."""
    if len(_pair(features, config)) != 2:
        return None
    numbers = ("int", "float", "double")
    return _first([name for name in SCORES if getattr(features.get(name), "dtype", "").startswith(numbers)])


def _pair(features: Any, config: DataConfig) -> list[str]:
    return text_columns(features) if config.column is None else [one.strip() for one in config.column.split(",")]


def score_batches(
    rows: Any, config: DataConfig, tokenizer: Any, length: int, description: dict[str, Any], task: Task
) -> Batches:
    """Pairs of texts that follow each other, cut to ``length`` tokens, with their scores as ``labels`` (pairs,)."""
    column = score_column(rows.features, config)
    assert column is not None
    columns = find_columns(rows.features, config.replace(column=",".join(_pair(rows.features, config))), "text")
    kept = _chosen(rows, config, scored=True)
    texts = [text for pair in zip(*(kept[name][:] for name in columns), strict=True) for text in pair]
    encoded = _encode(tokenizer, texts, length=length)
    scores = torch.tensor(kept[column][:], dtype=torch.float64)
    pairs = [encoded[index : index + 2] for index in range(0, len(encoded), 2)]
    return Batches(
        kind="text",
        task=task.name,
        description={
            **description, "sequence_length": length, "columns": columns, "score": column, "scored_pairs": len(scores),
            "num_samples": len(pairs),
        },
        num_samples=len(pairs),
        chunks=chunk(range(len(pairs)), config.batch_size),
        collate=partial(_collate_pairs, pairs, scores, tokenizer.pad_token_id or 0),
    )  # fmt: skip


def _collate_pairs(
    pairs: Sequence[Sequence[Fields]], scores: Tensor, padding: int, indices: Sequence[int]
) -> dict[str, Tensor]:
    rows = [row for index in indices for row in pairs[index]]
    return {**_padded_fields(rows, padding), "labels": scores[list(indices)]}


def _first(found: Sequence[T]) -> T | None:
    return found[0] if found else None


def _chosen(rows: Any, config: DataConfig, *, scored: bool) -> Any:
    """The rows that are used, in the order of the data for an evaluation."""
    indices = choose(len(rows), config, default=None if scored else DEFAULT_CALIBRATION_WINDOWS)
    if scored:
        indices.sort()
    return rows.select(indices)


def _encode(tokenizer: Any, *texts: Sequence[str | None], length: int) -> list[Fields]:
    """Texts, or pairs of them, with special tokens, cut to ``length`` tokens."""
    filled = [[text or "" for text in column] for column in texts]
    return _fields(tokenizer(*filled, truncation=True, max_length=length, verbose=False), tokenizer)


def _fields(encoded: Any, tokenizer: Any) -> list[Fields]:
    """What the model reads of every text; masks are made where there is padding."""
    names = [name for name in encoded if name in tokenizer.model_input_names and name != "attention_mask"]
    return [{name: encoded[name][index] for name in names} for index in range(len(encoded["input_ids"]))]


def _batches(
    encoded: Sequence[Fields],
    labels: Tensor | Sequence[Tensor] | None,
    config: DataConfig,
    tokenizer: Any,
    task: Task,
    description: dict[str, Any],
    **more: Any,
) -> Batches:
    """Batches of texts of like length, long ones first."""
    empty = next((index for index, one in enumerate(encoded) if not one["input_ids"]), None)
    if empty is not None:
        raise DataError(f"row {empty} of `{config.source}` has no text; remove it")
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]["input_ids"]))
    return Batches(
        kind="text",
        task=task.name,
        description={**description, "num_samples": len(encoded)},
        num_samples=len(encoded),
        chunks=chunk(order, config.batch_size),
        collate=partial(_collate, encoded, labels, tokenizer.pad_token_id or 0),
        **more,
    )


def _collate(
    encoded: Sequence[Fields], labels: Tensor | Sequence[Tensor] | None, padding: int, indices: Sequence[int]
) -> dict[str, Tensor]:
    batch = _padded_fields([encoded[index] for index in indices], padding)
    if isinstance(labels, Tensor):
        batch["labels"] = labels[list(indices)]
    elif labels is not None:
        chosen = [labels[index] for index in indices]
        batch["labels"] = pad_sequence(chosen, batch_first=True, padding_value=IGNORED_LABEL)
    return batch


def _padded_fields(rows: Sequence[Fields], padding: int) -> dict[str, Tensor]:
    """Every field (batch, W), padded on the right, and ``attention_mask`` where there is padding."""
    batch = {
        name: pad_sequence(
            [torch.tensor(row[name]) for row in rows],
            batch_first=True,
            padding_value=padding if name == "input_ids" else 0,
        )
        for name in rows[0]
    }
    lengths_E1 = torch.tensor([[len(row["input_ids"])] for row in rows])
    mask_EW = torch.arange(batch["input_ids"].shape[1]) < lengths_E1
    if not mask_EW.all():
        batch["attention_mask"] = mask_EW.long()
    return batch
