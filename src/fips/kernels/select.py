"""Which way a layer computes: of those that are possible the one that the policy says.

See ``fips.kernels.runtime`` for what the ways are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fips.errors import ConfigError
from fips.kernels.backend import Backend
from fips.kernels.timings import Timings, Way

__all__ = ["FRUGAL", "POLICIES", "Choice", "check_bits", "check_policy", "select", "wished_bits", "wished_way"]

FRUGAL: tuple[Way, ...] = ("packed", "decode", "merge")
POLICIES = ("auto", "measure", "speed", *FRUGAL, "merged")
"""``auto``: the one of ``FRUGAL`` that ``fips.kernels.defaults`` says. ``measure``: the fastest of ``FRUGAL``.
``speed``: the fastest of all. Or the one named."""


class Choice(NamedTuple):
    """A way, and the backend that ``packed`` stands for."""

    way: Way
    backend: Backend


def select(
    wanted: str, possible: tuple[Way, ...], default: Callable[[], Way], signature: Callable[[], str], timings: Timings,
    compute: Callable[[Way], Tensor],
) -> Way:  # fmt: skip
    """The way named; where it is impossible the first that is not; for ``auto`` the default, else the fastest."""
    for way in possible:
        if way == wanted:
            return way
    if wanted == "auto":
        return default()
    if len(possible) == 1 or wanted not in ("measure", "speed"):
        return possible[0]
    if wanted == "measure":
        possible = tuple(way for way in possible if way in FRUGAL)
    return timings.fastest(signature(), possible, compute)


def check_policy(policy: str) -> str:
    """Raise ``ConfigError`` for a policy that is none."""
    if policy not in POLICIES:
        raise ConfigError(f"unknown runtime policy {policy!r}; known: {', '.join(POLICIES)}")
    return policy


def check_bits(bits: int | None) -> int | None:
    """Raise ``ConfigError`` for bits of activations other than 8, 16 or None."""
    if bits not in (None, 8, 16):
        raise ConfigError(f"activation_bits is 8, 16 for exact inputs, or None for what the type has; got {bits}")
    return bits


def wished_bits() -> int | None:
    """``$FIPS_ACTIVATION_BITS``."""
    wish = os.environ.get("FIPS_ACTIVATION_BITS")
    if wish and not wish.isdecimal():
        raise ConfigError(f"$FIPS_ACTIVATION_BITS is 8, 16 or empty; got {wish!r}")
    return int(wish) if wish else None


def wished_way() -> str | None:
    """``$FIPS_RUNTIME``."""
    wish = os.environ.get("FIPS_RUNTIME")
    if wish and wish not in POLICIES:
        raise ConfigError(f"unknown $FIPS_RUNTIME {wish!r}; known: {', '.join(POLICIES)}")
    return wish or None
