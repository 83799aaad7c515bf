"""The plain torch product with a packed matrix: what every other kernel must agree with.

Shape legend: T tokens, N stored rows (outputs), K stored columns (the reduction), Z kept entries.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import linear

from fips.errors import ShapeError
from fips.formats.packed import Packed, dense_slices, to_dense
from fips.kernels.validity import is_plain, needs_grad, without_autocast

__all__ = ["check_inputs", "decode", "multiply", "multiply_backward", "multiply_slices", "slices_suit"]


def check_inputs(x: Tensor, features: int, bias: Tensor | None = None, outputs: int = 0) -> None:
    """Raise ``ShapeError`` unless ``x`` is (..., features) of a floating type and the bias, if any, (outputs,)."""
    if x.dim() == 0 or x.shape[-1] != features:
        raise ShapeError(f"inputs of shape {tuple(x.shape)} do not fit {features} features: want (..., {features})")
    if not x.is_floating_point():
        raise ShapeError(f"a compressed layer multiplies floating-point inputs, got {x.dtype}")
    if bias is not None and bias.shape != (outputs,):
        raise ShapeError(f"a bias of shape {tuple(bias.shape)} does not fit {outputs} outputs: want ({outputs},)")


def multiply(x_TK: Tensor, packed: Packed, bias_N: Tensor | None = None) -> Tensor:
    r""":math:`y = x S^\top + b` in the type of ``x``, under autocast too; any leading dimensions.

    Entries of S are rounded to the type of ``x``. Without gradients S is never there as a whole: some rows are decoded
    and multiplied, then the next. Raises ``ShapeError`` for inputs or a bias of another size.
    """
    check_inputs(x_TK, packed.shape[1], bias_N, packed.shape[0])
    with without_autocast(x_TK.device):
        if slices_suit(packed, x_TK, bias_N):
            return multiply_slices(x_TK, dense_slices(packed), packed.shape[0], bias_N)
        bias = None if bias_N is None else bias_N.to(x_TK.dtype)
        return linear(x_TK, to_dense(packed).to(x_TK.dtype), bias)


def slices_suit(packed: Packed, *tensors: Tensor | None) -> bool:
    """Whether rows may be decoded apart: nothing is recorded, by autograd or by a tracer."""
    values = packed.values_Z
    return not (
        torch.compiler.is_compiling()
        or needs_grad(values, *tensors)
        or not is_plain(values, *(tensor for tensor in tensors if tensor is not None))
    )


def multiply_slices(x: Tensor, slices: Iterable[tuple[slice, Tensor]], rows: int, bias_N: Tensor | None) -> Tensor:
    """``x W^T + bias`` of a matrix that comes some rows at a time."""
    y = x.new_empty(*x.shape[:-1], rows)
    bias = None if bias_N is None else bias_N.to(x.dtype)
    for part, weight in slices:
        y[..., part] = linear(x, weight.to(x.dtype), None if bias is None else bias[part])
    return y


def decode(packed: Packed, dtype: torch.dtype) -> Tensor:
    """S as a dense matrix in a type; without gradients nothing of its size is there beside it."""
    if not slices_suit(packed):
        return to_dense(packed).to(dtype)
    dense = torch.empty(packed.shape, dtype=dtype, device=packed.values_Z.device)
    for part, rows in dense_slices(packed):
        dense[part] = rows
    return dense


def multiply_backward(grad_TN: Tensor, x_TK: Tensor, packed: Packed) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``multiply`` with respect to ``x`` and, for floating values, the values (in stored order).

    Forms S and one dense gradient for the time of the call, as the backward pass of a dense layer does.
    """
    with without_autocast(grad_TN.device):
        grad_x = grad_TN @ decode(packed, grad_TN.dtype)
        if packed.scales_N is not None:
            return grad_x, None
        full_NK = (grad_TN.flatten(0, -2).T @ x_TK.flatten(0, -2)).to(packed.values_Z.dtype)
        return grad_x, packed.layout.gather(full_NK, packed.pattern, packed.block_axis)
