"""The plain torch product with a packed matrix: what every other kernel must agree with.

Shape legend: T tokens, N stored rows (outputs), K stored columns (the reduction), Z kept entries.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

from fips.storage.packing import DENSE, BlockAxis, dequantize_rows, unpack, unpack_integers, unpack_mask

__all__ = ["Packed", "in_place", "multiply", "multiply_backward", "to_dense"]


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed matrix S of shape (N, K) in one of the formats of ``fips.storage.packing``."""

    values_Z: Tensor
    pattern: Tensor
    """Packed pattern; empty for format dense."""
    scales_N: Tensor | None
    """Per row, beside integer values."""
    shape: tuple[int, int]
    fmt: str
    block_axis: BlockAxis = 1
    bits: int = 8
    """Of integer values, see ``fips.storage.packing``."""
    count: int = 0
    """Kept entries, where the number of stored values does not say it: of integers of less than 8 bits."""

    @property
    def kept(self) -> int:
        """Kept entries."""
        return self.count or self.values_Z.numel()

    @property
    def kind(self) -> str:
        """Type of the values: ``float32``, ``int8``, ``int4``, ..."""
        return f"int{self.bits}" if self.count else str(self.values_Z.dtype).removeprefix("torch.")

    def nbytes(self) -> int:
        """Bytes of everything stored."""
        parts = (self.values_Z, self.pattern, self.scales_N)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def in_place(packed: Packed) -> Tensor:
    """The stored values in their places (N, K); integers as int8, without their scales."""
    values_Z = packed.values_Z
    if packed.count:
        values_Z = unpack_integers(values_Z, bits=packed.bits, count=packed.count)
    return unpack(values_Z, packed.pattern, shape=packed.shape, fmt=packed.fmt, block_axis=packed.block_axis)


def to_dense(packed: Packed) -> Tensor:
    """S as a dense matrix in the type of its values, or of its scales."""
    stored = in_place(packed)
    return stored if packed.scales_N is None else dequantize_rows(stored, packed.scales_N)


def multiply(x_TK: Tensor, packed: Packed, bias_N: Tensor | None = None) -> Tensor:
    r""":math:`y = x S^\top + b` in the type of ``x``; any leading dimensions."""
    bias = None if bias_N is None else bias_N.to(x_TK.dtype)
    return linear(x_TK, to_dense(packed).to(x_TK.dtype), bias)


def multiply_backward(grad_TN: Tensor, x_TK: Tensor, packed: Packed) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``multiply`` with respect to ``x`` and, for floating values, the values (in stored order).

    Forms S and one dense gradient for the time of the call, as the backward pass of a dense layer does.
    """
    grad_x = grad_TN @ to_dense(packed).to(grad_TN.dtype)
    if packed.scales_N is not None:
        return grad_x, None
    full_NK = (grad_TN.flatten(0, -2).T @ x_TK.flatten(0, -2)).to(packed.values_Z.dtype)
    return grad_x, _gather(full_NK, packed)


def _gather(matrix_NK: Tensor, packed: Packed) -> Tensor:
    """Entries of a dense matrix on the support, in stored order."""
    if packed.fmt == DENSE:
        return matrix_NK.flatten()
    mask = unpack_mask(packed.pattern, shape=packed.shape, fmt=packed.fmt, block_axis=packed.block_axis)
    if packed.fmt.startswith("block") and packed.block_axis == 0:
        size = int(packed.fmt.removeprefix("block"))
        rows, cols = packed.shape
        turned = matrix_NK.view(rows // size, size, cols).transpose(1, 2)
        return turned[mask.view(rows // size, size, cols).transpose(1, 2)]
    return matrix_NK[mask]
