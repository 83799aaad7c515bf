"""The vocabulary of a tokenizer as llama.cpp keeps it.

Two kinds are known there and here: pieces of SentencePiece, which are joined by their scores, and byte-level BPE, whose
merges are kept and whose rule for cutting text into words has a name. Everything is read from the description that the
``tokenizers`` library writes (``tokenizer.json``).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from fips.errors import ModelError

__all__ = ["Vocabulary", "add_vocabulary", "vocabulary_of"]

NEXT_STEP = "`fips export --format dense` writes a plain checkpoint"
SPACE = "▁"
"""Stands for a space in pieces."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_BYTES, _BYTES_AND_WORDS = ("ByteLevel", False), ("ByteLevel", True)
PRE_TOKENIZERS: dict[tuple[tuple[Any, ...], ...], str] = {
    (_BYTES_AND_WORDS,): "gpt-2",
    (("Digits", True), _BYTES_AND_WORDS): "smollm",
    (("Split", _WORDS % "{1,3}"), _BYTES): "llama-bpe",
    (("Split", _WORDS % ""), _BYTES): "qwen2",
    (("Split", _TEKKEN), _BYTES): "tekken",
}
"""The names llama.cpp gives to ways of cutting text."""
_WHOLE_WORDS = ("llama-bpe", "tekken")
"""Those where words that are tokens are taken whole, whatever the merges say; llama-bpe without is called smaug-bpe."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by their numbers, and how text becomes tokens."""

    model: str
    """``llama``: pieces with scores; ``gpt2``: byte-level BPE."""
    pre: str
    """How text is cut into words."""
    tokens: list[str]
    types: list[int]
    scores: list[float]
    """Of pieces; the higher is joined first."""
    merges: list[str]
    """Of byte-level BPE."""
    special: dict[str, int]
    """Numbers of ``bos``, ``eos``, ``unk`` and ``pad``, as far as there are any."""
    adds: dict[str, bool]
    """Whether ``bos`` and ``eos`` are added to a text, and a space before it (``space``)."""
    template: Any
    """Of chats; None: there is none."""
    ambiguous: int
    """Pieces that the tokenizer puts together in fewer ways than llama.cpp would."""


def vocabulary_of(tokenizer: Any, config: Any, *, source: str) -> Vocabulary:
    """The vocabulary of a tokenizer of transformers, as long as the embedding.

    Raises ``ModelError`` without a tokenizer, or for one that llama.cpp has no equal of.
    """
    if tokenizer is None:
        raise ModelError(
            f"`{source}` has no tokenizer, which a GGUF file contains: save the tokenizer of the original model there "
            "(`AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIR)`)"
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"the tokenizer `{type(tokenizer).__name__}` has no `tokenizer.json`, which GGUF is made from. {NEXT_STEP}"
        )
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"a tokenizer of type {model['type']} cannot be written as GGUF; BPE can, SentencePiece's too. {NEXT_STEP}"
        )
    pieces = bool(model.get("byte_fallback"))
    pre = "default" if pieces else _pre_tokenizer(described)
    _check_normalizer(described.get("normalizer"), pieces=pieces)
    tokens = _tokens(model, described["added_tokens"], config.vocab_size)
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    special, adds = _special(tokenizer, config)
    if pieces:
        adds["space"] = backend.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE)
    types = _types(tokens, described, pieces=pieces)
    return Vocabulary(
        model="llama" if pieces else "gpt2", pre=pre,
        tokens=[_as_text(token) if kind == 4 and pieces else token for token, kind in zip(tokens, types, strict=True)],
        types=types, scores=_scores(tokens, merges) if pieces else [],
        merges=[] if pieces else [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges],
        special=special, adds=adds, template=getattr(tokenizer, "chat_template", None),
        ambiguous=_ambiguous(tokens, types, merges) if pieces else 0,
    )  # fmt: skip


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Write it into a file."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    scores = vocabulary.scores if vocabulary.scores or vocabulary.merges else [0.0] * len(vocabulary.tokens)
    if scores:  # of single bytes too: empty lists are not written, and transformers wants merges or scores
        writer.add_token_scores(scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.adds["bos"])
    writer.add_add_eos_token(vocabulary.adds["eos"])
    if "space" in vocabulary.adds:
        writer.add_add_space_prefix(vocabulary.adds["space"])
    template = vocabulary.template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _pre_tokenizer(described: dict[str, Any]) -> str:
    """The name of the way text is cut; raises ``ModelError`` if llama.cpp has none for it."""
    found = described.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    shape = tuple(_step(step) for step in steps)
    name = PRE_TOKENIZERS.get(shape)
    if name is None:
        known = ", ".join(PRE_TOKENIZERS.values())
        raise ModelError(
            f"llama.cpp may cut text otherwise than this tokenizer ({' then '.join(str(step[0]) for step in shape)}); "
            f"known are those of {known}. {NEXT_STEP}"
        )
    return "smaug-bpe" if name == "llama-bpe" and not described["model"].get("ignore_merges") else name


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    """What a step of cutting is told by."""
    kind = step.get("type", "none")
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return (kind, step["use_regex"])
    if kind == "Digits":
        return (kind, step["individual_digits"])
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return (kind, step["pattern"].get("Regex"))
    return (kind, "other")


