"""Which way a compressed layer computes, for each number of tokens: measured once on the machine it runs on.

A layer ``y = x (B F)`` can be computed in several ways. Those of ``FRUGAL`` keep nothing but the packed tensors:

``packed``   the compiled or Triton kernel reads the packed factor
``decode``   torch decodes the factor for the time of the call, then two dense products
``merge``    torch forms B F for the time of the call: pays for long inputs when R is above D

and one keeps a dense copy, which ``extra_bytes`` reports: ``merged``. It is used only where the policy allows it.

The choice is made per layer shape, type, device, thread count and power of two of the number of tokens, from a few
alternating runs at the first call, and remembered in ``~/.cache/fips`` (or ``$FIPS_CACHE``) under a fingerprint of the
machine. ``packed`` wins ties within 5 %.

All ways compute the same up to rounding, unless ``activation_bits`` is 8: then the packed kernel may round every token
to 8 bits before it multiplies by integer values, with one scale per token. Processors with byte dot products (VNNI,
AMX) do half the work then.
"""

from __future__ import annotations

import functools
import logging
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fips.errors import ConfigError
from fips.formats.packed import Packed, to_dense
from fips.kernels import cpu, ops, reference
from fips.kernels.reference import check_inputs
from fips.kernels.timings import Timings, Way, fingerprint, timings_file

__all__ = ["FRUGAL", "POLICIES", "BasisRuntime", "LayerRuntime", "Way", "fingerprint", "timings_file"]

log = logging.getLogger("fips.kernels")

FRUGAL: tuple[Way, ...] = ("packed", "decode", "merge")
POLICIES = ("auto", "speed", *FRUGAL, "merged")
"""``auto``: the fastest of ``FRUGAL``. ``speed``: the fastest of all. Or the one named."""

Basis = Callable[..., Tensor]
_timings = Timings()


class BasisRuntime:
    """Products with a dense basis; few tokens on a CPU go through a kernel that reads it at memory speed."""

    FEW = 4

    def __init__(self) -> None:
        self._prepared: cpu.Prepared | None = None
        self._failed = False

    def __reduce__(self) -> tuple[type[BasisRuntime], tuple[()]]:
        return BasisRuntime, ()

    def multiply(self, x: Tensor, weight_DR: Tensor, *, expand: bool, offloaded: bool = False) -> Tensor:
        """``x B`` of (..., D) inputs, or with ``expand`` the vectors ``x B^T`` of (..., R).

        Nothing is kept of an ``offloaded`` weight, which is there for this call only.
        """
        check_inputs(x, weight_DR.shape[1] if expand else weight_DR.shape[0])
        if not self._few(x, weight_DR):
            weight = weight_DR.to(x.dtype)
            return linear(x, weight) if expand else linear(x, weight.T)
        try:
            return self._multiply(x, weight_DR, expand, offloaded)
        except Exception as error:
            self._failed = True
            y = self.multiply(x, weight_DR, expand=expand)
            _say_once(f"a kernel failed, its basis is multiplied by plain torch: {type(error).__name__}: {error}")
            return y

    def _multiply(self, x: Tensor, weight_DR: Tensor, expand: bool, offloaded: bool) -> Tensor:
        packed = Packed(weight_DR, weight_DR.new_empty(0), None, (weight_DR.shape[0], weight_DR.shape[1]), "dense")
        multiply = cpu.multiply if expand else cpu.multiply_columns
        if offloaded:
            return multiply(x, cpu.prepare(packed))
        prepared = self._prepared  # read once: another thread may put its own there
        if prepared is None or not prepared.is_current(packed):
            prepared = self._prepared = cpu.prepare(packed)
        return multiply(x, prepared)

    def _few(self, x: Tensor, weight: Tensor) -> bool:
        return (
            not torch.compiler.is_compiling()
            and not self._failed
            and x.shape[:-1].numel() in range(1, self.FEW + 1)
            and ops.is_plain(x, weight)
            and not ops.needs_grad(x, weight)
            and weight.is_contiguous()
            and weight.dtype in (torch.float32, torch.bfloat16)
            and cpu.available()
        )


