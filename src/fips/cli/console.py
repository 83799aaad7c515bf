"""Where the command line writes: results to stdout, progress and words to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


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


class Bars:
    """Progress on stderr: bars on a terminal, a line per tenth of the work in a log.

    Nothing appears before the first step, so that an early error stays a single line.
    """

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, TextColumn("{task.fields[note]}"), console=stderr)
        self._tasks: dict[str, TaskID] = {}

    def show(self, label: str, done: int, total: int, note: str = "") -> None:
        with suppress(OSError, ValueError):  # a terminal or a pipe that is gone must not cost the work
            self._show(label, done, total, note)

    def _show(self, label: str, done: int, total: int, note: str) -> None:
        if not stderr.is_terminal:
            if done in (1, total) or (total >= 10 and done % (total // 10) == 0):
                stderr.print(f"{label} {done}/{total or '?'} {note}".rstrip(), highlight=False)
            return
        if not self._tasks:
            self._bars.start()
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total or None, note="")
        self._bars.update(self._tasks[label], completed=done, total=total or None, note=note)

    def stop(self) -> None:
        with suppress(OSError, ValueError):
            if self._tasks:
                self._bars.stop()


@contextmanager
def progress_bars() -> Iterator[Any]:
    """A ``fips.compress.Progress`` that draws one bar per stage of every group."""
    bars = Bars()
    try:
        yield lambda event: bars.show(
            f"{event.stage} {event.group}",
            event.done,
            event.total,
            "" if event.loss is None else f"loss {event.loss:.3g}",
        )
    finally:
        bars.stop()


@contextmanager
def counter(label: str) -> Iterator[Any]:
    bars = Bars()
    try:
        yield lambda done, total: bars.show(label, done, total)
    finally:
        bars.stop()
