"""Matrices as llama.cpp stores them: blocks of 32 integers of a row under one scale in float16.

Shape legend: N rows (outputs), K columns (the reduction), B blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fips.formats.packed import in_place
from fips.layers.linear import FactoredLinear

__all__ = ["BLOCK", "Choice", "GgufType", "block_scales", "choose", "half_type", "integer_array", "rounded_array"]

BLOCK = 32
"""Columns of a block."""
GgufType = Literal["q8_0", "f16"]
LARGEST_HALF = 65504.0
_INTEGERS = {4: "Q4_0", 5: "Q5_0"}
"""Types by the bits of their integers; all others that fit into a byte are Q8_0."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The type that a packed layer gets, and why."""

    kind: str
    """What the layer holds, in words."""
    type: str
    """Name of the type, as ``gguf.GGMLQuantizationType`` has it."""
    integers: bool = False
    """Whether the integers of the file are those of the layer."""
    kept: bool = False
    """Whether these, or the floating numbers, are."""
    larger: bool = False
    """Whether it takes more bits than the layer since llama.cpp has no such numbers."""


def choose(layer: FactoredLinear, wanted: GgufType) -> Choice:
    """The smallest type that keeps the numbers of a layer, or ``wanted`` where none does.

    Numbers are kept if they are integers, or levels, which are integers too, in the columns of the matrix itself under
    scales that a block of 32 shares. Blocks fill rows, or the type is F16.
    """
    numbers, columns = layer.value_format, layer.in_features
    own = layer.rotation == 1 and layer.basis is None
    extras = [f"turned in blocks of {layer.rotation}"] if layer.rotation > 1 else []
    extras += ["with a shared basis"] if layer.basis is not None else []
    extras += [f"rows of {columns}"] if columns % BLOCK else []
    kind = ", ".join([layer.packed().kind, *extras])
    if not numbers.scaled:
        type_ = half_type(layer.factor() if own else layer.dense_weight())
        kept = own and (type_ == "F32" or layer.values.dtype != torch.float32)
        return Choice(kind, type_, kept=kept, larger=not columns % BLOCK)
    shared = numbers.scale_group is None or numbers.scale_group % BLOCK == 0
    if own and shared and not columns % BLOCK:
        if float(block_scales(layer).abs().max()) > LARGEST_HALF:
            return Choice(kind, "F32", kept=True)
        type_ = _INTEGERS.get(max(layer.bits or 8, 4), "Q8_0") if numbers.plain else "Q8_0"
        return Choice(kind, type_, integers=True, kept=True, larger=not numbers.plain or layer.bits in (2, 3))
    whole = wanted == "q8_0" and not columns % BLOCK
    return Choice(kind, "Q8_0" if whole else half_type(layer.dense_weight()), larger=not columns % BLOCK)


def half_type(matrix: Tensor) -> str:
    """BF16 for what is in it, else F16, or F32 where a number is too large for that."""
    if matrix.dtype == torch.bfloat16:
        return "BF16"
    return "F32" if matrix.numel() and float(matrix.detach().abs().max()) > LARGEST_HALF else "F16"


def block_scales(layer: FactoredLinear) -> Tensor:
    """What the integers of every block are multiplied by, (N, B) in float64: the product of the scales of a layer."""
    groups = layer.group_scales if layer.value_format.scale_group else None
    steps = layer.value_format.steps(layer.scales.detach().double(), groups, layer.in_features)
    blocks = layer.in_features // BLOCK
    return steps.expand(-1, blocks) if steps.shape[1] == 1 else steps[:, ::BLOCK]


def integer_array(layer: FactoredLinear, type_: str, arrange: Callable[[Tensor], Tensor]) -> Any:
    """The rows of a layer whose choice is exact, as bytes; ``arrange`` puts rows into the order of the file."""
    numbers = layer.value_format.decode(in_place(layer.packed())).to(torch.int8)
    blocks = arrange(numbers).contiguous().numpy().reshape(len(numbers), -1, BLOCK)
    scales = arrange(block_scales(layer)).contiguous().numpy().astype("<f2")
    parts = [scales[..., None].view(np.uint8), *_PACK[type_](blocks)]
    return np.concatenate(parts, axis=-1).reshape(len(numbers), -1)


def _bytes(blocks: Any) -> list[Any]:
    return [blocks.view(np.uint8)]


def _halves(blocks: Any) -> list[Any]:
    """Half a byte each: entry j of a block below, entry j + 16 above, both plus 8."""
    unsigned = (blocks + 8).astype(np.uint8)
    return [unsigned[..., :16] | unsigned[..., 16:] << 4]


def _fifths(blocks: Any) -> list[Any]:
    """Plus 16; the fifth bits of a block first, in their order, then the other four as ``_halves`` has them."""
    unsigned = (blocks + 16).astype(np.uint8)
    highest = np.packbits(unsigned >> 4, axis=-1, bitorder="little")
    return [highest, unsigned[..., :16] & 15 | (unsigned[..., 16:] & 15) << 4]


_PACK: dict[str, Callable[[Any], list[Any]]] = {"Q4_0": _halves, "Q5_0": _fifths, "Q8_0": _bytes}


def rounded_array(matrix: Tensor, type_: str, package: Any) -> Any:
    """A tensor in a type of floating numbers, or rounded to Q8_0 by ``package``, which is ``gguf``."""
    matrix = matrix.detach().contiguous()
    if type_ == "BF16":
        return matrix.to(torch.bfloat16).view(torch.uint8).numpy()
    if type_ in ("F16", "F32"):
        return matrix.to(torch.float16 if type_ == "F16" else torch.float32).numpy()
    return package.quants.quantize(matrix.float().numpy(), package.GGMLQuantizationType[type_])
