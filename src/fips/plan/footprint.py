"""Parameters, stored bytes and multiplications: exact integers, before and after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from fips.formats.patterns import BITMASK, pattern_named
from fips.formats.values import FLOAT, values_named
from fips.models import LayerGroup, Site

__all__ = [
    "Footprint",
    "LayerStorage",
    "bytes_enough",
    "dense_footprint",
    "factored_footprint",
    "format_bytes",
    "named_state",
    "state_bytes",
]


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the matrices of some layers take; biases are not counted, since compression leaves them."""

    parameters: int
    """Stored numbers: dense entries, or basis entries plus kept entries of factors."""
    value_bytes: int
    """Bytes of those numbers."""
    pattern_bytes: int
    """Bytes that say which entries are kept."""
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
    size = group.width * group.hidden
    return Footprint(parameters=size, value_bytes=size * itemsize, pattern_bytes=0, macs_per_token=size)


@dataclass(frozen=True, slots=True)
class LayerStorage:
    """How one matrix is stored."""

    kept: int
    """Kept entries of its factor."""
    fmt: str = BITMASK
    """Packed format, see ``fips.formats.patterns``."""
    values: str = FLOAT
    shared: bool = True
    """Whether it uses the basis of its group; False is the identity basis, plain pruning."""


def factored_footprint(
    group: LayerGroup,
    *,
    rank: int,
    itemsize: int,
    kept: int | None = None,
    fmt: str = BITMASK,
    layers: Sequence[LayerStorage] | None = None,
) -> Footprint:
    """The matrices of a group as one basis and packed factors: exactly the bytes of the tensors in the file.

    Either ``layers`` says how each site of the group is stored, in order, or ``kept`` is the number of floating
    values of all of them together in one format. ``itemsize`` is that of basis, floating values and scales. A basis
    that no layer uses takes nothing. Scales of integer values are bytes, not parameters. Multiply-adds: every matrix
    applies its basis once and its kept entries once, whatever the kernel spends on zeros.
    """
    if layers is None:
        assert kept is not None
        rest = [LayerStorage(0, fmt)] * (len(group.sites) - 1)
        layers = [LayerStorage(kept, fmt), *rest]
    shared = sum(layer.shared for layer in layers)
    basis = group.width * rank
    owned = basis if shared else 0
    entries = sum(layer.kept for layer in layers)
    parts = [_layer_bytes(site, layer, rank, itemsize) for site, layer in zip(group.sites, layers, strict=True)]
    return Footprint(
        parameters=owned + entries,
        value_bytes=owned * itemsize + sum(values for values, _ in parts),
        pattern_bytes=sum(pattern for _, pattern in parts),
        macs_per_token=shared * basis + entries,
    )


def _layer_bytes(site: Site, layer: LayerStorage, rank: int, itemsize: int) -> tuple[int, int]:
    """``(values and scales, pattern)`` of one matrix."""
    rank = rank if layer.shared else site.width
    pattern, values = pattern_named(layer.fmt).nbytes(rank * site.hidden), values_named(layer.values)
    rows, cols = site.role.stored_shape(rank, site.hidden)
    return values.nbytes(layer.kept, itemsize) + int(values.scale_bytes(rows, cols, itemsize)), pattern


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
    return dtype.itemsize


def format_bytes(count: float) -> str:
    """Three digits, ``1.23 MB`` or ``865 MB`` (10^6 bytes), exact below 1 kB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5 or unit == "GB":
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{count:.0f} B" if unit == "B" else f"{value:.{digits}f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def bytes_enough(count: int) -> str:
    """As ``format_bytes``, but no less than ``count``: a size to be asked for."""
    step = 10 ** max(len(str(count)) - 3, 0)
    return format_bytes(-(-count // step) * step)
