"""The ways to compute a product of a layer, with what they keep of it; ``fips.kernels.runtime`` says what they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from fips.formats.packed import SLICE, Packed
from fips.kernels import ops, reference, registry
from fips.kernels.backend import Backend, PreparedMatrix, RepeatedCall
from fips.kernels.call import Product, Remembered
from fips.kernels.select import Choice
from fips.kernels.validity import Snapshot, without_autocast

__all__ = ["Ways"]


class Ways:
    """Computes in the way that is asked for. Threads may share it: what is kept is replaced as a whole."""

    def __init__(self) -> None:
        self._prepared: tuple[Backend, PreparedMatrix] | None = None
        self._merged: tuple[torch.dtype, Snapshot, Tensor] | None = None
        self._number = ops.number_of(self)
        self._calls: dict[torch.Size, tuple[str, tuple[int | None, ...], RepeatedCall, Packed]] = {}

    @property
    def extra_bytes(self) -> int:
        """Memory held beyond the stored tensors."""
        merged, prepared = self._merged, self._prepared
        return (0 if merged is None else merged[2].nbytes) + (0 if prepared is None else prepared[1].extra_bytes)

    def forget_merged(self) -> None:
        """Give a dense copy back."""
        self._merged = None

    def compute(self, choice: Choice, x: Tensor, layer: Product, activation_bits: int | None) -> Tensor:
        """``x (B C)`` plus the bias, in the type of ``x``; of an offloaded layer nothing is kept."""
        with without_autocast(x.device):
            return self._product(choice, x, layer, activation_bits)

    def _product(self, choice: Choice, x: Tensor, layer: Product, activation_bits: int | None) -> Tensor:

        def packed(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
            if layer.offloaded or torch.compiler.is_compiling() or ops.needs_grad(x, packed.values_Z, bias):
                keeper = self._number if packed.values_Z.is_cpu and not layer.offloaded else None  # none in CUDA graphs
                return ops.packed_linear(x, packed, bias, activation_bits=activation_bits, keeper=keeper)
            prepared = self.prepared(packed, choice.backend)
            return choice.backend.multiply(x, prepared, bias, activation_bits=activation_bits)

        if choice.way == "merged":
            weight = self._merged_weight(x.dtype, layer)
            return linear(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))
        if choice.way == "merge":
            return reference.multiply_slices(x, self._merged_slices(x.dtype, layer), layer.features[1], layer.bias)
        if choice.way == "packed":
            return layer.through_factor(x, packed)
        return layer.through_factor(x, reference.multiply if layer.offloaded else self._decoded)

    def prepared(self, packed: Packed, backend: Backend) -> PreparedMatrix:
        """What a backend needs besides the stored tensors, made anew where they changed."""
        kept = self._prepared  # read once: another thread may put its own there
        if kept is None or kept[0] is not backend or not kept[1].is_current(packed):
            kept = self._prepared = backend, backend.prepare(packed)
        return kept[1]

    def again(self, x: Tensor, meaning: str, tensors: Sequence[Tensor | None]) -> tuple[RepeatedCall, Packed] | None:
        """See ``fips.kernels.ops.Keeper``."""
        kept = self._calls.get(x.shape)
        if kept is None or kept[0] != meaning or kept[1] != _places(tensors):
            return None
        return (kept[2], kept[3]) if kept[2].dtype is x.dtype and kept[2].holds() else None

    def remember(
        self, x: Tensor, meaning: str, tensors: Sequence[Tensor | None], packed: Packed, call: RepeatedCall
    ) -> None:
        """See ``fips.kernels.ops.Keeper``."""
        if len(self._calls) >= Remembered.MOST_REPEATS:
            self._calls = {}  # put in its place: another thread may be looking one up
        self._calls[x.shape] = meaning, _places(tensors), call, packed

    def _decoded(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        decoder = _decoder(packed)
        if decoder is None:
            return reference.multiply(x, packed, bias)
        factor = decoder.decode(self.prepared(packed, decoder), x.dtype)
        return linear(x, factor, None if bias is None else bias.to(x.dtype))

    def _factor(self, packed: Packed, dtype: torch.dtype, offloaded: bool) -> Tensor:
        """The factor as a dense matrix, for the time of a call; of offloaded tensors nothing is prepared and kept."""
        decoder = None if offloaded else _decoder(packed)
        return (
            reference.decode(packed, dtype)
            if decoder is None
            else decoder.decode(self.prepared(packed, decoder), dtype)
        )

    @torch.no_grad()
    def _merged_slices(self, dtype: torch.dtype, layer: Product) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the (out, in) weight B C, formed in ``dtype`` with its usual accumulation."""
        factor = self._factor(layer.packed, dtype, layer.offloaded)
        if layer.basis_DR is None:
            yield slice(0, factor.shape[0]), factor
            return
        basis = layer.basis_DR.to(dtype)
        left, right = (factor, basis.T) if layer.up else (basis, factor)
        step = max(1, SLICE // max(1, right.shape[1]))
        for first in range(0, left.shape[0], step):
            part = slice(first, min(first + step, left.shape[0]))
            yield part, left[part] @ right

    def _merge(self, dtype: torch.dtype, layer: Product) -> Tensor:
        weight = layer.packed.values_Z.new_empty(layer.features[::-1], dtype=dtype)
        for part, rows in self._merged_slices(dtype, layer):
            weight[part] = rows
        return weight

    def _merged_weight(self, dtype: torch.dtype, layer: Product) -> Tensor:
        seen = Snapshot(contents=layer.tensors())
        merged = self._merged
        if merged is None or merged[0] != dtype or not merged[1].equals(seen):
            merged = self._merged = dtype, seen, self._merge(dtype, layer)
        return merged[2]


def _places(tensors: Sequence[Tensor | None]) -> tuple[int | None, ...]:
    return tuple([None if tensor is None else tensor.data_ptr() for tensor in tensors])


def _decoder(packed: Packed) -> Backend | None:
    """What writes a matrix out faster than torch does, where it may be asked."""
    return registry.decoder(packed) if reference.slices_suit(packed) else None
