"""Formats by name. A format is one class: what registers it is all that has to know of it."""

from __future__ import annotations

import difflib
from typing import ClassVar, Generic, Protocol, Self, TypeVar

from fips.errors import ConfigError

__all__ = ["Registry"]


class Named(Protocol):
    """A class whose objects are formats: one for each name it can read."""

    known: ClassVar[tuple[str, ...]]
    """Names, or descriptions of names, for error messages."""

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The format of this name, None where it belongs to another class."""
        ...


Format = TypeVar("Format", bound=Named)


class Registry(Generic[Format]):
    """Classes of formats of one kind, asked one after the other for a name."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.classes: list[type[Format]] = []
        self._found: dict[str, Format] = {}

    def register(self, cls: type[Format]) -> type[Format]:
        """Decorator of a class: from now on its names are known."""
        self.classes.append(cls)
        return cls

    def forget(self, cls: type[Format]) -> None:
        """Undo ``register``."""
        self.classes.remove(cls)
        self._found.clear()

    def known(self) -> list[str]:
        """What may be asked for, in words."""
        return [name for cls in self.classes for name in cls.known]

    def named(self, name: str) -> Format:
        """The format of a name, the same object every time. Raises ``ConfigError`` listing the known names."""
        found = self.find(name)
        if found is None:
            raise self.unknown(name, self.known())
        return found

    def find(self, name: str) -> Format | None:
        """The format of a name, None where no class has it."""
        if name not in self._found:
            found = next((one for cls in self.classes if (one := cls.parse(name)) is not None), None)
            if found is None:
                return None
            self._found[name] = found
        return self._found[name]

    def unknown(self, name: str, known: list[str]) -> ConfigError:
        """The error for a name that no format has."""
        near = difflib.get_close_matches(name, known, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        return ConfigError(f"unknown {self.kind} {name!r}; {guess}known: {', '.join(known)}")
