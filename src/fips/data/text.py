"""Texts as windows of tokens: full ones for calibration, windows that score every token once for evaluation.

Shapes: W tokens of a window, N tokens of a document.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fips.config import DataConfig
from fips.data.batches import IGNORED_LABEL, Batches, choose, chunk
from fips.data.chats import chat_column, chat_text
from fips.data.rows import features_of, find_columns, loading_errors
from fips.errors import DataError

__all__ = [
    "DEFAULT_CALIBRATION_WINDOWS",
    "ROW_SEPARATOR",
    "SHUFFLE_BUFFER",
    "Document",
    "padded",
    "parts_of",
    "text_batches",
    "texts_of",
    "tokenized",
]

DEFAULT_CALIBRATION_WINDOWS = 128
ROW_SEPARATOR = "\n\n"
"""Put between the rows of a text without `document_separator`, as is usual for WikiText-2 perplexities."""

SHUFFLE_BUFFER = 10_000
TEXTS_PER_CALL = 256

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens (N,) of one text, and the UTF-8 bytes each of them stands for (N,)."""

    tokens: Tensor
    num_bytes: np.ndarray


@dataclass(frozen=True, slots=True)
class _Window:
    """Input tokens (W,), the first of which is context when scoring, and the bytes the others stand for."""

    tokens: Tensor
    num_bytes: int


def text_batches(rows: Any, config: DataConfig, tokenizer: Any, length: int, description: dict[str, Any]) -> Batches:
    """Batches of windows of ``length`` tokens: ``input_ids`` and, where some are shorter, ``attention_mask``, both
    (batch, length). Raises ``DataError`` for texts without a whole window.
    """
    scored = description["purpose"] == "evaluation"
    limit = config.num_samples or (None if scored else DEFAULT_CALIBRATION_WINDOWS)
    streamed = isinstance(rows, datasets.IterableDataset)
    separate = streamed or config.document_separator is not None or config.chat
    texts = texts_of(rows, config, tokenizer)
    parts = parts_of(texts, config, separate=separate)
    documents = tokenized(parts, tokenizer, count_bytes=scored, enough=length * limit if streamed and limit else None)
    bos = None if config.chat else _bos_token(tokenizer)  # a template has its own
    windows = _scored_windows(documents, length, bos) if scored else _full_windows(documents, length, bos)
    num_tokens = sum(len(document.tokens) for document in documents)
    if not windows:
        raise DataError(
            f"`{config.source}` has {num_tokens} tokens of text, a window needs {2 if scored else length}; "
            "give more text" + ("" if scored else " or lower `sequence_length`")
        )
    chosen = choose(len(windows), config, default=limit)
    description |= {
        "sequence_length": length,
        "document_separator": config.document_separator,
        "row_separator": None if separate else ROW_SEPARATOR,
        "num_documents": len(documents),
        "num_tokens": num_tokens,
        "bos_token": bos,
    }
    return _window_batches([windows[index] for index in chosen], config, tokenizer, description)


def texts_of(rows: Any, config: DataConfig, tokenizer: Any) -> Iterator[str]:
    """The text of every row, of several columns one below the other, or a chat in the tokenizer's template.

    A stream is shuffled within a buffer of 10,000 rows.
    """
    with loading_errors(config.source, local=False):
        features = features_of(rows)
        if isinstance(rows, datasets.IterableDataset):
            rows = rows.shuffle(seed=config.seed, buffer_size=SHUFFLE_BUFFER)
        if config.chat:
            column = chat_column(features, config)
            for row in rows.select_columns([column]):
                yield chat_text(row[column], tokenizer, config)
            return
        columns = find_columns(features, config, "text")
        for row in rows.select_columns(columns):
            yield "\n".join(row[column] for column in columns if row[column])


def parts_of(texts: Iterable[str], config: DataConfig, *, separate: bool) -> Iterator[str]:
    """What is tokenized as one: documents, chats as their template ends them, or all there is."""
    if config.chat:
        return filter(None, texts)
    return _documents(texts, config.document_separator) if separate else iter([ROW_SEPARATOR.join(texts)])


def _documents(texts: Iterable[str], separator: str | None) -> Iterator[str]:
    """The parts between separators, without surrounding whitespace, without empty ones."""
    for text in texts:
        for part in [text] if separator is None else text.split(separator):
            if document := part.strip():
                yield document


