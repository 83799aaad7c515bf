"""Back to plain dense layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fips.errors import ModelError
from fips.fixed import ignore_training
from fips.nn import BASES, FactoredLinear, basis_owner, factored_layers

__all__ = ["dense_layer", "drop_unused_bases", "merge"]


@torch.no_grad()
def merge(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every factored layer by a dense one with weight B F, in place; returns the model.

    The result needs nothing from fips and computes the same function up to rounding. Products are formed in float32
    and stored in ``dtype``, by default the type of the model's other weights. Raises ``ModelError`` if the model has
    no factored layer.
    """
    layers = factored_layers(model)
    if not layers:
        raise ModelError("the model has no factored layer to merge; it is already dense")
    dtype = dtype or _other_dtype(model, layers)
    for name, layer in layers.items():
        model.set_submodule(name, dense_layer(layer, dtype))
    drop_unused_bases(model)
    return model


def drop_unused_bases(model: nn.Module) -> None:
    """Remove bases that no layer borrows; a model without any factored layer becomes a plain one again."""
    layers = factored_layers(model).values()
    owner = basis_owner(model)
    used = {id(layer.basis) for layer in layers}
    for name, basis in list(getattr(owner, BASES, nn.ModuleDict()).items()):
        if id(basis) not in used:
            del getattr(owner, BASES)[name]
    if not layers:
        delattr(owner, BASES)
        ignore_training(model)
        _forget_packing(model)


def _forget_packing(model: nn.Module) -> None:
    """Undo what ``fips.integrations.quantizer.attach`` set on a transformers model."""
    config = getattr(model, "config", None)
    for name in ("quantization_config", "auto_map"):
        if config is not None and name in vars(config):
            delattr(config, name)
    attributes = vars(model)
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "save_pretrained", "_upload_modified_files"):
        attributes.pop(name, None)
    if "_fips_conversions" in attributes:
        conversions = attributes.pop("_fips_conversions")
        attributes.pop("_weight_conversions", None)
        if conversions is not None:
            attributes["_weight_conversions"] = conversions


def _other_dtype(model: nn.Module, layers: Mapping[str, FactoredLinear]) -> torch.dtype:
    owned = [layer.basis.weight for layer in layers.values() if layer.basis is not None]
    factored = {id(p) for p in (*owned, *(layer.values for layer in layers.values()))}
    others = (p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in factored)
    return next(others, torch.get_default_dtype())


def dense_layer(
    layer: FactoredLinear, dtype: torch.dtype, *, weight: Tensor | None = None, bias: nn.Parameter | None = None
) -> nn.Module:
    """The plain layer in whose place ``layer`` stands, with weight B F or another (out, in) weight and bias."""
    weight = (layer.dense_weight() if weight is None else weight).detach().to(dtype)
    bias = layer.bias if bias is None else bias
    dense: nn.Module
    with torch.device("meta"):
        if layer.conv1d:
            dense = Conv1D(layer.out_features, layer.in_features)
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None)
    dense.weight = nn.Parameter(weight.T.contiguous() if layer.conv1d else weight)
    dense.register_parameter("bias", bias)
    return dense.train(layer.training)
