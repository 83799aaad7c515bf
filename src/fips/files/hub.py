"""The hub of Hugging Face, asked only where it can answer."""

from __future__ import annotations

import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
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
    settings: list[Any] = [module for module in (constants, sys.modules.get("datasets.config")) if module is not None]
    before = [module.HF_HUB_OFFLINE for module in settings]
    try:
        for module in settings:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _has_address() -> bool:
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except (OSError, UnicodeError):
        return False
    return True
