"""Name patterns for ``--targets`` and ``--ignore``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from fips.errors import ConfigError, NoMatchError

__all__ = ["closest", "listed", "matches", "require_matches"]


def listed(names: Sequence[str]) -> str:
    """The first three names, and how many more there are: `a`, `b`, `c` and 2 more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module name fits one of the patterns.

    A pattern is a full name or its last parts (``mlp.fc1`` fits ``blocks.3.mlp.fc1``), a glob over the full name
    (``*.layers.1?.mlp``), or ``re:`` and a regular expression searched in the name.
    """
    return any(_fits(name, pattern) for pattern in patterns)


def _fits(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise ConfigError(f"pattern `{pattern}` is not a regular expression: {error}") from None
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)


def _count(pattern: str, names: Sequence[str]) -> int:
    return sum(_fits(name, pattern) for name in names)


def closest(pattern: str, names: Sequence[str], *, count: int = 3) -> list[str]:
    """The names most like a pattern, by their text and by the text of their last parts."""
    wanted = pattern.removeprefix("re:")
    parts = wanted.count(".") + 1

    def likeness(name: str) -> float:
        tail = ".".join(name.split(".")[-parts:])
        return max(difflib.SequenceMatcher(None, wanted, text).ratio() for text in (name, tail))

    return sorted(names, key=likeness, reverse=True)[:count]


def require_matches(option: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raise ``NoMatchError`` for the first pattern that fits none of the names."""
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in names):
            near = ", ".join(f"`{name}`" for name in closest(pattern, names)) or "none: the model has no linear layer"
            wider = max((f"{pattern}.*", f"*.{pattern}.*"), key=lambda one: _count(one, names))
            inside = _count(wider, names)
            hint = f"`{wider}` fits the {inside} whose names hold it; " if inside else ""
            raise NoMatchError(
                f"`{option}` pattern `{pattern}` matched none of {len(names)} layers; {hint}closest names: {near}; "
                "`fips inspect MODEL` lists them"
            )
