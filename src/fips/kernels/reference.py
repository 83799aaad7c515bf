"""The plain torch product with a packed matrix: what every other kernel must agree with.

Shape legend: T tokens, N stored rows (outputs), K stored columns (the reduction), Z kept entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from fips.errors import BackendError, ShapeError
from fips.formats.packing import (
    BLOCKS,
    DENSE,
    BlockAxis,
    dequantize_rows,
    packed_length,
    parse_nm,
    pattern_bytes,
    unpack,
    unpack_integers,
    unpack_mask,
)

__all__ = ["Packed", "check_inputs", "check_packed", "in_place", "multiply", "multiply_backward", "to_dense"]


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed matrix S of shape (N, K) in one of the formats of ``fips.formats.packing``."""

    values_Z: Tensor
    pattern: Tensor
    """Packed pattern; empty for format dense."""
    scales_N: Tensor | None
    """Per row, beside integer values."""
    shape: tuple[int, int]
    fmt: str
    block_axis: BlockAxis = 1
    bits: int = 8
    """Of integer values, see ``fips.formats.packing``."""
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


def check_inputs(x: Tensor, features: int, bias: Tensor | None = None, outputs: int = 0) -> None:
    """Raise ``ShapeError`` unless ``x`` is (..., features) of a floating type and the bias, if any, (outputs,)."""
    if x.dim() == 0 or x.shape[-1] != features:
        raise ShapeError(f"inputs of shape {tuple(x.shape)} do not fit {features} features: want (..., {features})")
    if not x.is_floating_point():
        raise ShapeError(f"a compressed layer multiplies floating-point inputs, got {x.dtype}")
    if bias is not None and bias.shape != (outputs,):
        raise ShapeError(f"a bias of shape {tuple(bias.shape)} does not fit {outputs} outputs: want ({outputs},)")


def check_packed(packed: Packed) -> None:
    """Raise ``BackendError`` unless the stored tensors are as long as the shape and the format say; reads none."""
    rows, cols = packed.shape
    nm, block = parse_nm(packed.fmt), BLOCKS.get(packed.fmt, 1)
    if rows < 0 or cols < 1 or packed.shape[packed.block_axis] % block or (rows * cols) % (nm[1] if nm else 1):
        raise BackendError(f"a matrix of shape {packed.shape} cannot be packed as {packed.fmt}")
    count, size = packed.kept, rows * cols
    most = size if nm is None else size // nm[1] * nm[0]
    if count > most or (count < most and (packed.fmt == DENSE or nm is not None)) or count % block:
        raise BackendError(f"{packed.fmt} of shape {packed.shape} cannot hold {count} values")
    if packed.count and not 2 <= packed.bits <= 7:
        raise BackendError(f"integers of {packed.bits} bits are not packed; known: 2 to 7")
    scales = None if packed.scales_N is None else rows
    for name, tensor, wanted in (
        ("values", packed.values_Z, packed_length(count, packed.bits) if packed.count else count),
        ("pattern", packed.pattern, pattern_bytes(size=size, fmt=packed.fmt)),
        ("scales", packed.scales_N, scales),
    ):
        if tensor is not None and (tensor.numel() != wanted or not tensor.is_contiguous()):
            raise BackendError(
                f"{name} of a matrix of shape {packed.shape} in format {packed.fmt}: want {wanted} numbers side by "
                f"side, got {tuple(tensor.shape)}; load the checkpoint again"
            )
    bytes_ = [packed.pattern] * (packed.pattern.numel() > 0) + [packed.values_Z] * (packed.count > 0)
    if any(tensor.dtype != torch.uint8 for tensor in bytes_):
        raise BackendError(f"patterns and packed integers are bytes (uint8), got {packed.pattern.dtype}, {packed.kind}")


def in_place(packed: Packed) -> Tensor:
    """The stored values in their places (N, K); integers as int8, without their scales."""
    values_Z = packed.values_Z
    if packed.count:
        values_Z = unpack_integers(values_Z, bits=packed.bits, count=packed.count)
    return unpack(values_Z, packed.pattern, shape=packed.shape, fmt=packed.fmt, block_axis=packed.block_axis)


def to_dense(packed: Packed) -> Tensor:
    """S as a dense matrix: in the type of its values, or of integers in float32 (float64 beside such scales)."""
    stored = in_place(packed)
    return stored if packed.scales_N is None else dequantize_rows(stored, packed.scales_N)


def multiply(x_TK: Tensor, packed: Packed, bias_N: Tensor | None = None) -> Tensor:
    r""":math:`y = x S^\top + b` in the type of ``x``; any leading dimensions.

    Entries of S are rounded to the type of ``x``. Raises ``ShapeError`` for inputs or a bias of another size.
    """
    check_inputs(x_TK, packed.shape[1], bias_N, packed.shape[0])
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
