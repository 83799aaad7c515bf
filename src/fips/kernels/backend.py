"""What a backend is: something that multiplies by a packed matrix, ``y = x S^T + b``, and says where it cannot.

One class is enough; ``fips.kernels.registry.register`` puts it in front of the others, and layers use it from their
next call on.
"""

from __future__ import annotations

import functools
import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fips.formats.packed import Packed
from fips.kernels import reference
from fips.kernels.together import Company
from fips.kernels.validity import Snapshot

__all__ = ["Backend", "PreparedMatrix", "Reference", "RepeatedCall", "kernel_refuses", "say_once", "unsupported_format"]

log = logging.getLogger("fips.kernels")

INPUTS = (torch.float32, torch.bfloat16, torch.float16)


class PreparedMatrix:
    """A packed matrix with what a backend needs besides its stored tensors."""

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self._seen = _seen(packed)

    @property
    def extra_bytes(self) -> int:
        """Memory beyond the stored tensors."""
        return 0

    def is_current(self, packed: Packed) -> bool:
        """Whether ``packed`` still lies where this was prepared for, with the same pattern and scales."""
        return self._seen.equals(_seen(packed))

    def holds(self) -> bool:
        """The same of the tensors that it was made from."""
        return self._seen.holds()


def _seen(packed: Packed) -> Snapshot:
    return Snapshot(places=(packed.values_Z, packed.group_scales), contents=(packed.pattern, packed.scales_N))


class RepeatedCall(Protocol):
    """A product once more, for inputs of the same shape."""

    dtype: torch.dtype
    """Of the inputs."""

    @property
    def company(self) -> Company | None:
        """What it is made together with, where the backend can do that."""
        return None

    def holds(self) -> bool:
        """Whether nothing that it keeps has changed."""

    def __call__(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor: ...


class Backend(Protocol):
    """Products with packed matrices on some devices, for some formats and types; without autograd.

    ``supports`` and ``multiply`` are all that one needs. A ``prepared`` matrix is one that ``prepare`` of the same
    backend made. Raises ``ShapeError`` for inputs or a bias of another size, ``BackendError`` for damaged tensors,
    ``MemoryError`` where there is no room.
    """

    name: str
    decodes: bool = False
    """Whether ``decode`` is better than plain torch."""
    repeats_up_to: int = 0
    """Tokens up to which ``repeat`` is worth asking."""

    @abstractmethod
    def supports(self, packed: Packed, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if it multiplies such inputs by this matrix, else the reason why not, in words."""

    def prepare(self, packed: Packed) -> PreparedMatrix:
        """What ``multiply`` and ``decode`` need, once per matrix."""
        return PreparedMatrix(packed)

    @abstractmethod
    def multiply(
        self, x: Tensor, prepared: PreparedMatrix, bias: Tensor | None, *, activation_bits: int | None = None
    ) -> Tensor:
        """``x S^T + bias`` in the type of ``x``; beside integers it may round inputs to ``activation_bits``."""

    def decode(self, prepared: PreparedMatrix, dtype: torch.dtype) -> Tensor:
        """S as a dense matrix."""
        return reference.decode(prepared.packed, dtype)

    def repeat(
        self, x: Tensor, prepared: PreparedMatrix, bias: Tensor | None, activation_bits: int | None
    ) -> RepeatedCall | None:
        """``multiply`` for inputs like ``x``, with less work around it; None where there is no such thing."""
        return None

    def few_tokens(self, packed: Packed) -> int:
        """Tokens up to which a dense floating matrix, such as a basis, is better multiplied here than by torch."""
        return 0

    def multiply_columns(self, x: Tensor, prepared: PreparedMatrix) -> Tensor:
        """``x S`` for a dense S and ``few_tokens``."""
        return x @ self.decode(prepared, x.dtype)


class Reference(Backend):
    """Plain torch: decodes S for the time of the call. Takes everything."""

    name = "reference"

    def supports(self, packed: Packed, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def multiply(
        self, x: Tensor, prepared: PreparedMatrix, bias: Tensor | None, *, activation_bits: int | None = None
    ) -> Tensor:
        return reference.multiply(x, prepared.packed, bias)


def kernel_refuses(packed: Packed, device: torch.device, dtype: torch.dtype, home: str) -> str | None:
    """What no kernel of fips takes, whose tensors have to be on a device of type ``home``; in words."""
    if packed.values_Z.device.type != home or device.type != home:
        return f"the layer is on {packed.values_Z.device.type} and its inputs on {device.type}, not on {home}"
    if dtype not in INPUTS:
        return f"inputs are {dtype}; known: {_names(INPUTS)}"
    rows, cols = packed.shape
    if packed.kept >= 2**31 or rows == 0 or cols == 0:
        return f"a matrix of {rows} x {cols} with {packed.kept} kept entries; at least 1, fewer than 2^31 are handled"
    return unsupported_format(packed)


def unsupported_format(packed: Packed) -> str | None:
    """Why no kernel of fips has a reader for the format of a matrix, in words; None if there is one."""
    pattern, numbers = packed.layout, packed.numbers
    if pattern.code(packed.block_axis) is None:
        return f"no compiled kernel reads the pattern {pattern.name}"
    if not numbers.compiled:
        return f"no compiled kernel reads values {numbers.name}"
    if pattern.group_kept is not None and (pattern.group not in (1, 2, 4, 8, 16) or packed.shape[1] % pattern.group):
        return f"pattern {pattern.name} of rows of {packed.shape[1]}; M is 2, 4, 8 or 16 and divides a row"
    return None


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


@functools.cache
def say_once(line: str) -> None:
    """A warning that is given once in a process."""
    log.warning("%s", line)