class _Remembered:
    """What calls of one product have found out. Never changed for another product: put in its place as a whole, so
    that threads inside a call go on with what they began with."""

    __slots__ = ("chosen", "parts", "product", "repeats")

    def __init__(self, product: Product | None = None, parts: Sequence[object] = ()) -> None:
        self.product, self.parts = product, parts
        self.chosen: dict[tuple[Any, ...], Way] = {}
        self.repeats: dict[torch.Size, cpu.Repeat] = {}

    def is_of(self, parts: Sequence[object]) -> bool:
        return self.product is not None and all(map(operator.is_, parts, self.parts))


class LayerRuntime:
    """How one layer computes; holds what its kernels need and remembers the choices of this process.

    Several threads may call a layer at a time.
    """

    def __init__(self, policy: str = "auto", activation_bits: int | None = None) -> None:
        self._held = _Remembered()
        self._prepared: ops.Prepared | None = None
        self._merged: tuple[tuple[Any, ...], Tensor] | None = None
        self.policy = policy
        self.activation_bits = _wished_bits() if activation_bits is None else activation_bits
        self._wish = _wished_way()
        self._failed = False
        cpu.available()  # loaded here, not while a tracer watches

    def __reduce__(self) -> tuple[type[LayerRuntime], tuple[str, int | None]]:
        return LayerRuntime, (self.policy, self.activation_bits)  # a copy of a layer prepares its own

    @property
    def policy(self) -> str:
        return self._policy

    @policy.setter
    def policy(self, policy: str) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"unknown runtime policy {policy!r}; known: {', '.join(POLICIES)}")
        self._policy = policy
        self._merged = None
        self._held = _Remembered()

    @property
    def activation_bits(self) -> int | None:
        """None: inputs count as exactly as their type says. 8: kernels of integer values may round them to 8 bits.

        Begins with ``$FIPS_ACTIVATION_BITS``. Raises ``ConfigError`` for other numbers.
        """
        return self._activation_bits

    @activation_bits.setter
    def activation_bits(self, bits: int | None) -> None:
        if bits not in (None, 8):
            raise ConfigError(f"activation_bits is 8, or None for exact inputs; got {bits}")
        self._activation_bits = bits
        self._held = _Remembered()

    @property
    def extra_bytes(self) -> int:
        """Memory held beyond the stored tensors: row starts, float32 scales, a merged weight."""
        merged, prepared = self._merged, self._prepared
        return (0 if merged is None else merged[1].nbytes) + (0 if prepared is None else prepared.extra_bytes)

    def forward(self, x: Tensor, parts: Sequence[object], make: Callable[[], Product]) -> Tensor:
        """The product in the way the policy and the measurements say.

        What ``make`` makes is used again while ``parts``, which it is made of, are the same objects; the first are the
        values, None where they are not in their usual place.
        """
        if torch.compiler.is_compiling():
            layer = make()
            layer.check(x)
            return self._compute("packed" if ops.traceable(x, layer.packed) else "decode", x, layer)
        held = self._remembered(parts, make)
        product = held.product
        assert product is not None
        try:
            return self._multiply(x, product, held)
        except Exception as error:
            return self._without_kernel(x, product, held, error)

    def _multiply(self, x: Tensor, product: Product, held: _Remembered) -> Tensor:
        repeat = held.repeats.get(x.shape)
        if repeat is not None and self._again(x, product, repeat):
            return product.through_factor(x, repeat)
        product.check(x)
        if not ops.is_plain(x, product.packed.values_Z):
            return self._compute("decode", x, product)
        way = self._way(x, product, held)
        y = self._compute(way, x, product)
        if way == "packed" and not product.offloaded and held.parts:
            self._remember(x, product, held)
        return y

    def _without_kernel(self, x: Tensor, product: Product, held: _Remembered, error: Exception) -> Tensor:
        """Decode in torch, from now on, where a kernel failed; what fails in torch too was no fault of the kernel."""
        try:
            y = product.through_factor(x, reference.multiply)
        except Exception:
            raise error from None
        if not isinstance(error, MemoryError):  # there may be memory again
            self._failed = True
            held.repeats.clear()
            held.chosen.clear()
        _say_once(f"a kernel failed, its layer runs on plain torch: {type(error).__name__}: {error}")
        return y

    def _remembered(self, parts: Sequence[object], make: Callable[[], Product]) -> _Remembered:
        held = self._held
        if held.is_of(parts):
            return held
        layer = make()
        if layer.offloaded or parts[0] is None:
            self._held = _Remembered()
            return _Remembered(layer)
        held = self._held = _Remembered(layer, parts)
        return held

    def _again(self, x: Tensor, layer: Product, repeat: cpu.Repeat) -> bool:
        """Whether an input is like the first of its shape, which was multiplied from the packed bytes."""
        return (
            x.dtype is repeat.dtype
            and ops.is_plain(x)
            and not (torch.is_grad_enabled() and ops.needs_grad(x, *layer.tensors()))
            and repeat.holds()
        )

    def _remember(self, x: Tensor, layer: Product, held: _Remembered) -> None:
        """Make the next call like this one cheaper: of few tokens, on a CPU, without gradients."""
        bias = layer.bias if layer.basis is None or layer.up else None  # else it is added behind the basis
        if layer.packed.values_Z.is_cuda or not cpu.Repeat.suits(x, bias):
            return
        if torch.is_grad_enabled() and ops.needs_grad(x, *layer.tensors()):
            return
        prepared = self._ready(layer.packed)
        if not isinstance(prepared, cpu.Prepared):
            return
        if len(held.repeats) >= 8:
            held.repeats.clear()
        inner = x.new_empty((*x.shape[:-1], layer.packed.shape[1])) if layer.up and layer.basis is not None else x
        held.repeats[x.shape] = cpu.Repeat(inner, prepared, bias, self._activation_bits)

    def way(self, x: Tensor, layer: Product) -> Way:
        """The way a call with this input takes; measures if nobody has."""
        return self._way(x, layer, self._held)

    def _way(self, x: Tensor, layer: Product, held: _Remembered) -> Way:
        wanted = self._wish or self._policy
        grad = torch.is_grad_enabled() and ops.needs_grad(x, *layer.tensors())
        tokens = (x.shape[:-1].numel() - 1).bit_length()
        key = (
            wanted,
            grad,
            tokens,
            x.dtype,
            x.device,
            torch.get_num_threads(),
            cpu.available(),
            self._activation_bits,
        )
        way = held.chosen.get(key)
        if way is None:
            way = held.chosen[key] = self._choose(wanted, grad, x, layer)
        return way

    def _choose(self, wanted: str, grad: bool, x: Tensor, layer: Product) -> Way:
        possible = self._possible(grad, x, layer)
        if wanted in possible:
            return wanted
        if len(possible) == 1 or wanted not in ("auto", "speed"):
            return possible[0]
        if wanted == "auto":
            possible = tuple(way for way in possible if way != "merged")
        inputs = "" if self._activation_bits is None else f" {self._activation_bits}-bit inputs"
        return _timings.fastest(layer.signature(x) + inputs, possible, lambda way: self._compute(way, x, layer))

    def _possible(self, grad: bool, x: Tensor, layer: Product) -> tuple[Way, ...]:
        packed = not self._failed and ops.supports(x, layer.packed)
        if grad:
            return ("packed", "decode") if packed else ("decode",)
        ways: tuple[Way, ...] = ("decode", "merged") if layer.basis is None else ("decode", "merge", "merged")
        if layer.offloaded or (layer.basis_DR is not None and layer.basis_DR.device != x.device):
            ways = ("decode",)  # the basis is not here to be read, only to be called
        return ("packed", *ways) if packed else ways

    def _compute(self, way: Way, x: Tensor, layer: Product) -> Tensor:
        if way in ("merge", "merged"):
            weight = self._merged_weight(x.dtype, layer) if way == "merged" else self._merge(x.dtype, layer)
            return linear(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))
        if way == "packed" and layer.offloaded:
            return layer.through_factor(x, ops.packed_linear)
        if way == "packed":
            return layer.through_factor(x, self._packed)
        return layer.through_factor(x, reference.multiply if layer.offloaded else self._decoded)

    def _packed(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling() or ops.needs_grad(x, packed.values_Z, bias):
            return ops.packed_linear(x, packed, bias)
        return ops.multiply(x, self._ready(packed), bias, activation_bits=self._activation_bits)

    def _ready(self, packed: Packed) -> ops.Prepared:
        prepared = self._prepared  # read once: another thread may put its own there
        if prepared is None or not prepared.is_current(packed):
            prepared = self._prepared = ops.prepare(packed)
        return prepared

    def _decoded(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        return linear(x, self._factor(packed, x.dtype), None if bias is None else bias.to(x.dtype))

    def _factor(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """The factor as a dense matrix, for the time of a call. Not for offloaded tensors: what is prepared is kept."""
        if not torch.compiler.is_compiling() and ops.decodes(packed):
            return ops.decode(self._ready(packed), dtype)
        return to_dense(packed).to(dtype)

    @torch.no_grad()
    def _merge(self, dtype: torch.dtype, layer: Product) -> Tensor:
        """The (out, in) weight B F, formed in ``dtype`` with its usual accumulation."""
        packed = layer.packed
        factor = to_dense(packed).to(dtype) if layer.offloaded else self._factor(packed, dtype)
        if layer.basis_DR is None:
            return factor
        basis = layer.basis_DR.to(dtype)
        return factor @ basis.T if layer.up else basis @ factor

    def _merged_weight(self, dtype: torch.dtype, layer: Product) -> Tensor:
        key = (dtype, *layer.versions())
        merged = self._merged
        if merged is None or merged[0] != key:
            merged = self._merged = key, self._merge(dtype, layer)
        return merged[1]


@functools.cache
def _say_once(line: str) -> None:
    log.warning("%s", line)


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
        found = (self.packed.values_Z, self.packed.pattern, self.packed.scales_N, self.bias, self.basis_DR)
        return tuple(tensor for tensor in found if tensor is not None)

    def versions(self) -> tuple[int, ...]:
        return tuple(number for t in self.tensors() for number in (t.data_ptr(), 0 if t.is_inference() else t._version))

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
        kept = round(100 * packed.kept / (rows * cols))
        parts = (
            f"{x.device.type}:{torch.get_num_threads()}", "up" if self.up else "down", f"{rows}x{cols}", packed.fmt,
            f"{kept}%", packed.kind, "no basis" if self.basis_DR is None else self.basis_DR.shape[0],
            x.dtype, f"<={1 << (tokens - 1).bit_length()}",
        )  # fmt: skip
        return " ".join(str(part).removeprefix("torch.") for part in parts)


def _wished_bits() -> int | None:
    wish = os.environ.get("FIPS_ACTIVATION_BITS")
    if wish and not wish.isdecimal():
        raise ConfigError(f"$FIPS_ACTIVATION_BITS is 8 or empty; got {wish!r}")
    return int(wish) if wish else None


def _wished_way() -> str | None:
    wish = os.environ.get("FIPS_RUNTIME")
    if wish and wish not in POLICIES:
        raise ConfigError(f"unknown $FIPS_RUNTIME {wish!r}; known: {', '.join(POLICIES)}")
    return wish or None
