"""Where the command line writes: results to stdout, progress and words to stderr."""

from __future__ import annotations

import os
import sys
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


def say(line: str) -> None:
    with suppress(OSError, ValueError):  # a terminal that is gone
        print(line, file=sys.stderr)  # noqa: T201
