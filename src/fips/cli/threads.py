"""How threads wait for each other while a command works for minutes."""

from __future__ import annotations

import os

__all__ = ["wait_briefly"]

SPINS = "1000"
"""Turns that a thread of GCC's OpenMP waits awake; by default 300,000. On a machine with another process on one of two
cores a compression took 45 s so and 31 with these, alone on it 29 and 30."""


def wait_briefly() -> None:
    """Let threads that wait give way to other processes; to be called before torch is imported.

    What the environment says of waiting (``OMP_WAIT_POLICY``, ``GOMP_SPINCOUNT``) stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