def _bos_token(tokenizer: Any) -> int | None:
    """The beginning-of-sequence token, if the tokenizer puts it before every text by itself."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos] else None


def tokenized(texts: Iterable[str], tokenizer: Any, *, count_bytes: bool, enough: int | None) -> list[Document]:
    """Every text on its own, without special tokens; stops reading at ``enough`` tokens."""
    offsets = count_bytes and tokenizer.is_fast
    if count_bytes and not offsets:
        log.warning("%s has no character offsets: bytes are spread evenly over tokens", type(tokenizer).__name__)
    documents, total, texts = [], 0, iter(texts)
    while batch := list(itertools.islice(texts, TEXTS_PER_CALL)):
        encoded = tokenizer(
            batch, add_special_tokens=False, return_offsets_mapping=offsets, verbose=False
        )  # verbose=False: texts longer than the model's context are cut into windows here
        for index, (text, tokens) in enumerate(zip(batch, encoded["input_ids"], strict=True)):
            num_bytes_T = _bytes_per_token(text, len(tokens), encoded["offset_mapping"][index] if offsets else None)
            documents.append(Document(torch.tensor(tokens, dtype=torch.int64), num_bytes_T))
            total += len(tokens)
        if enough is not None and total >= enough:
            break
    return [document for document in documents if len(document.tokens)]


def _bytes_per_token(text: str, num_tokens: int, offsets: Sequence[tuple[int, int]] | None) -> np.ndarray:
    """UTF-8 bytes from the end of the token before to the end of each token (N,); their sum is the whole text.

    ``offsets`` are the character spans of the tokens. A character that is spread over several tokens counts for
    the first of them. Without offsets every token counts the same, up to rounding.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    ends_bytes = np.concatenate([[0], np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF))])
    if offsets is None or num_tokens == 0:
        return np.diff(np.linspace(0, ends_bytes[-1], num_tokens + 1).astype(np.int64))
    ends = np.maximum.accumulate(np.array([end for _, end in offsets]))
    ends[-1] = len(text)
    return np.diff(ends_bytes[ends], prepend=0)


def _scored_windows(documents: Iterable[Document], length: int, bos: int | None) -> list[_Window]:
    """Windows of one token of context and up to W - 1 scored tokens, which together cover every document once.

    The context is the beginning-of-sequence token, or without one the token before, so that only the first token
    of a document is never scored.
    """
    windows = []
    for document in documents:
        tokens_T = document.tokens
        for start in range(0 if bos is not None else 1, len(tokens_T), length - 1):
            stop = start + length - 1
            context = tokens_T[start - 1 : start] if bos is None else torch.tensor([bos])
            num_bytes = int(document.num_bytes[start:stop].sum())
            windows.append(_Window(torch.cat([context, tokens_T[start:stop]]), num_bytes))
    return windows


def _full_windows(documents: Iterable[Document], length: int, bos: int | None) -> list[_Window]:
    """Consecutive windows of exactly W tokens; documents follow each other.

    The beginning-of-sequence token, if there is one, opens every window and every document. Tokens that do not
    fill the last window are left out.
    """
    windows: list[_Window] = []
    parts: list[Tensor] = []
    room = length
    for document in documents:
        start = 0
        while start < len(document.tokens):
            if bos is not None and (start == 0 or not parts):
                parts.append(torch.tensor([bos]))
                room -= 1
            parts.append(document.tokens[start : start + room])
            start += len(parts[-1])
            room -= len(parts[-1])
            if room == 0:
                windows.append(_Window(torch.cat(parts), 0))
                parts, room = [], length
    return windows


def _window_batches(windows: list[_Window], config: DataConfig, tokenizer: Any, description: dict[str, Any]) -> Batches:
    """Batches in the order of the windows for calibration, longest first for evaluation (little padding)."""
    scored = description["purpose"] == "evaluation"
    description = {**description, "num_samples": len(windows)}
    if scored:
        windows = sorted(windows, key=lambda window: -len(window.tokens))
        description |= {
            "num_scored_tokens": sum(len(window.tokens) - 1 for window in windows),
            "num_bytes": sum(window.num_bytes for window in windows),
            "num_unknown_tokens": _count_unknown(windows, tokenizer),
        }
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Batches(
        kind="text",
        description=description,
        num_samples=len(windows),
        num_bytes=description.get("num_bytes"),
        chunks=chunk(range(len(windows)), config.batch_size),
        collate=partial(_collate_windows, windows, padding, scored),
    )


def _count_unknown(windows: Iterable[_Window], tokenizer: Any) -> int:
    """Scored tokens that stand for text outside the vocabulary, which makes bits per byte look too small."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return 0
    count = sum(int((window.tokens[1:] == unknown).sum()) for window in windows)
    if count:
        log.warning(
            "%d scored tokens are unknown to the tokenizer; bits per byte is too small by what they hide", count
        )
    return count


def _collate_windows(
    windows: Sequence[_Window], padding: int, scored: bool, indices: Sequence[int]
) -> dict[str, Tensor]:
    batch = padded([windows[index].tokens for index in indices], padding)
    if scored:
        hidden_EW = batch["attention_mask"] == 0 if "attention_mask" in batch else torch.zeros(()).bool()
        batch["labels"] = batch["input_ids"].masked_fill(hidden_EW, IGNORED_LABEL)
        batch["labels"][:, 0] = IGNORED_LABEL
    return batch


def padded(tokens: Sequence[Tensor], padding: int) -> dict[str, Tensor]:
    """``input_ids`` (batch, W), padded on the right, and ``attention_mask`` where there is padding."""
    batch = {"input_ids": pad_sequence(list(tokens), batch_first=True, padding_value=padding)}
    lengths_E1 = torch.tensor([[len(one)] for one in tokens])
    mask_EW = torch.arange(batch["input_ids"].shape[1]) < lengths_E1
    if not mask_EW.all():
        batch["attention_mask"] = mask_EW.long()
    return batch
