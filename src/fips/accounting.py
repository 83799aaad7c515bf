"""Parameters, stored bytes and multiplications: exact integers, before and after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from fips.storage.packing import pattern_bytes
from fips.structure import LayerGroup

__all__ = ["Footprint", "dense_footprint", "factored_footprint", "named_state", "state_bytes"]


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the matrices of some MLPs take; biases are not counted, since compression leaves them."""

    parameters: int
    """Stored numbers: dense entries, or basis entries plus non-zeros."""
    value_bytes: int
    """Bytes of those numbers."""
    pattern_bytes: int
    """Bytes that say where the non-zeros are."""
    macs_per_token: int
    """Multiply-adds for one token."""

    @property
    def bytes(self) -> int:
        return self.value_bytes + self.pattern_bytes

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    @classmethod
    def total(cls, parts: Iterable[Footprint]) -> Footprint:
        return sum(parts, start=cls(0, 0, 0, 0))

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "bytes": self.bytes}


def dense_footprint(group: LayerGroup, *, itemsize: int) -> Footprint:
    """The matrices of a group as plain dense weights."""
    size = group.width * group.columns
    return Footprint(parameters=size, value_bytes=size * itemsize, pattern_bytes=0, macs_per_token=size)


def factored_footprint(group: LayerGroup, *, rank: int, nonzeros: int, fmt: str, itemsize: int) -> Footprint:
    """The matrices of a group as one basis and packed factors.

    Multiply-adds: every matrix applies the basis once and its non-zeros once,
    ``len(sites) * d * R + nonzeros``, whatever the kernel spends on zeros.
    """
    basis = group.width * rank
    return Footprint(
        parameters=basis + nonzeros,
        value_bytes=(basis + nonzeros) * itemsize,
        pattern_bytes=sum(pattern_bytes(size=rank * site.columns, fmt=fmt) for site in group.sites),
        macs_per_token=len(group.sites) * basis + nonzeros,
    )


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor a checkpoint holds, shared ones once, under the first name they have."""
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach()
    return state


def state_bytes(model: nn.Module) -> int:
    """Bytes of tensor data in a checkpoint of the model; works on the meta device."""
    return sum(tensor.numel() * tensor.element_size() for tensor in named_state(model).values())


def itemsize(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype, device="meta").element_size()
