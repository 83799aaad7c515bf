"""Chats as texts, in the template of the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fips.config import DataConfig
from fips.data.rows import columns_in_words, first_line
from fips.errors import DataError

__all__ = ["chat_column", "chat_text", "require_template"]

COLUMNS = ("messages", "conversations", "conversation")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Names of who speaks, in data sets whose messages have ``from`` and ``value``."""


def chat_column(features: Any, config: DataConfig) -> str:
    """The column with lists of messages."""
    names = [config.column] if config.column is not None else [name for name in COLUMNS if name in features]
    if not names or names[0] not in features:
        raise DataError(
            f"`{config.source}` has no column of chats (`{config.column or '`, `'.join(COLUMNS)}`); its "
            f"columns: {columns_in_words(features)}"
        )
    return str(names[0])


def require_template(tokenizer: Any) -> None:
    """Raise ``DataError`` for a tokenizer that does not say how a chat is written."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            "`--chat` needs a chat template, and the tokenizer of this model has none; take the tokenizer of the "
            "instruction-tuned model, or leave it out and name a column of text"
        )


def chat_text(messages: Any, tokenizer: Any, config: DataConfig) -> str:
    """One chat as the model was trained to read it."""
    if isinstance(messages, Mapping):  # earlier versions of datasets turn a list of messages into a mapping of lists
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    try:
        found = tokenizer.apply_chat_template([_message(one) for one in messages or ()], tokenize=False)
    except DataError:
        raise
    except Exception as error:  # templates are programs, each with its own ideas of a chat
        raise DataError(
            f"a chat of `{config.source}` does not fit the template: {first_line(error)}; remove such rows"
        ) from None
    return str(found)


def _message(message: Any) -> dict[str, Any]:
    names = set(message) if isinstance(message, Mapping) else set()
    if not names >= {"role", "content"} and not names >= {"from", "value"}:
        raise DataError(f"a message needs `role` and `content` (or `from` and `value`), got {str(message)[:60]!r}")
    if "role" in message:
        return {name: value for name, value in message.items() if value is not None}
    return {"role": ROLES.get(message["from"], message["from"]), "content": message["value"]}
