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
import hashlib
import json
import logging
import operator
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from fips.errors import ConfigError
from fips.kernels import cpu, ops, reference
from fips.kernels.reference import Packed

__all__ = ["FRUGAL", "POLICIES", "BasisRuntime", "LayerRuntime", "Way", "fingerprint", "timings_file"]

log = logging.getLogger("fips.kernels")

Way = Literal["packed", "decode", "merge", "merged"]
FRUGAL: tuple[Way, ...] = ("packed", "decode", "merge")
POLICIES = ("auto", "speed", *FRUGAL, "merged")
"""``auto``: the fastest of ``FRUGAL``. ``speed``: the fastest of all. Or the one named."""

TIE = 1.05
Basis = Callable[..., Tensor]


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
        if self._prepared is None or not self._prepared.is_current(packed):
            self._prepared = cpu.prepare(packed)
        return multiply(x, self._prepared)

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


class LayerRuntime:
    """How one layer computes; holds what its kernels need and remembers the choices of this process."""

    def __init__(self, policy: str = "auto", activation_bits: int | None = None) -> None:
        self.policy = policy
        wish = os.environ.get("FIPS_ACTIVATION_BITS")
        self.activation_bits = int(wish) if activation_bits is None and wish else activation_bits
        self._prepared: ops.Prepared | None = None
        self._merged: Tensor | None = None
        self._merged_key: tuple[Any, ...] = ()
        self._product: Product | None = None
        self._parts: Sequence[object] = ()
        self._chosen: dict[tuple[Any, ...], Way] = {}
        self._repeats: dict[torch.Size, cpu.Repeat] = {}
        self._wish = os.environ.get("FIPS_RUNTIME")
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
        self._repeats = {}

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
        self._repeats = {}

    @property
    def extra_bytes(self) -> int:
        """Memory held beyond the stored tensors: row starts, float32 scales, a merged weight."""
        merged = 0 if self._merged is None else self._merged.numel() * self._merged.element_size()
        return merged + (0 if self._prepared is None else self._prepared.extra_bytes)

    def forward(self, x: Tensor, parts: Sequence[object], make: Callable[[], Product]) -> Tensor:
        """The product in the way the policy and the measurements say.

        What ``make`` makes is used again while ``parts``, which it is made of, are the same objects; the first are the
        values, None where they are not in their usual place.
        """
        if torch.compiler.is_compiling():
            layer = make()
            return self._compute("packed" if ops.traceable(x, layer.packed) else "decode", x, layer)
        layer = self._remembered(parts, make)
        try:
            return self._multiply(x, layer)
        except Exception as error:
            return self._without_kernel(x, layer, error)

    def _multiply(self, x: Tensor, layer: Product) -> Tensor:
        repeat = self._repeats.get(x.shape)
        if repeat is not None and layer is self._product and self._again(x, layer, repeat):
            return layer.through_factor(x, repeat)
        if not ops.is_plain(x, layer.packed.values_Z):
            return self._compute("decode", x, layer)
        way = self.way(x, layer)
        y = self._compute(way, x, layer)
        if way == "packed" and layer is self._product:
            self._remember(x, layer)
        return y

    def _without_kernel(self, x: Tensor, layer: Product, error: Exception) -> Tensor:
        """Decode in torch, from now on, where a kernel failed; what fails in torch too was no fault of the kernel."""
        try:
            y = layer.through_factor(x, reference.multiply)
        except Exception:
            raise error from None
        if not isinstance(error, MemoryError):  # there may be memory again
            self._failed = True
            self._repeats.clear()
            self._chosen.clear()
        _say_once(f"a kernel failed, its layer runs on plain torch: {type(error).__name__}: {error}")
        return y

    def _remembered(self, parts: Sequence[object], make: Callable[[], Product]) -> Product:
        if self._product is None or not all(map(operator.is_, parts, self._parts)):
            layer = make()
            self._repeats.clear()
            if layer.offloaded or parts[0] is None:
                return layer
            self._product, self._parts = layer, parts
            self._chosen.clear()
        return self._product

    def _again(self, x: Tensor, layer: Product, repeat: cpu.Repeat) -> bool:
        """Whether an input is like the first of its shape, which was multiplied from the packed bytes."""
        return (
            x.dtype is repeat.dtype
            and ops.is_plain(x)
            and not (torch.is_grad_enabled() and ops.needs_grad(x, *layer.tensors()))
            and repeat.holds()
        )

    def _remember(self, x: Tensor, layer: Product) -> None:
        """Make the next call like this one cheaper: of few tokens, on a CPU, without gradients."""
        prepared = self._prepared
        bias = layer.bias if layer.basis is None or layer.up else None  # else it is added behind the basis
        if not isinstance(prepared, cpu.Prepared) or not cpu.Repeat.suits(x, bias):
            return
        if torch.is_grad_enabled() and ops.needs_grad(x, *layer.tensors()):
            return
        if len(self._repeats) >= 8:
            self._repeats.clear()
        inner = x.new_empty((*x.shape[:-1], layer.packed.shape[1])) if layer.up and layer.basis is not None else x
        self._repeats[x.shape] = cpu.Repeat(inner, prepared, bias, self._activation_bits)

    def way(self, x: Tensor, layer: Product) -> Way:
        """The way a call with this input takes; measures if nobody has."""
        wanted = self._wish or self._policy
        grad = torch.is_grad_enabled() and ops.needs_grad(x, *layer.tensors())
        tokens = (x.numel() // x.shape[-1] - 1).bit_length()
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
        if key not in self._chosen:
            self._chosen[key] = self._choose(wanted, grad, x, layer)
        return self._chosen[key]

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
        if self._prepared is None or not self._prepared.is_current(packed):
            self._prepared = ops.prepare(packed)
        return self._prepared

    def _decoded(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        return linear(x, self._factor(packed, x.dtype), None if bias is None else bias.to(x.dtype))

    def _factor(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """The factor as a dense matrix, for the time of a call. Not for offloaded tensors: what is prepared is kept."""
        if not torch.compiler.is_compiling() and ops.decodes(packed):
            return ops.decode(self._ready(packed), dtype)
        return reference.to_dense(packed).to(dtype)

    @torch.no_grad()
    def _merge(self, dtype: torch.dtype, layer: Product) -> Tensor:
        """The (out, in) weight B F, formed in ``dtype`` with its usual accumulation."""
        packed = layer.packed
        factor = reference.to_dense(packed).to(dtype) if layer.offloaded else self._factor(packed, dtype)
        if layer.basis_DR is None:
            return factor
        basis = layer.basis_DR.to(dtype)
        return factor @ basis.T if layer.up else basis @ factor

    def _merged_weight(self, dtype: torch.dtype, layer: Product) -> Tensor:
        key = (dtype, *layer.versions())
        if self._merged is None or self._merged_key != key:
            self._merged, self._merged_key = self._merge(dtype, layer), key
        return self._merged


@functools.cache
def _say_once(line: str) -> None:
    log.warning("%s", line)


class Product:
    """What one call multiplies by: a packed factor, its basis if any, and the bias."""

    __slots__ = ("basis", "basis_DR", "bias", "offloaded", "packed", "up")

    def __init__(
        self,
        packed: Packed,
        *,
        up: bool,
        bias: Tensor | None,
        basis: Basis | None,
        basis_DR: Tensor | None,
        offloaded: bool = False,
    ) -> None:
        self.packed, self.up, self.bias, self.basis, self.basis_DR = packed, up, bias, basis, basis_DR
        self.offloaded = offloaded
        """The tensors are there for this call only: nothing may be kept of them."""

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


class _Timings:
    """Seconds of every way by signature, in memory and in a file of this machine."""

    def __init__(self) -> None:
        self._seconds: dict[str, dict[str, float]] | None = None

    def fastest(self, signature: str, ways: tuple[Way, ...], compute: Callable[[Way], Tensor]) -> Way:
        known = self._load().get(signature, {})
        missing = [way for way in ways if way not in known]
        if missing:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return ways[0]
            known = _measure(ways, compute)
            self._load().setdefault(signature, {}).update(known)
            self._save()
            log.debug("%s: %s", signature, known)
        best = min(known[way] for way in ways)
        return next(way for way in ways if known[way] <= TIE * best)

    def forget(self) -> None:
        """Read the file anew at the next call."""
        self._seconds = None

    def _load(self) -> dict[str, dict[str, float]]:
        if self._seconds is None:
            try:
                self._seconds = json.loads(timings_file().read_text(encoding="utf-8"))["seconds"]
            except (OSError, ValueError, KeyError):
                self._seconds = {}
        assert self._seconds is not None
        return self._seconds

    def _save(self) -> None:
        path = timings_file()
        scratch = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            record = {"machine": _machine(), "seconds": self._seconds}
            scratch.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            scratch.replace(path)
        except OSError as error:
            log.debug("timings are kept for this process only: %s", error)


_timings = _Timings()


@torch.no_grad()
def _measure(ways: tuple[Way, ...], compute: Callable[[Way], Tensor]) -> dict[str, float]:
    """Median seconds of each way: alternating runs, at least 3 and at most 9, about 30 ms for all."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways:
        compute(way)
    begin = time.perf_counter()
    for run in range(9):
        for way in ways:
            start = time.perf_counter()
            _wait(compute(way))
            seconds[way].append(time.perf_counter() - start)
        if run >= 2 and time.perf_counter() - begin > 0.03:
            break
    return {way: statistics.median(runs) for way, runs in seconds.items()}


def _wait(y: Tensor) -> None:
    if y.device.type == "cuda":
        torch.cuda.synchronize(y.device)


def fingerprint() -> str:
    """A name for this machine and the versions that timings depend on."""
    return hashlib.sha256(json.dumps(_machine(), sort_keys=True).encode()).hexdigest()[:16]


def timings_file() -> Path:
    """Where choices are remembered; ``$FIPS_CACHE`` or the user's cache directory."""
    cache = os.environ.get("FIPS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fips"
    return Path(cache) / f"timings-{fingerprint()}.json"


def _machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "isa": list(cpu.isa_names()),
        "abi": cpu.ABI,
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
