"""The packed product as torch operators: gradients, ``torch.compile``, all backends behind one name.

``fips::packed_linear`` has gradients. Around a small product torch takes 60 us for that, asked for or not, so graphs
without them have ``fips::packed_product``, and calls with inputs like those of one before find it (``Keeper.again``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import linear

from fips.formats.packed import Packed
from fips.formats.patterns import BlockAxis
from fips.kernels import reference, registry
from fips.kernels.backend import Backend, PreparedMatrix, RepeatedCall
from fips.kernels.defaults import packed_up_to
from fips.kernels.validity import is_plain, needs_grad, without_autocast

__all__ = [
    "Keeper", "is_plain", "meaning_of", "needs_grad", "number_of", "packed_linear", "product_in_graph", "raised_inside",
    "traceable",
]  # fmt: skip

_numbers = count(1)


class Keeper(Protocol):
    """Whoever keeps what a backend has prepared for one matrix, and makes it anew where the matrix has changed."""

    def prepared(self, packed: Packed, backend: Backend) -> PreparedMatrix: ...

    def again(self, x: Tensor, meaning: str, tensors: Sequence[Tensor | None]) -> tuple[RepeatedCall, Packed] | None:
        """A call like one before: inputs of the same shape and type beside the same tensors, where they lay."""

    def remember(
        self, x: Tensor, meaning: str, tensors: Sequence[Tensor | None], packed: Packed, call: RepeatedCall
    ) -> None:
        """Keep a call for the next inputs like ``x``."""


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
    y: Tensor
    if keeper is not None and not needs_grad(x, packed.values_Z, bias):
        meaning = meaning_of(packed, activation_bits)
        y = torch.ops.fips.packed_product(
            x, packed.values_Z, packed.pattern, packed.scales_N, packed.group_scales, bias, keeper, packed.shape[0],
            meaning,
        )  # fmt: skip
        return y
    y = torch.ops.fips.packed_linear(
        x, packed.values_Z, packed.pattern, packed.scales_N, bias, list(packed.shape), packed.fmt, packed.block_axis,
        packed.value_format, packed.count, packed.rotation, packed.group_scales, activation_bits, keeper,
    )  # fmt: skip
    return y


def meaning_of(packed: Packed, activation_bits: int | None) -> str:
    """What the tensors of a matrix mean, in a word that ``packed_product`` reads."""
    layout = (*packed.shape, packed.fmt, packed.block_axis, packed.value_format, packed.count, packed.rotation)
    return " ".join(map(str, (*layout, activation_bits)))


def product_in_graph(x: Tensor, parts: Sequence[Any], rows: int, meaning: str) -> Tensor | None:
    """The product of a layer without a basis as one node of a graph for a GPU; None where it takes another way.

    ``parts`` are those of ``FactoredLinear``. Whatever a traced layer is asked for is looked at again before every run
    of the graph, some hundreds of nanoseconds each, so it is asked for little.
    """
    values, pattern, scales, group_scales, bias, basis, offloaded = parts
    if basis is not None or scales is None or offloaded or needs_grad(x, bias) or torch.compiler._is_exporting_flag:
        return None
    y: Tensor = torch.ops.fips.packed_product(x, values, pattern, scales, group_scales, bias, None, rows, meaning)
    return y


def _product(
    backend: Backend, x: Tensor, prepared: PreparedMatrix, bias: Tensor | None, activation_bits: int | None
) -> Tensor:
    """A graph is made before the number of tokens is known: whether to decode is asked here."""
    with without_autocast(x.device):
        if backend.decodes and x.shape[:-1].numel() > packed_up_to(prepared.packed, backend):
            return linear(x, backend.decode(prepared, x.dtype), None if bias is None else bias.to(x.dtype))
        return backend.multiply(x, prepared, bias, activation_bits=activation_bits)


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
    try:
        backend = registry.choose(packed, x.device, x.dtype)
        # in a graph from another process the number may be that of some other layer, which looks whether it is its own
        kept = None if keeper is None else _keepers.get(int(keeper))
        prepared = backend.prepare(packed) if kept is None else kept.prepared(packed, backend)
        return _product(backend, x, prepared, bias, activation_bits)
    except Exception as error:
        error.__dict__[_INSIDE] = True
        raise


_INSIDE = "raised inside a fips operator"


def raised_inside(error: Exception) -> bool:
    """Whether the operator itself failed; around it autograd runs hooks of others, such as those of checkpointing."""
    return _INSIDE in error.__dict__


@_packed_linear.register_fake
def _(x: Tensor, values: Tensor, pattern: Tensor, scales: Any, bias: Any, shape: list[int], *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


_library = torch.library.Library("fips", "FRAGMENT")
_library.define(
    "packed_product(Tensor x, Tensor values, Tensor? pattern, Tensor? scales, Tensor? group_scales, Tensor? bias, "
    "Tensor? keeper, int rows, str meaning) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _packed_product(
    x: Tensor,
    values: Tensor,
    pattern: Tensor | None,
    scales: Tensor | None,
    group_scales: Tensor | None,
    bias: Tensor | None,
    keeper: Tensor | None,
    rows: int,
    meaning: str,
) -> Tensor:
    kept = None if keeper is None else _keepers.get(int(keeper))
    pattern = values.new_empty(0, dtype=torch.uint8) if pattern is None else pattern
    tensors = (values, pattern, scales, group_scales, bias)
    known = None if kept is None else kept.again(x, meaning, tensors)
    if known is not None:
        return known[0](x, known[1], bias)
    _, cols, fmt, axis, value_format, count, rotation, bits = meaning.split()
    layout = ([rows, int(cols)], fmt, int(axis), value_format, int(count), int(rotation))
    packed = _packed(values, pattern, scales, *layout, group_scales=group_scales)
    activation_bits = None if bits == "None" else int(bits)
    backend = registry.choose(packed, x.device, x.dtype)
    prepared = backend.prepare(packed) if kept is None else kept.prepared(packed, backend)
    y = _product(backend, x, prepared, bias, activation_bits)
    if kept is not None and 0 < x.numel() <= backend.repeats_up_to * x.shape[-1] and x.is_contiguous():
        call = backend.repeat(x, prepared, bias, activation_bits)
        if call is not None:
            kept.remember(x, meaning, tensors, packed, call)
    return y


for _device in ("CPU", "CUDA"):
    _library.impl("packed_product", _packed_product, _device)


@torch.library.register_fake("fips::packed_product")  # type: ignore[untyped-decorator]
def _(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], others[-2])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, pattern, scales, bias, *ctx.layout, group_scales, _, _ = inputs
    ctx.save_for_backward(x, values, pattern, scales, group_scales)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, pattern, scales, group_scales = ctx.saved_tensors
    if is_plain(grad, x, values):  # differentiable once more
        packed = _packed(values, pattern, scales, *ctx.layout, group_scales=group_scales)
        grad_x, grad_values = reference.multiply_backward(grad, x, packed)
    else:  # a graph has no business in how a matrix is decoded
        grad_x, grad_values = torch.ops.fips.packed_linear_backward(
            grad, x, values, pattern, scales, *ctx.layout, group_scales
        )
        grad_values = grad_values if values.is_floating_point() else None
    bias = None if ctx.bias_dtype is None else grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, grad_values, None, None, bias, *[None] * 9


@torch.library.custom_op("fips::packed_linear_backward", mutates_args=())
def _packed_linear_backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    scales: Tensor | None,
    shape: list[int],
    fmt: str,
    block_axis: int,
    value_format: str,
    count: int,
    rotation: int,
    group_scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    layout = (shape, fmt, block_axis, value_format, count, rotation)
    packed = _packed(values, pattern, scales, *layout, group_scales=group_scales)
    grad_x, grad_values = reference.multiply_backward(grad, x, packed)
    return grad_x, values.new_empty(0) if grad_values is None else grad_values


@_packed_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return grad.new_empty(x.shape), values.new_empty(values.shape if values.is_floating_point() else 0)


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
