"""NaN and infinity: found before the work that they would spoil, named by tensor or module, and kept out of files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from fips.errors import DataError, FipsError, ModelError
from fips.layers.linear import FactoredLinear, SharedBasis
from fips.plan.footprint import named_state
from fips.plan.plan import CompressionPlan

__all__ = [
    "count_bad",
    "overflow_error",
    "require_finite_layers",
    "require_finite_state",
    "require_finite_weights",
    "require_storable",
]


def count_bad(tensor: Tensor) -> int:
    """How many entries are NaN or infinite; 0 for integers and for tensors without data (the meta device)."""
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    if tensor.element_size() == 1:  # 8-bit floats know few operations
        tensor = tensor.float()
    if not tensor.is_complex() and bool(tensor.sum(dtype=torch.float64).isfinite()):
        return 0  # a sum in float64 is finite only if everything in it is
    return int((~tensor.isfinite()).sum())


def require_finite_weights(model: nn.Module) -> None:
    """Raise ``ModelError`` with the first weight that holds NaN or infinity, and how many there are."""
    _require(_bad_tensors(model.named_parameters()), "compressed", "load the checkpoint again or repair it")


def require_finite_state(model: nn.Module) -> None:
    """Raise ``ModelError`` if a tensor that would be written holds NaN, or a weight or packed number infinity.

    Buffers outside compressed layers may be infinite: masks are.
    """
    packed = {
        f"{name}.{key}" for name, module in model.named_modules() if isinstance(module, FactoredLinear)
        for key in module.state_dict(keep_vars=True)
    }  # fmt: skip
    weights = {name for name, _ in model.named_parameters()}
    state = named_state(model)
    strict = ((name, tensor) for name, tensor in state.items() if name in weights | packed)
    masks = ((name, tensor) for name, tensor in state.items() if name not in weights | packed)
    bad = [*_bad_tensors(strict)]
    bad += [(name, tensor, count) for name, tensor, count in _bad_tensors(masks) if bool(tensor.isnan().any())]
    _require(iter(bad), "saved", "compress the original again, or repair the tensor")


def _bad_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor, int]]:
    for name, tensor in tensors:
        count = count_bad(tensor.detach())
        if count:
            yield name, tensor, count


def _require(bad: Iterator[tuple[str, Tensor, int]], verb: str, next_step: str) -> None:
    found = list(bad)
    if found:
        name, tensor, count = found[0]
        others = f" and {len(found) - 1} more tensors like it" if len(found) > 1 else ""
        raise ModelError(
            f"`{name}` ({str(tensor.dtype).removeprefix('torch.')}) holds {count} of {tensor.numel()} entries that are "
            f"NaN or infinite{others}; such a model cannot be {verb}: {next_step}"
        )


def require_storable(model: nn.Module, plan: CompressionPlan) -> None:
    """Raise ``ModelError`` if a weight is larger than the type it is to be stored in can hold."""
    for group in plan.groups:
        limit = torch.finfo(group.dtype).max
        for site in group.group.sites:
            weight = model.get_submodule(site.name).weight
            assert isinstance(weight, Tensor)
            if weight.is_meta or not weight.numel() or torch.finfo(weight.dtype).max <= limit:
                continue
            largest = float(weight.detach().abs().max())
            if largest > limit:
                short = str(group.dtype).removeprefix("torch.")
                raise ModelError(
                    f"`{site.name}` holds {largest:.3g}, but {short} ends at {limit:.6g}; set `factor_dtype` to "
                    "bfloat16 or float32"
                )


def require_finite_layers(
    layers: Mapping[str, FactoredLinear], bases: Mapping[str, SharedBasis], *, method: str
) -> None:
    """Raise ``ModelError`` with the layer and the method if a compressed layer holds NaN or infinity."""
    owned = {id(basis): name for name, basis in bases.items()}
    for name, layer in layers.items():
        tensors = dict(layer.state_dict(keep_vars=True))
        if layer.basis is not None:
            tensors[f"basis {owned.get(id(layer.basis), '')}".strip()] = layer.basis.weight
        for part, tensor in tensors.items():
            count = count_bad(tensor.detach())
            if count:
                raise ModelError(
                    f"`method: {method}` made {count} of {tensor.numel()} entries of `{name}` ({part}) NaN or "
                    "infinite; the model is as it was. Leave the layer out with `ignore`, store in a wider "
                    "`factor_dtype`, or calibrate on more data"
                )


class _Found(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass at the first number that is not finite."""


def overflow_error(model: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any], *, where: str) -> FipsError:
    """The error for a batch that gave numbers that are not finite: where they begin, and what to do.

    One more forward pass, watched module by module. ``where`` is what is known without it.
    """
    given = batch.items() if isinstance(batch, Mapping) else [("the batch", batch)]
    for name, value in given:
        if isinstance(value, Tensor) and count_bad(value) and bool(value.isnan().any()):
            return DataError(f"`{name}` of a calibration batch holds {count_bad(value)} NaN or infinite entries")
    return ModelError(f"{_first_bad(model, batch, run) or where} on the calibration data; {_advice(model)}")


def _advice(model: nn.Module) -> str:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype == torch.float16:
        return "float16 ends at 65504: load the model in bfloat16 or float32, or leave the layer out with `ignore`"
    short = str(dtype).removeprefix("torch.")
    return f"the model is in {short}, so its range is no reason: look for huge weights there and odd calibration data"


def _first_bad(model: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any]) -> str | None:
    """What the first module to read or return a NaN, or +infinity, does in a forward pass."""
    found: list[str] = []

    def check(value: Any, words: str) -> None:
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not count_bad(tensor.detach()):
                continue
            if bool((tensor.isnan() | (tensor == torch.inf)).any()):  # -infinity hides tokens in masks
                found.append(words)
                raise _Found

    with ExitStack() as stack, torch.no_grad(), suppress(_Found):
        for name, module in model.named_modules():
            if any(True for _ in module.children()):
                continue
            kind = type(module).__name__
            reads, returns = (
                f"what reaches `{name}` ({kind}) is not finite",
                f"what `{name}` ({kind}) returns is not finite",
            )
            handles = (
                module.register_forward_pre_hook(lambda _, args, words=reads: check(args, words)),
                module.register_forward_hook(lambda _, __, output, words=returns: check(output, words)),
            )
            for handle in handles:
                stack.callback(handle.remove)
        run(model, batch)
    return found[0] if found else None
