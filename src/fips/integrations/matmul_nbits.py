"""Packed layers as ``MatMulNBits`` of ONNX Runtime, which multiplies by blocks of 4 or 8 bits without unpacking them.

Shape legend: N rows (outputs), K columns (the reduction), B blocks of a row, S columns of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from fips.formats.packed import in_place
from fips.formats.patterns import FULL
from fips.formats.rotation import rotate
from fips.layers.linear import FactoredLinear

__all__ = ["BlockedLinear", "block_bits"]

_BLOCKS = (256, 128, 64, 32, 16)
"""Columns under one scale that ONNX Runtime knows."""
_EXACT, _ROUNDED = 1, 4
"""Its ``accuracy_level``: inputs in float32, or rounded to 8 bits block by block."""


def block_bits(layer: FactoredLinear, *, rounded: bool) -> int | None:
    """Bits of the blocks that hold the numbers of a layer as they are, 4 or 8; None where it had better be decoded.

    All entries are kept and on a grid of integers, levels among them, without a shared basis. ONNX Runtime multiplies
    by 8 bits quickly only where inputs may be ``rounded``: with exact ones it takes tens of times as long as a dense
    layer does.
    """
    numbers = layer.value_format
    if layer.fmt != FULL or not numbers.scaled or layer.basis is not None:
        return None
    if numbers.scale_group is not None and numbers.scale_group not in _BLOCKS:
        return None
    if numbers.plain and (numbers.bits or 8) <= 4:
        return 4
    return 8 if rounded else None


def _block_of(columns: int, group: int | None) -> int:
    """Columns of a block: those of a group of the layer, else the most that fill rows with the least left over."""
    return group or min(_BLOCKS, key=lambda block: (-columns % block, -block))


class BlockedLinear(nn.Module):
    r"""A packed layer as integers :math:`q` in blocks: :math:`y_n = \sum_k s_{n, k / S} (q_{nk} - 2^{b-1}) x_k`.

    ``blocks`` is (N, B, S b / 8), uint8, two numbers of 4 bits in a byte, the first in the lower half; ``steps`` (N, B)
    in float32. Blocks are symmetric: the zero is that of the operator. Columns beyond the last are zeros. Where columns
    are turned the inputs are turned alike.
    """

    blocks: Tensor
    steps: Tensor

    def __init__(self, layer: FactoredLinear, bits: int, *, rounded: bool) -> None:
        super().__init__()
        numbers, columns = layer.value_format, layer.in_features
        block = _block_of(columns, numbers.scale_group)
        self._rotation, self._shape, self.bias = layer.rotation, (layer.out_features, columns), layer.bias
        self._attributes = {
            "K": columns, "N": layer.out_features, "bits": bits, "block_size": block,
            "accuracy_level": _ROUNDED if rounded else _EXACT,
        }  # fmt: skip
        integers_NK = numbers.decode(in_place(layer.packed())).to(torch.int16)
        codes_NBS = pad(integers_NK, (0, -columns % block)).add_(1 << (bits - 1)).to(torch.uint8)
        codes_NBS = codes_NBS.view(len(codes_NBS), -1, block)
        packed = codes_NBS if bits == 8 else codes_NBS[..., ::2] | codes_NBS[..., 1::2] << 4
        groups = layer.group_scales if numbers.scale_group else None
        steps = numbers.steps(layer.scales.detach().double(), groups, columns)
        steps = steps.expand(-1, packed.shape[1]) if steps.shape[1] == 1 else steps[:, ::block]
        self.register_buffer("blocks", packed.contiguous())
        self.register_buffer("steps", steps.float().contiguous())
        self.weight = torch.empty(0)

    @property
    def rounds(self) -> bool:
        """Whether ONNX Runtime may round inputs to 8 bits."""
        return self._attributes["accuracy_level"] == _ROUNDED

    def matrix(self) -> Tensor:
        """What the inputs, turned, are multiplied by: (N, K) in float32."""
        bits = self._attributes["bits"]
        codes = self.blocks if bits == 8 else torch.stack([self.blocks & 15, self.blocks >> 4], 3).flatten(2)
        numbers_NBS = codes.float() - (1 << (bits - 1))
        return (numbers_NBS * self.steps.unsqueeze(2)).flatten(1)[:, : self._shape[1]]

    def forward(self, x: Tensor) -> Tensor:
        x = rotate(x, self._rotation)
        if not torch.compiler.is_exporting():
            return linear(x, self.matrix(), self.bias)
        y = _operator(x, self.blocks, self.steps, self._attributes, (*x.shape[:-1], self._shape[0]))
        return y if self.bias is None else y + self.bias


def _operator(x: Tensor, blocks: Tensor, steps: Tensor, attributes: dict[str, Any], shape: Sequence[Any]) -> Tensor:
    found: Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits", (x, blocks, steps), attrs=attributes, dtype=torch.float32, shape=shape, version=1
    )
    return found
