"""The packed product as a torch operator: gradients, ``torch.compile``, all backends behind one name."""

from __future__ import annotations

from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fips.formats.packed import Packed
from fips.formats.patterns import BlockAxis
from fips.kernels import reference, registry
from fips.kernels.backend import Backend, PreparedMatrix
from fips.kernels.validity import is_plain, needs_grad

__all__ = ["Keeper", "is_plain", "needs_grad", "number_of", "packed_linear", "traceable"]

_numbers = count(1)


class Keeper(Protocol):
    """Whoever keeps what a backend has prepared for one matrix, and makes it anew where the matrix has changed."""

    def prepared(self, packed: Packed, backend: Backend) -> PreparedMatrix: ...


_keepers: WeakValueDictionary[int, Keeper] = WeakValueDictionary()


def number_of(keeper: Keeper) -> Tensor:
    """A number by which the operator finds a keeper. As a tensor: another number would make a graph of its own."""
    number = next(_numbers)
    _keepers[number] = keeper
    return torch.tensor(number, device="cpu")


def packed_linear(
    x: Tensor, packed: Packed, bias: Tensor | None, *, activation_bits: int | None = None, keeper: Tensor | None = None
) -> Tensor:
    """``x S^T + bias`` by the first backend that takes it, differentiable in ``x``, floating values and bias.

    ``keeper`` is the ``number_of`` whoever keeps what the backend prepares; without one it is prepared in every call.
    """
    y: Tensor = torch.ops.fips.packed_linear(
        x, packed.values_Z, packed.pattern, packed.scales_N, bias, list(packed.shape), packed.fmt, packed.block_axis,
        packed.value_format, packed.count, packed.rotation, packed.group_scales, activation_bits, keeper,
    )  # fmt: skip
    return y


def traceable(x: Tensor, packed: Packed) -> bool:
    """Whether the operator may stand in a traced graph: not in exported ones, which must run without fips."""
    if not torch.compiler.is_compiling() or torch.compiler._is_exporting_flag:  # `is_exporting()` is True in any trace
        return False  # of torch 2.11 and before
    return registry.choose(packed, x.device, x.dtype) is not registry.REFERENCE


@torch.library.custom_op("fips::packed_linear", mutates_args=())
def _packed_linear(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    shape: list[int],
    fmt: str,
    block_axis: int,
    value_format: str,
    count: int,
    rotation: int,
    group_scales: Tensor | None,
    activation_bits: int | None,
    keeper: Tensor | None,
) -> Tensor:
    layout = (shape, fmt, block_axis, value_format, count, rotation)
    packed = _packed(values, pattern, scales, *layout, group_scales=group_scales)
    backend = registry.choose(packed, x.device, x.dtype)
    # in a graph from another process the number may be that of some other layer, which looks whether it is its own
    kept = None if keeper is None else _keepers.get(int(keeper))
    prepared = backend.prepare(packed) if kept is None else kept.prepared(packed, backend)
    return backend.multiply(x, prepared, bias, activation_bits=activation_bits)


@_packed_linear.register_fake
def _(x: Tensor, values: Tensor, pattern: Tensor, scales: Any, bias: Any, shape: list[int], *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, pattern, scales, bias, *ctx.layout, group_scales, _, _ = inputs
    ctx.save_for_backward(x, values, pattern, scales, group_scales)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, pattern, scales, group_scales = ctx.saved_tensors
    packed = _packed(values, pattern, scales, *ctx.layout, group_scales=group_scales)
    grad_x, grad_values = reference.multiply_backward(grad, x, packed)
    bias = None if ctx.bias_dtype is None else grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, grad_values, None, None, bias, *[None] * 9


_packed_linear.register_autograd(_backward, setup_context=_keep_for_backward)


def _packed(
    values: Tensor,
    pattern: Tensor,
    scales: Tensor | None,
    shape: list[int],
    fmt: str,
    block_axis: int,
    value_format: str,
    count: int,
    rotation: int,
    *,
    group_scales: Tensor | None,
) -> Packed:
    rows, cols = shape
    axis: BlockAxis = 0 if block_axis == 0 else 1
    return Packed(values, pattern, scales, (rows, cols), fmt, axis, value_format, count, group_scales, rotation)
