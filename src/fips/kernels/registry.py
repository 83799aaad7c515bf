"""The backends in order of preference, and which one multiplies by a matrix."""

from __future__ import annotations

import torch

from fips.errors import ConfigError
from fips.formats.packed import Packed
from fips.kernels.backend import Backend, Reference
from fips.kernels.cpu import CpuBackend
from fips.kernels.triton_kernel import TritonBackend

__all__ = ["REFERENCE", "backends", "choose", "decoder", "reasons", "register", "unregister"]

REFERENCE = Reference()
"""Takes what no other does."""
_order: tuple[Backend, ...] = (TritonBackend(), CpuBackend(), REFERENCE)


def backends() -> tuple[Backend, ...]:
    """In order of preference; another tuple whenever one was added or taken out."""
    return _order


def register(backend: Backend) -> None:
    """Prefer a backend to all others, from the next call of every layer on.

    Raises ``ConfigError`` where the name is taken.
    """
    global _order
    if backend.name in (known.name for known in _order):
        raise ConfigError(f"there is a backend {backend.name!r} already; take it out first, or choose another name")
    _order = (backend, *_order)


def unregister(name: str) -> None:
    """Take a backend out. Raises ``ConfigError`` for a name that is not there, and for ``reference``."""
    global _order
    known = [backend.name for backend in _order if backend is not REFERENCE]
    if name not in known:
        raise ConfigError(f"no backend {name!r} to take out; known: {', '.join(known)}")
    _order = tuple(backend for backend in _order if backend.name != name)


def choose(packed: Packed, device: torch.device, dtype: torch.dtype) -> Backend:
    """The first that multiplies such inputs by this matrix."""
    for backend in _order:
        if backend.supports(packed, device, dtype) is None:
            return backend
    return REFERENCE


def decoder(packed: Packed) -> Backend | None:
    """The first that writes this matrix out faster than torch does."""
    for backend in _order:
        if backend.decodes and backend.supports(packed, packed.values_Z.device, torch.float32) is None:
            return backend
    return None


def reasons(packed: Packed, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """For every backend by name, most preferred first: ``yes``, or why it does not multiply by this matrix."""
    return {backend.name: backend.supports(packed, device, dtype) or "yes" for backend in _order}
