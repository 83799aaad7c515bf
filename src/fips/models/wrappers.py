"""What may be given as a model: the wrappers that are taken off, and the models that are refused before any work."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fips.errors import ModelError
from fips.models import Site
from fips.models.gguf import as_plain

__all__ = ["check_layers", "check_model", "unwrap"]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INNER = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": None,
    "FSDPModule": None,
    "DeepSpeedEngine": None,
}
"""Wrappers by class name, and where they keep the model whose layers they run as they are; None where they do not."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``; any other as it is.

    Raises ``ModelError`` for what is no module, for wrappers that hold the weights in another form (FSDP, DeepSpeed,
    TorchScript, PEFT) and for one of several data-parallel processes.
    """
    while True:
        _check_is_module(model)
        name = next((base.__name__ for base in type(model).__mro__ if base.__name__ in _INNER), None)
        if name is None:
            return model
        inner = _INNER[name]
        if inner is None:
            raise ModelError(
                f"the model is wrapped in `{type(model).__name__}`, which keeps parts of the weights in a form of its "
                "own; give the plain model, before it is wrapped"
            )
        if name == "DistributedDataParallel" and model.process_group.size() > 1:  # type: ignore[operator]
            raise ModelError(
                "the model is one of several copies of `DistributedDataParallel`, which would come out different; "
                "compress the plain model in one process and wrap it afterwards"
            )
        model = getattr(model, inner)


def _check_is_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        hint = "load it first, with `from_pretrained`" if isinstance(model, str) else "give the `nn.Module` itself"
        inner = getattr(model, "model", None)
        if isinstance(inner, nn.Module):
            hint = f"give its `.model`, a `{type(inner).__name__}`"
        raise ModelError(f"a model must be an `nn.Module`, got `{type(model).__name__}`; {hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"the model is a `{type(model).__name__}`, whose layers cannot be replaced; give the model it was made from"
        )
    if _is_peft(model) or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"the model carries adapters of peft (`{type(model).__name__}`); merge them first, "
            "`model = peft_model.merge_and_unload()`, or leave them out, `peft_model.get_base_model()`, as those that "
            "only add tokens need"
        )


def _is_peft(module: nn.Module) -> bool:
    """By name, so that nobody pays for an import of peft; its layers around packed ones are subclasses elsewhere."""
    return any(base.__module__.partition(".")[0] == "peft" for base in type(module).__mro__)


def check_model(model: nn.Module) -> None:
    """Raise ``ModelError`` for a model that cannot be run and changed here as it is.

    Refused are models without parameters, with parts on the meta device, offloaded, spread over devices or processes,
    quantized by another library, with adapters or compiled parts inside, or made in inference mode.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        raise ModelError(f"`{type(model).__name__}` has no floating-point parameter; give a model with weights")
    for name, module in model.named_modules():
        _check_part(model, name, module)
    _check_quantized(model)
    for name, tensor in tensors:
        _check_tensor(name, tensor)
    devices = sorted({str(tensor.device) for _, tensor in tensors})
    if len(devices) > 1:
        raise ModelError(f"the model is spread over {', '.join(devices)}; move it to one device: `model.to(...)`")


def _check_part(model: nn.Module, name: str, module: nn.Module) -> None:
    hook = vars(module).get("_hf_hook")
    parts = getattr(hook, "hooks", (hook,))
    if any(getattr(part, "offload", False) or type(part).__name__ == "CpuOffload" for part in parts):
        raise ModelError(
            f"`{name or type(model).__name__}` is offloaded by accelerate; load the model on one device, "
            "without `device_map` or with `device_map={'': DEVICE}`"
        )
    if name and type(module).__name__ == "OptimizedModule":
        raise ModelError(
            f"`{name}` is wrapped by `torch.compile`, which would be saved in the names of its weights; compress the "
            "model first and compile afterwards, or use `module.compile()`, which wraps nothing"
        )
    if name and type(module).__name__ in ("CheckpointWrapper", "FullyShardedDataParallel"):
        raise ModelError(
            f"`{name}` is wrapped in a `{type(module).__name__}`, which hides the block that it is; compress the model "
            "first and wrap it afterwards, or use `model.gradient_checkpointing_enable()`, which wraps nothing"
        )
    if name and _is_peft(module):
        raise ModelError(
            f"`{name}` carries adapters of peft; merge them first: `model = peft_model.merge_and_unload()`"
        )


def _check_quantized(model: nn.Module) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    name = str(getattr(method, "value", method) or "unknown")
    if name == "gguf" and all(parameter.is_floating_point() for parameter in model.parameters()):
        as_plain(model)  # transformers made floating numbers of the file; layers it left packed are refused
        return
    if (getattr(model, "is_quantized", False) or quantizer is not None) and name != "fips":
        raise ModelError(f"the model is already quantized by another method ({name}); give the original model")


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ModelError(
            f"`{name}` is on the meta device: it has no values, or they were offloaded; load the whole model on one "
            "device"
        )
    if type(tensor).__name__ == "DTensor":
        raise ModelError(f"`{name}` is spread over processes (DTensor); give the plain model, in one process")
    if tensor.is_inference():
        raise ModelError(
            f"`{name}` was made under `torch.inference_mode()`, which allows no gradients; build or load the model "
            "outside of it"
        )


def check_layers(model: nn.Module, sites: Iterable[Site]) -> None:
    """Raise ``ModelError`` for a layer that another one cannot stand in for.

    These are layers whose weight has no plain floating-point type, or whose parent reads the weight by itself.
    """
    for site in sites:
        layer = model.get_submodule(site.name)
        weight = layer.weight
        if type(weight) is not nn.Parameter or weight.dtype not in _FLOATS:
            raise ModelError(
                f"the weight of `{site.name}` is a `{type(weight).__name__}` of {weight.dtype}; wanted a plain "
                "parameter of a floating type of 16 to 64 bits: give the original model"
            )
        parent = model.get_submodule(site.name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer):
            raise ModelError(
                f"`{site.name}` belongs to an `nn.TransformerEncoderLayer`, which reads its weight past the layer; "
                "leave it out with `ignore`"
            )
