"""MODEL on the command line: transformers or timm, a directory, hub id or GGUF file, with or without its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fips.config import DataConfig
from fips.data import Batches, load_batches
from fips.errors import CheckpointError
from fips.models.devices import usable_device
from fips.models.gguf import is_gguf_source
from fips.models.reading import kind_of, longest_sequence, processor_of
from fips.models.tasks import task_of
from fips.models.timm import build_timm, is_timm_source, load_timm
from fips.models.transformers import (
    already_compressed,
    build_empty,
    config_fields,
    load_config,
    load_dense,
    resolve_dtype,
)
from fips.storage.checkpoint import is_compressed, load
from fips.storage.layout import QUANT_METHOD
from fips.storage.weights import StoredWeights

__all__ = ["Source", "empty_model", "is_compressed_source", "pick_device"]


@dataclass(frozen=True, slots=True)
class Source:
    """A model by its name, and how it is to be read: the type of its weights, the device, whether its own code runs."""

    name: str
    dtype: str = "auto"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    trust_remote_code: bool = False

    @classmethod
    def named(cls, name: str, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False) -> Source:
        """Raises ``ConfigError`` for a type or device that does not exist."""
        return cls(name, resolve_dtype(dtype), pick_device(device), trust_remote_code)

    def empty(self, *, compressed: bool = True) -> nn.Module:
        """The original architecture on the meta device; ``compressed=False`` refuses a compressed model."""
        return empty_model(self.name, compressed=compressed, trust_remote_code=self.trust_remote_code)

    def dense(self) -> nn.Module:
        """A dense model with its weights, in evaluation mode."""
        if is_timm_source(self.name):
            return load_timm(self.name, dtype=self.dtype, device=self.device)
        found: nn.Module = load_dense(
            self.name, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code
        )
        return found

    def mapped_bytes(self, model: nn.Module) -> int:
        """Bytes of the weights of ``dense()`` that stay in their files: memory holds as many as there is room for.

        ``model`` is it on the meta device. On a CPU those are the tensors that are in safetensors files as the model
        has them, in type and shape. Where the files are not here, that is taken to be so for all of the type that the
        configuration names, but for tensors with more than two dimensions, such as experts, which are put together.
        """
        if self.device.type != "cpu" or is_timm_source(self.name) or is_gguf_source(self.name):
            return 0
        files = sorted(Path(self.name).glob("*.safetensors"))
        parameters = dict(model.named_parameters())
        if files:
            try:
                stored = StoredWeights.of(files).tensors
            except CheckpointError:
                return 0
            prefix = f"{getattr(model, 'base_model_prefix', '')}."
            found = {name: stored.get(name, stored.get(name.removeprefix(prefix))) for name in parameters}
            same = [
                parameter
                for name, parameter in parameters.items()
                if (one := found[name]) and (one.dtype, one.shape) == (parameter.dtype, tuple(parameter.shape))
            ]
        elif any(Path(self.name).glob("*.bin")):
            return 0
        else:
            named = getattr(getattr(model, "config", None), "dtype", None)
            same = [one for one in parameters.values() if one.ndim <= 2 and one.dtype == named]
        return sum(parameter.nbytes for parameter in same)

    def model(self) -> nn.Module:
        """A compressed model, whose types are its own, or a dense one."""
        if not is_compressed_source(self.name):
            return self.dense()
        found: nn.Module = load(self.name, device=self.device, trust_remote_code=self.trust_remote_code)
        return found

    def batches(self, data: DataConfig, model: nn.Module, *, purpose: Any) -> tuple[Batches, Any]:
        """Examples for ``model``, which may be empty, and the tokenizer or image processor that made them."""
        processor = processor_of(self.name, model, trust_remote_code=self.trust_remote_code)
        batches = load_batches(
            data, processor=processor, kind=kind_of(model), purpose=purpose, context_length=longest_sequence(model),
            task=task_of(model),
        )  # fmt: skip
        return batches, processor


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one; raises ``ConfigError`` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(name)


def empty_model(source: str, *, compressed: bool = True, trust_remote_code: bool = False) -> nn.Module:
    """The original architecture of a source, on the meta device; ``compressed=False`` refuses a compressed one."""
    if is_timm_source(source):
        return build_timm(source)
    if not compressed and config_fields(source).get("quantization_config") is not None:
        raise already_compressed(source)
    config, trusted = load_config(source, trust_remote_code=trust_remote_code)
    model: nn.Module = build_empty(config, source=source, trusted=trusted)
    return model


def is_compressed_source(source: str) -> bool:
    """Whether a directory or hub id holds a model that fips packed."""
    if Path(source).exists() or is_timm_source(source):
        return is_compressed(source)
    quantization = config_fields(source).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD
