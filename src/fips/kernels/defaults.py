"""The way that a layer takes unless another is asked for: rules from timings, so that nothing is measured at a call.

``benchmarks/ways.py`` timed one layer of every kind in both ways on a Zen 4 processor, with and without its better
instruction sets (``benchmarks/results/ways-*.json``); of a GPU ``gpu-layers.json`` says what layers cost. AMX stands
with AVX-512, ``mlp-layers-*.json`` has its layers beside dense ones. The policy ``measure`` finds out on the machine
itself.
"""

from __future__ import annotations

from fips.formats.packed import Packed
from fips.kernels import cpu
from fips.kernels.backend import Backend
from fips.kernels.call import Product
from fips.kernels.timings import Way

__all__ = ["PACKED_UP_TO", "default_way", "kind_of", "merging_pays", "packed_up_to"]

PACKED_UP_TO: dict[str, dict[str, int]] = {
    "portable": {"floats": 0, "bytes": 0, "codes": 32, "coded": 32, "pattern": 64},
    "avx2": {"floats": 4},
    "avx_vnni": {"floats": 4},
    "neon": {"floats": 4, "bytes": 4, "codes": 32, "coded": 32, "pattern": 64},
    "triton": {"floats": 0, "bytes": 64, "codes": 64, "coded": 32, "pattern": 16},
}
"""Tokens up to which the packed bytes are read, by instruction set or backend and by ``kind_of`` a matrix; beyond them
rows are decoded and torch multiplies. What is not named is read packed whatever the number of tokens.

With AVX2 and everything but floats kept whole, decoding costs more than torch's product gains up to 512 tokens, and at
2048 the two are within a tenth of each other (blocks: a sixth). Coded values on a GPU were not timed.
NEON was not timed: few tokens, which are bound by memory, and what the portable code, which is slower, wins already.
"""
GAIN = 0.9
"""Of the operations, at which it is worth while to form B C first."""


def default_way(possible: tuple[Way, ...], layer: Product, backend: Backend, tokens: int, *, grad: bool) -> Way:
    """One of the ways that are possible, for so many tokens; with gradients ``packed``, which keeps no dense matrix."""
    if grad:
        return possible[0]
    if "merge" in possible and merging_pays(layer, tokens):
        return "merge"
    if "packed" in possible and tokens <= packed_up_to(layer.packed, backend):
        return "packed"
    return "decode"


def kind_of(packed: Packed) -> str:
    """What its speed depends on: a pattern, or how values are stored that leave no entry out."""
    numbers = packed.numbers
    if packed.layout.group_bits:
        return "pattern"
    if numbers.bits is None:
        return "floats"
    if numbers.memory:
        return "coded"
    return "bytes" if numbers.bits == 8 else "codes"


def merging_pays(layer: Product, tokens: int) -> bool:
    """Whether B C and a product with it are clearly fewer operations than two products."""
    if layer.basis_DR is None:
        return False
    width, rank = layer.basis_DR.shape
    hidden = sum(layer.features) - width
    return width * hidden * (rank + tokens) < GAIN * tokens * rank * (width + hidden)


def packed_up_to(packed: Packed, backend: Backend) -> float:
    """Tokens up to which a backend reads the packed bytes of a matrix."""
    level = cpu.isa_names()[-1] if backend.name == "cpu" else backend.name
    return PACKED_UP_TO.get(level, {}).get(kind_of(packed), float("inf"))
