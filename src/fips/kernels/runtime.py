"""Which way a compressed layer computes, for each number of tokens.

A layer ``y = x (B C)`` can be computed in several ways. Those of ``FRUGAL`` keep nothing but the packed tensors:

``packed``   a backend reads the packed factor, see ``fips.kernels.registry``
``decode``   torch decodes the factor, some rows at a time (on a GPU Triton all of it), then two dense products
``merge``    torch forms B C for the time of the call, some rows at a time: pays for long inputs when R is nearly D

and one keeps a dense copy, which ``extra_bytes`` reports: ``merged``. It is used only where the policy allows it.

The policy ``auto`` takes the one that ``fips.kernels.defaults`` says, without measuring anything. With ``measure``, or
``speed``, which allows ``merged`` too, the choice is made per layer shape, type, device, thread count and power of two
of the number of tokens, from a few alternating runs at the first call, and remembered in ``~/.cache/fips`` (or
``$FIPS_CACHE``) under a fingerprint of the machine. ``packed`` wins ties within 5 %.

All ways compute the same up to rounding. Beside integer values the packed kernel may round the inputs to 8 bits first,
where ``activation_bits`` is 8, or None and their type has 16 bits: 64 inputs share a scale then, and processors with
byte dot products do half the work or less. With 16 inputs count as exactly as their type says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fips.kernels import cpu, ops, reference, registry
from fips.kernels.backend import RepeatedCall, say_once
from fips.kernels.call import Product, Remembered
from fips.kernels.defaults import default_way
from fips.kernels.select import FRUGAL, POLICIES, Choice, check_bits, check_policy, select, wished_bits, wished_way
from fips.kernels.timings import Timings, Way, fingerprint, timings_file
from fips.kernels.together import Waiting
from fips.kernels.ways import Ways

__all__ = ["FRUGAL", "POLICIES", "LayerRuntime", "Way", "fingerprint", "timings_file"]

log = logging.getLogger("fips.kernels")

Places = list[tuple[Mapping[Any, object], Hashable]]

_timings = Timings()


class LayerRuntime:
    """How one layer computes; holds what its kernels need and remembers the choices of this process.

    Several threads may call a layer at a time.
    """

    def __init__(self, policy: str = "auto", activation_bits: int | None = None) -> None:
        self._ways = Ways()
        self.policy = policy
        self.activation_bits = wished_bits() if activation_bits is None else activation_bits
        self._wish = wished_way()
        self._failed = False
        self.waiting = Waiting()
        """A product made beforehand, together with that of a layer that reads the same input."""
        cpu.available()  # loaded here, not while a tracer watches

    def __reduce__(self) -> tuple[type[LayerRuntime], tuple[str, int | None]]:
        return LayerRuntime, (self.policy, self.activation_bits)  # a copy of a layer prepares its own

    @property
    def policy(self) -> str:
        return self._policy

    @policy.setter
    def policy(self, policy: str) -> None:
        self._policy = check_policy(policy)
        self._ways.forget_merged()
        self._held = Remembered()

    @property
    def activation_bits(self) -> int | None:
        """8: kernels of integer values may round inputs to 8 bits; 16: they count as exactly as their type says; None,
        where nothing is said: 8 for inputs of 16-bit types, exact for float32.

        Begins with ``$FIPS_ACTIVATION_BITS``. Raises ``ConfigError`` for other numbers.
        """
        return self._activation_bits

    @activation_bits.setter
    def activation_bits(self, bits: int | None) -> None:
        self._activation_bits = check_bits(bits)
        self._held = Remembered()

    @property
    def extra_bytes(self) -> int:
        """Memory held beyond the stored tensors: row starts, float32 scales, a merged weight."""
        return self._ways.extra_bytes

    def forward(self, x: Tensor, parts: Sequence[object], make: Callable[[], Product]) -> Tensor:
        """The product in the way the policy says.

        What ``make`` makes is used again while ``parts``, which it is made of, are the same objects; the first are the
        values, None where they are not in their usual place.
        """
        if torch.compiler.is_compiling():
            layer = make()
            layer.check(x)
            return self._compute(_traced("packed" if ops.traceable(x, layer.packed) else "decode"), x, layer)
        if self.waiting and self._held.is_of(parts):
            y = self.waiting.take(x)
            if y is not None:
                return y
        held = self._remembered(parts, make)
        product = held.product
        assert product is not None
        try:
            return self._multiply(x, product, held)
        except Exception as error:
            if ops.needs_grad(x, *product.tensors()) and not ops.raised_inside(error):
                raise  # by a hook of autograd, such as checkpointing's, which stops what it computes anew in this way
            return self._without_kernel(x, product, held, error)

    def repeated(self, shape: torch.Size, parts: Sequence[object]) -> tuple[RepeatedCall, Places] | None:
        """The call kept for inputs of a shape, of a product of these ``parts`` and without a basis.

        With it come the places, dictionaries and keys, where it is found: while they give the same objects, which
        whoever keeps it looks at, and parts and ``registry.backends()`` are the same, it serves.
        """
        held = self._held
        call = held.repeats.get(shape) if held.is_of(parts) else None
        if call is None or held.product is None or held.product.basis is not None:
            return None
        return call, [(vars(self), "_held"), (held.repeats, shape)]

    def _multiply(self, x: Tensor, product: Product, held: Remembered) -> Tensor:
        repeat = held.repeats.get(x.shape)
        if repeat is not None and self._again(x, product, repeat):
            return product.through_factor(x, repeat)
        product.check(x)
        if not ops.is_plain(x, product.packed.values_Z):
            return self._compute(_traced("decode"), x, product)
        choice = self._choice(x, product, held)
        y = self._compute(choice, x, product)
        if choice.way == "packed" and not product.offloaded and held.parts:
            self._remember(x, product, held, choice)
        return y

    def _without_kernel(self, x: Tensor, product: Product, held: Remembered, error: Exception) -> Tensor:
        """Decode in torch, from now on, where a kernel failed; what fails in torch too was no fault of the kernel."""
        try:
            y = product.through_factor(x, reference.multiply)
        except Exception:
            raise error from None
        if not isinstance(error, MemoryError):  # there may be memory again
            self._failed = True
            held.forget()
        say_once(f"a kernel failed, its layer runs on plain torch: {type(error).__name__}: {error}")
        return y

    def _remembered(self, parts: Sequence[object], make: Callable[[], Product]) -> Remembered:
        held = self._held
        if held.is_of(parts):
            return held
        layer = make()
        if layer.offloaded or parts[0] is None:
            self._held = Remembered()
            return Remembered(layer)
        held = self._held = Remembered(layer, parts)
        return held

    def _again(self, x: Tensor, layer: Product, repeat: RepeatedCall) -> bool:
        """Whether an input is like the first of its shape, which was multiplied from the packed bytes."""
        return (
            x.dtype is repeat.dtype
            and ops.is_plain(x)
            and not (torch.is_grad_enabled() and ops.needs_grad(x, *layer.tensors()))
            and repeat.holds()
        )

    def _remember(self, x: Tensor, layer: Product, held: Remembered, choice: Choice) -> None:
        """Make the next call like this one cheaper: of few tokens, without gradients."""
        if not 0 < x.numel() <= choice.backend.repeats_up_to * x.shape[-1] or not x.is_contiguous():
            return
        if torch.is_grad_enabled() and ops.needs_grad(x, *layer.tensors()):
            return
        bias = layer.bias if layer.basis is None or layer.up else None  # else it is added behind the basis
        inner = x.new_empty((*x.shape[:-1], layer.packed.shape[1])) if layer.up and layer.basis is not None else x
        prepared = self._ways.prepared(layer.packed, choice.backend)
        repeat = choice.backend.repeat(inner, prepared, bias, self._activation_bits)
        if repeat is not None:
            if repeat.company is not None and layer.basis is None:
                repeat.company.waiting = self.waiting
            held.repeat(x.shape, repeat)

    def way(self, x: Tensor, layer: Product) -> Way:
        """The way a call with this input takes; under ``measure`` and ``speed`` measures if nobody has."""
        return self._choice(x, layer, self._held).way

    def _choice(self, x: Tensor, layer: Product, held: Remembered) -> Choice:
        wanted = self._wish or self._policy
        grad = torch.is_grad_enabled() and ops.needs_grad(x, *layer.tensors())
        tokens = (x.shape[:-1].numel() - 1).bit_length()
        key: Hashable
        key = (wanted, grad, tokens, x.dtype, x.device, torch.get_num_threads(), self._activation_bits)
        choice = held.chosen.get(key)
        if choice is None:
            choice = held.chosen[key] = self._choose(wanted, grad, x, layer)
        return choice

    def _choose(self, wanted: str, grad: bool, x: Tensor, layer: Product) -> Choice:
        backend = registry.REFERENCE if self._failed else registry.choose(layer.packed, x.device, x.dtype)
        if backend is registry.REFERENCE and not self._failed:
            log.debug("no backend but torch: %s", registry.reasons(layer.packed, x.device, x.dtype))
        tokens = 1 << max(0, x.shape[:-1].numel() - 1).bit_length()
        inputs = "" if self._activation_bits is None else f" {self._activation_bits}-bit inputs"
        possible = layer.possible_ways(x, grad=grad, packed=backend is not registry.REFERENCE)
        way = select(
            wanted, possible, lambda: default_way(possible, layer, backend, tokens, grad=grad),
            lambda: layer.signature(x) + inputs, _timings, lambda way: self._compute(Choice(way, backend), x, layer),
        )  # fmt: skip
        return Choice(way, backend)

    def _compute(self, choice: Choice, x: Tensor, layer: Product) -> Tensor:
        return self._ways.compute(choice, x, layer, self._activation_bits)


def _traced(way: Way) -> Choice:
    """While a tracer watches, or for tensors that are stand-ins: torch's operations, or the operator that asks anew."""
    return Choice(way, registry.REFERENCE)
