"""Back to plain dense layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fips.errors import ModelError
from fips.layers.blocks import forget_blocks
from fips.layers.dense import forget_dense
from fips.layers.embedding import PackedEmbedding, TiedLayer, tied_layers
from fips.layers.fixed import ignore_training
from fips.layers.linear import BASES, FactoredLinear, basis_owner, factored_layers, homes_of, replace_everywhere
from fips.layers.norms import forget_norms
from fips.models.experts import fuse_experts

__all__ = ["dense_layer", "drop_unused_bases", "merge"]


@torch.no_grad()
@torch.inference_mode(False)
@torch.no_grad()
def merge(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every factored layer by a dense one with weight B C, in place; returns the model.

    The result needs nothing from fips and computes the same function up to rounding. Products are formed in float32
    (float64 where values or scales are that) and rounded once, to ``dtype``, by default the type of the model's other
    weights. Raises ``ModelError`` if the model has
    no factored layer.
    """
    layers = factored_layers(model)
    if not layers:
        raise ModelError("the model has no factored layer to merge; it is already dense")
    dtype = dtype or _other_dtype(model, layers)
    tied, homes = tied_layers(model), homes_of(model)
    for name, layer in layers.items():
        if isinstance(layer, PackedEmbedding):
            weight_VD = nn.Parameter(layer.dense_weight().detach().to(dtype))
            replace_everywhere(model, name, layer.lookup.dense(weight_VD).train(layer.training), homes)
            for place, other in tied.items():
                if other.embedding is layer:
                    replace_everywhere(model, place, other.dense(weight_VD), homes)
        else:
            replace_everywhere(model, name, dense_layer(layer, dtype), homes)
    fuse_experts(model)
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
        forget_dense(model)
        forget_norms(model)
        forget_blocks(model)
        _forget_packing(model)


def _forget_packing(model: nn.Module) -> None:
    """Undo what ``fips.storage.quantizer.attach`` set on a transformers model."""
    config = getattr(model, "config", None)
    if config is not None:
        vars(config).pop("quantization_config", None)
        _forget_remote_code(config)
    attributes = vars(model)
    for name in (
        "hf_quantizer", "quantization_method", "is_quantized", "save_pretrained", "_upload_modified_files",
        "resize_token_embeddings",
    ):  # fmt: skip
        attributes.pop(name, None)
    if "all_tied_weights_keys" in attributes:  # packed matrices were taken out of it
        attributes["all_tied_weights_keys"] = model.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
    if "_fips_conversions" in attributes:
        conversions = attributes.pop("_fips_conversions")
        attributes.pop("_weight_conversions", None)
        if conversions is not None:
            attributes["_weight_conversions"] = conversions


def _forget_remote_code(config: Any) -> None:
    """Remove what stands for the module that fips writes: its entry of ``auto_map``, its class of the configuration."""
    if type(config).__module__.endswith(".fips_remote"):
        config.__class__ = type(config).__mro__[1]
    entries = vars(config).pop("auto_map", None) or {}
    kept = {name: value for name, value in entries.items() if not str(value).startswith("fips_remote.")}
    if kept:
        own = type(config)
        if "AutoConfig" not in kept and not own.__module__.startswith("transformers."):
            kept["AutoConfig"] = f"{own.__module__.rpartition('.')[2]}.{own.__name__}"
        config.auto_map = kept


def _other_dtype(model: nn.Module, layers: Mapping[str, FactoredLinear]) -> torch.dtype:
    """The type of most numbers outside packed layers, which may be stored in a narrower one than the model computes in.

    If there are none, the widest that the packed layers give as the type of their weights.
    """
    bases = [layer.basis for layer in layers.values() if layer.basis is not None]
    packed = {id(p) for module in (*layers.values(), *bases) for p in module.parameters()}
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in packed:
            sizes[parameter.dtype] += parameter.numel()
    if sizes:
        return sizes.most_common(1)[0][0]
    return reduce(torch.promote_types, (layer.weight.dtype for layer in layers.values()))


def dense_layer(
    layer: FactoredLinear | TiedLayer,
    dtype: torch.dtype,
    *,
    weight: Tensor | None = None,
    bias: nn.Parameter | None = None,
) -> nn.Module:
    """The plain layer in whose place ``layer`` stands, with weight B C or another (out, in) weight and bias."""
    weight = (layer.dense_weight() if weight is None else weight).detach().to(dtype)
    bias = layer.bias if bias is None else bias
    if bias is not None and bias.dtype != dtype:  # stored in a narrower type; a dense layer wants one for both
        bias = nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
    dense: nn.Module
    with torch.device("meta"):
        if layer.conv1d:
            dense = Conv1D(layer.out_features, layer.in_features)
        else:
            kind = layer.dense_class if isinstance(layer, FactoredLinear) else nn.Linear
            dense = kind(layer.in_features, layer.out_features, bias=bias is not None)
    dense.weight = nn.Parameter(weight.T.contiguous() if layer.conv1d else weight)
    dense.register_parameter("bias", bias)
    return dense.train(layer.training)
