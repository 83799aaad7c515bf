"""Where a model is to lie: devices by name, refused before anything is read."""

from __future__ import annotations

import torch

from fips.errors import ConfigError

__all__ = ["usable_device"]


def usable_device(device: torch.device | str) -> torch.device:
    """The device of a name (``cpu``, ``cuda``, ``cuda:1``); ``ConfigError`` for one that this torch cannot use here."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:  # one for each way not to be there
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".:")
        raise ConfigError(f"device `{device}` is not available: {reason}; {_those_there()}") from None
    if found.type == "meta":
        raise ConfigError(f"device `{device}` holds no numbers, so that nothing can be computed; {_those_there()}")
    return found


def _those_there() -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"there is {', '.join(['`cpu`', *(f'`cuda:{index}`' for index in range(count))])}"
