"""Texts for models that see all of a text at once: framed by the special tokens that their tokenizer puts around it.

Masked language models are shown windows in which some tokens are hidden, for calibration too: they were trained on
such windows and are asked about nothing else.

Shapes: W tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from fips.config import DataConfig
from fips.data.batches import IGNORED_LABEL, Batches, choose, chunk
from fips.data.text import (
    DEFAULT_CALIBRATION_WINDOWS,
    ROW_SEPARATOR,
    Document,
    padded,
    parts_of,
    texts_of,
    tokenized,
)
from fips.errors import DataError
from fips.models.tasks import Task

__all__ = ["Frame", "encoded_batches"]

HIDDEN_SHARE = 0.15
"""Of the tokens of a window that are hidden from a masked language model, as in its training (BERT).

On AntiBERTy with four matrices at 3 bits and 15 thousand tokens the KL to the original was 0.0031 when calibrated on
one stream without special tokens, 0.00115 ± 0.00009 on framed proteins, and 0.00102 ± 0.00008 with some of their tokens
hidden: one seed, and the last step is no more than the error."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Special tokens that a tokenizer puts before and after a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        bare, whole = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (False, True))
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return cls(tuple(whole[:start]), tuple(whole[start + len(bare) :]))
        return cls((), ())

    def around(self, tokens: Tensor) -> Tensor:
        return torch.cat([torch.tensor(self.before, dtype=torch.int64), tokens, torch.tensor(self.after).long()])


def encoded_batches(
    rows: Any, config: DataConfig, tokenizer: Any, length: int, description: dict[str, Any], task: Task
) -> Batches:
    """Batches of windows of at most ``length`` tokens with special tokens around each: ``input_ids`` and, where some
    are shorter, ``attention_mask``, both (batch, W); of masked language models with some tokens hidden, and for an
    evaluation ``labels`` (batch, W) of these.

    Texts are divided as for language models, but rows of a table are texts of their own where the model is no language
    model. Windows of separate texts are as long as these, others are full (for calibration). Raises ``DataError`` for
    texts without a window, or a tokenizer without a mask token.
    """
    scored = description["purpose"] == "evaluation"
    hides = task.name == "masked-lm"
    if hides and tokenizer.mask_token_id is None:
        raise DataError(
            f"the tokenizer has no mask token, which `{task.model}` is asked about; set `mask_token` in its "
            "tokenizer_config.json"
        )
    frame = Frame.of(tokenizer)
    room = length - len(frame.before) - len(frame.after)
    if room < 1:
        raise DataError(f"`sequence_length={length}` leaves no room beside the special tokens; use at least 3")
    limit = config.num_samples or (None if scored else DEFAULT_CALIBRATION_WINDOWS)
    separate = _separate(rows, config, task)
    parts = parts_of(texts_of(rows, config, tokenizer), config, separate=separate)
    streamed = isinstance(rows, datasets.IterableDataset)
    documents = tokenized(parts, tokenizer, count_bytes=False, enough=length * limit if streamed and limit else None)
    pieces = list(_pieces(documents, room, full=not separate and not scored))
    num_tokens = sum(len(document.tokens) for document in documents)
    if not pieces:
        raise DataError(
            f"`{config.source}` has {num_tokens} tokens of text, a window needs {1 if scored else room} beside "
            "special tokens; give more text" + ("" if scored else " or lower `sequence_length`")
        )
    chosen = choose(len(pieces), config, default=limit)
    if scored:
        chosen = np.array(sorted(chosen, key=lambda index: -len(pieces[index])))  # little padding
    windows = [_window(frame.around(pieces[index]), frame, tokenizer, (config.seed, index), hides) for index in chosen]
    return Batches(
        kind="text",
        task=task.name,
        description={
            **description,
            "sequence_length": length,
            "document_separator": config.document_separator,
            "row_separator": None if separate else ROW_SEPARATOR,
            "num_documents": len(documents),
            "num_tokens": num_tokens,
            "num_samples": len(windows),
            "num_own_tokens": sum(len(pieces[index]) for index in chosen),
            "special_tokens": [list(frame.before), list(frame.after)],
            "hidden_share": HIDDEN_SHARE if hides else None,
        },
        num_samples=len(windows),
        chunks=chunk(range(len(windows)), config.batch_size),
        collate=partial(_collate, windows, tokenizer.pad_token_id or 0, scored and hides),
    )


def _separate(rows: Any, config: DataConfig, task: Task) -> bool:
    """Whether rows are texts of their own."""
    if config.document_separator is not None or config.chat or isinstance(rows, datasets.IterableDataset):
        return True
    return task.name != "masked-lm" and len(rows) > 1


def _pieces(documents: Iterable[Document], room: int, *, full: bool) -> Iterable[Tensor]:
    """Consecutive parts of ``room`` tokens, the last of a document shorter, or left out where all are to be full."""
    for document in documents:
        for part in document.tokens.split(room):
            if len(part) == room or not full:
                yield part


def _window(
    tokens_W: Tensor, frame: Frame, tokenizer: Any, seed: Sequence[int], hides: bool
) -> tuple[Tensor, Tensor | None]:
    """Tokens, with some hidden, and what was there, -100 elsewhere."""
    if not hides:
        return tokens_W, None
    own = np.arange(len(frame.before), len(tokens_W) - len(frame.after))
    count = max(1, round(HIDDEN_SHARE * len(own)))
    hidden = torch.from_numpy(np.random.default_rng([int(one) for one in seed]).choice(own, count, replace=False))
    labels_W = torch.full_like(tokens_W, IGNORED_LABEL)
    labels_W[hidden] = tokens_W[hidden]
    return tokens_W.index_fill(0, hidden, tokenizer.mask_token_id), labels_W


def _collate(
    windows: Sequence[tuple[Tensor, Tensor | None]], padding: int, labelled: bool, indices: Sequence[int]
) -> dict[str, Tensor]:
    batch = padded([windows[index][0] for index in indices], padding)
    if labelled:
        labels = [windows[index][1] for index in indices]
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(
            [one for one in labels if one is not None], batch_first=True, padding_value=IGNORED_LABEL
        )
    return batch
