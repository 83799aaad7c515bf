"""The hub of Hugging Face, asked only where it can answer."""

from __future__ import annotations

import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from huggingface_hub import constants

__all__ = ["hub_where_reached"]


@contextmanager
def hub_where_reached() -> Iterator[None]:
    """A block in which the clients of the hub read what they have at hand if this machine cannot reach it.

    Without network they would try each file for half a minute, also those that they have. The machine is taken to reach
    the hub if its name has an address or a proxy is set.
    """
    if constants.HF_HUB_OFFLINE or _has_address():
        yield
        return
    settings = [module for module in (constants, sys.modules.get("datasets.config")) if module is not None]
    try:
        for module in settings:
            module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        yield
    finally:
        for module in settings:
            module.HF_HUB_OFFLINE = False  # type: ignore[attr-defined]


def _has_address() -> bool:
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except (OSError, UnicodeError):
        return False
    return True
