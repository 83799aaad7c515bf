"""Where the command line writes: results to stdout, progress and words to stderr."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console


class Results(Console):
    """Standard output. That it takes nothing more (a full disk, a closed pipe) costs no work: ``main`` says so last."""

    failure: OSError | None = None

    def print(self, *objects: Any, **options: Any) -> None:
        with self._taking():
            super().print(*objects, **options)

    def tell(self, line: str) -> None:
        """A sentence, see ``fitted``."""
        self.print(fitted(line, self), highlight=False, soft_wrap=True, markup=False)

    def write(self, text: str) -> None:
        """The text as it is."""
        with self._taking():
            self.file.write(text)
            self.file.flush()

    @contextmanager
    def _taking(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error
            with suppress(OSError, ValueError):  # what is left in its buffer would fail again when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that rich is handling, instead of ending the process


stdout = Results()
stderr = Console(stderr=True)


def fitted(line: str, console: Console) -> str:
    """A sentence as a terminal can show it, broken between words; anywhere else in one line, for those who search.

    A word that is longer than a line stays whole: paths are there to be copied.
    """
    if not console.is_terminal or len(line) <= console.width:
        return line
    return "\n".join(textwrap.wrap(line, console.width, break_long_words=False, break_on_hyphens=False))


def say(line: str) -> None:
    with suppress(OSError, ValueError):  # a terminal that is gone
        print(fitted(line, stderr), file=sys.stderr)  # noqa: T201
