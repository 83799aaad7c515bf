"""Progress on a terminal: one bar per stage of the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.util import find_spec
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

__all__ = ["Bars", "progress_bars"]


SPEED_SECONDS = 600
"""The last steps whose speed tells what is left; a block of a large model takes a minute."""


STAGES = {"measure": "calibrate", "allot": "allot bits", "try": "try formats", "reconstruct": "train blocks"}
"""What a bar says instead of the name of a stage."""


class Event(Protocol):
    """What ``fips.ProgressEvent`` says."""

    @property
    def stage(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def loss(self) -> float | None: ...


class Clock(ProgressColumn):
    """Time since a bar began and, until it ends, what is left of this round at the speed of its last steps."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        words = _clock(task.finished_time if task.finished else task.elapsed)
        return Text(words if task.finished else f"{words}<{_clock(task.time_remaining)}", style="progress.elapsed")


class Bars:
    """Bars on a terminal or in a notebook, a line per tenth of the work in a log.

    A notebook needs ipywidgets to draw bars over what is there; without it it has the lines of a log.

    A stage has one bar, whatever the number of groups it goes through: more bars than lines of the screen would leave
    the upper ones there for good. Nothing appears before the first step, so that an early error stays a single line.
    """

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), Clock())
        self._console = console
        self._draws = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
        self._bars = Progress(
            *columns, TextColumn("{task.fields[note]}"), console=console, speed_estimate_period=SPEED_SECONDS
        )
        self._tasks: dict[str, TaskID] = {}
        self._said: tuple[str, ...] = ()

    @property
    def drawn(self) -> Bars:
        """These where they are drawn; in a log nothing, of what would be too many lines there."""
        return self if self._draws else Bars(Console(quiet=True))

    def event(self, event: Event) -> None:
        """Show a ``fips.ProgressEvent``."""
        loss = "" if event.loss is None else f"loss {event.loss:.3g}"
        self.show(STAGES.get(event.stage, event.stage), event.done, event.total, group=event.group, note=loss)

    def counter(self, label: str) -> Callable[[int, int], None]:
        """A function of what is done and what there is to do."""
        return lambda done, total: self.show(label, done, total)

    def show(self, label: str, done: int, total: int, *, group: str = "", note: str = "") -> None:
        with suppress(OSError, ValueError):  # a terminal or a pipe that is gone must not cost the work
            if self._draws:
                self._draw(label, done, total, f"{group} {note}".strip())
            elif done in (1, total) or 10 * done // max(total, 1) != 10 * (done - 1) // max(total, 1):
                words = (label, group, f"{done}/{total or '?'}", note)
                if words == self._said:  # the end of one step and the beginning of the next
                    return
                self._said = words
                self._console.print(" ".join(word for word in words if word), highlight=False, soft_wrap=True)

    def _draw(self, label: str, done: int, total: int, note: str) -> None:
        if not self._tasks:
            self._bars.start()
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total or None, note="")
        for task in self._bars.tasks:
            if task.id == self._tasks[label] and done < total:
                task.finished_time = None  # the next group is in this stage: its clock goes on
        self._bars.update(self._tasks[label], completed=done, total=total or None, note=note)

    def stop(self) -> None:
        """What is printed from now on stands below the bars."""
        with suppress(OSError, ValueError):
            if self._tasks:
                self._bars.stop()
                self._tasks = {}


@contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Bars]:
    """Bars that are drawn within the block, by default on stderr; nothing else may be printed there meanwhile."""
    bars = Bars(console or Console(stderr=True))
    try:
        yield bars
    finally:
        bars.stop()


def _clock(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=max(0, int(seconds))))
