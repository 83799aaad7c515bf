"""What one call of a layer multiplies by, and what calls of one product have found out."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from fips.formats.packed import Packed
from fips.kernels import registry
from fips.kernels.backend import RepeatedCall
from fips.kernels.reference import check_inputs
from fips.kernels.select import Choice
from fips.kernels.timings import Way

__all__ = ["Basis", "Product", "Remembered"]

Basis = Callable[..., Tensor]


class Product:
    """What one call multiplies by: a packed factor, its basis if any, and the bias."""

    __slots__ = ("basis", "basis_DR", "bias", "features", "offloaded", "packed", "up")

    def __init__(
        self,
        packed: Packed,
        *,
        up: bool,
        features: tuple[int, int],
        bias: Tensor | None,
        basis: Basis | None,
        basis_DR: Tensor | None,
        offloaded: bool = False,
    ) -> None:
        self.packed, self.up, self.bias, self.basis, self.basis_DR = packed, up, bias, basis, basis_DR
        self.features = features
        """Of inputs and of outputs."""
        self.offloaded = offloaded
        """The tensors are there for this call only: nothing may be kept of them."""

    def check(self, x: Tensor) -> None:
        """Raise ``ShapeError`` for inputs, or a bias, that do not fit; a basis sees to its own."""
        check_inputs(x, self.features[0], self.bias, self.features[1])

    def tensors(self) -> tuple[Tensor, ...]:
        packed = self.packed
        stored = (packed.values_Z, packed.pattern, packed.scales_N, packed.group_scales)
        return tuple(tensor for tensor in (*stored, self.bias, self.basis_DR) if tensor is not None)

    def possible_ways(self, x: Tensor, *, grad: bool, packed: bool) -> tuple[Way, ...]:
        """Those that a call could take, ``packed`` among them where a backend reads the packed bytes."""
        ways: tuple[Way, ...] = ("decode", "merged") if self.basis is None else ("decode", "merge", "merged")
        if grad or self.offloaded or (self.basis_DR is not None and self.basis_DR.device != x.device):
            ways = ("decode",)  # gradients go through the stored tensors; another basis is there only to be called
        return ("packed", *ways) if packed else ways

    def through_factor(self, x: Tensor, multiply: Callable[[Tensor, Packed, Tensor | None], Tensor]) -> Tensor:
        """Basis and factor one after the other, as the layer stores them."""
        if self.basis is None:
            return multiply(x, self.packed, self.bias)
        if self.up:
            return multiply(self.basis(x).to(x.device), self.packed, self.bias)  # a dispatched basis may live elsewhere
        y = self.basis(multiply(x, self.packed, None), expand=True).to(x.device)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def signature(self, x: Tensor) -> str:
        """Everything the speed depends on; tokens up to the next power of two."""
        packed, tokens = self.packed, max(1, x.shape[:-1].numel())
        rows, cols = packed.shape
        percent = round(100 * packed.kept / (rows * cols))
        parts = (
            registry.choose(packed, x.device, x.dtype).name, f"{x.device.type}:{torch.get_num_threads()}",
            "in" if self.up else "out", f"{rows}x{cols}", packed.fmt,
            f"{percent}%", packed.kind if packed.rotation == 1 else f"{packed.kind} turned",
            "no basis" if self.basis_DR is None else self.basis_DR.shape[0],
            x.dtype, f"<={1 << (tokens - 1).bit_length()}",
        )  # fmt: skip
        return " ".join(str(part).removeprefix("torch.") for part in parts)


class Remembered:
    """What calls of one product have found out. Never changed for another product: put in its place as a whole, so
    that threads inside a call go on with what they began with."""

    MOST_REPEATS = 8

    __slots__ = ("backends", "chosen", "inference", "parts", "product", "repeats")

    def __init__(self, product: Product | None = None, parts: Sequence[object] = ()) -> None:
        self.product, self.parts = product, parts
        self.backends = registry.backends()
        self.inference = torch.is_inference_mode_enabled()
        self.chosen: dict[Hashable, Choice] = {}
        self.repeats: dict[torch.Size, RepeatedCall] = {}

    def is_of(self, parts: Sequence[object]) -> bool:
        """Whether the product is made of the same objects, and the backends are those that it knows.

        What inference mode made autograd refuses to keep, so it serves only there.
        """
        same = self.product is not None and self.backends is registry.backends()
        if self.inference and not torch.is_inference_mode_enabled():
            return False
        return same and all(map(operator.is_, parts, self.parts))

    def repeat(self, shape: torch.Size, call: RepeatedCall) -> None:
        """Keep a call for the next inputs of this shape."""
        if len(self.repeats) >= self.MOST_REPEATS:
            self.repeats.clear()
        self.repeats[shape] = call

    def forget(self) -> None:
        """What was found out, not the product."""
        self.repeats.clear()
        self.chosen.clear()