def _check_normalizer(normalizer: dict[str, Any] | None, *, pieces: bool) -> None:
    """Spaces become ``▁`` in pieces, and NFC does nothing to nearly all text; llama.cpp knows nothing else."""
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    known = ({"type": "Prepend", "prepend": SPACE}, spaces) if pieces else ({"type": "NFC"},)
    for step in steps:
        if step not in known:
            raise ModelError(f"the tokenizer changes text by `{step['type']}`, llama.cpp does not. {NEXT_STEP}")


def _tokens(model: dict[str, Any], added: list[dict[str, Any]], size: int) -> list[str]:
    """Tokens by number, with made-up ones for rows of the embedding that have none."""
    by_number = {number: token for token, number in model["vocab"].items()}
    by_number |= {token["id"]: token["content"] for token in added}
    if max(by_number) >= size:
        raise ModelError(
            f"the tokenizer has {max(by_number) + 1} tokens, the model {size}: it is the tokenizer of another model"
        )
    return [by_number.get(number, f"[PAD{number}]") for number in range(size)]


def _types(tokens: list[str], described: dict[str, Any], *, pieces: bool) -> list[int]:
    """Kinds of tokens, numbered as ``gguf.TokenType`` does."""
    normal, unknown, control, user, unused, byte = range(1, 7)
    added = {token["id"]: control if token["special"] else user for token in described["added_tokens"]}
    known = set(described["model"]["vocab"].values()) | set(added)
    types = []
    for number, token in enumerate(tokens):
        if pieces and token == described["model"].get("unk_token"):
            types.append(unknown)
        elif number not in known:
            types.append(unused)
        elif pieces and _BYTE.fullmatch(token):
            types.append(byte)
        else:
            types.append(added.get(number, normal))
    return types


def _as_text(token: str) -> str:
    """Tokens that are looked for in the text itself, where spaces are spaces still."""
    return token.replace(SPACE, " ")


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Minus the rank of the first merge that makes a token: pieces are joined in the order of their merges."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    last = len(merges)
    return [-float(ranks.get(token, last if len(token) > 1 else 0)) for token in tokens]


def _ambiguous(tokens: list[str], types: list[int], merges: list[tuple[str, ...]]) -> int:
    """Pieces two of whose parts are tokens that no merge joins: llama.cpp joins whatever gives a token."""
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == 1}
    known = set(merges)
    return sum(
        any(
            token[:cut] in normal and token[cut:] in normal and (token[:cut], token[cut:]) not in known
            for cut in range(1, len(token))
        )
        for token in normal
    )


def _special(tokenizer: Any, config: Any) -> tuple[dict[str, int], dict[str, bool]]:
    """Numbers of special tokens, of the tokenizer or else the model, and which are added to a text."""
    numbers = {}
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is None and name in ("bos", "eos"):
            number = getattr(config, f"{name}_token_id", None)
            number = number[0] if isinstance(number, list) else number
        if number is not None and 0 <= number < config.vocab_size:
            numbers[name] = int(number)
    text = tokenizer("a")["input_ids"]
    adds = {"bos": text[:1] == [numbers.get("bos")], "eos": len(text) > 1 and text[-1] == numbers.get("eos")}
    return numbers, adds
