"""Signals that end a command: one way out for all of them, and blocks of code that they wait for."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["FINISHED", "Stopped", "stoppable", "uninterrupted"]

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

FINISHED: deque[str] = deque(maxlen=10)
"""What the command has finished so far, in words: true however it ends."""


class Stopped(BaseException):
    """Raised in the main thread by a signal; notes added on the way out say what was kept."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn the first signal that would end the process into ``Stopped``; later ones do not disturb the way out.

    Signals that are ignored (``nohup``, a job in the background) stay ignored. Outside the main thread, which no
    signal reaches, nothing changes.
    """
    owner, seen = os.getpid(), False
    FINISHED.clear()

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal seen
        if os.getpid() != owner:
            os._exit(128 + number)  # a worker forked from us: nothing here is its to clean up
        if not seen:
            seen = True
            raise Stopped(number)

    with _handled(stop):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let signals wait until the block is done."""
    waiting: list[int] = []
    try:
        with _handled(lambda number, _: waiting.append(number)):
            yield
    finally:
        for number in waiting[:1]:
            signal.raise_signal(number)


@contextmanager
def _handled(handler: signal._HANDLER) -> Iterator[None]:
    before: dict[int, signal._HANDLER] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)
