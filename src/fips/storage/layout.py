"""The ``quantization_config`` of a compressed model: everything needed to build its modules without weights."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from fips.errors import CheckpointError
from fips.nn import BASES, FactoredLinear, SharedBasis, basis_owner, factored_layers, replace_everywhere
from fips.storage.packing import ValueKind, block_size, parse_nm

__all__ = ["QUANT_METHOD", "Layout", "check_patterns", "describe_layout", "install_layout", "replace_linear"]

QUANT_METHOD = "fips"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BasisLayout(_Strict):
    width: int = Field(ge=1)
    rank: int = Field(ge=1)


class LayerLayout(_Strict):
    """One factored layer. Fields with a default are written only where they differ from it."""

    basis: str | None = None
    """Name of its basis; None is the identity."""
    width: int | None = Field(default=None, ge=1)
    """Features on the side of the residual stream, given where no basis says it."""
    role: Literal["up", "down"]
    columns: int = Field(ge=1)
    nonzeros: int = Field(ge=0)
    format: str
    values: ValueKind = "float"
    activation_bits: Literal[8] | None = None
    """8 where kernels may round the inputs, see ``fips.kernels.runtime``."""
    bias: bool
    conv1d: bool

    @field_validator("format")
    @classmethod
    def _known(cls, value: str) -> str:
        parse_nm(value)
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.basis is None) != (self.width is not None):
            raise ValueError("wants either `basis` or `width`")
        if self.columns % block_size(self.format):
            raise ValueError(f"`columns` {self.columns} does not fill the blocks of {self.format}")
        return self


class Layout(_Strict):
    """Bases and factored layers by name, format version 1."""

    quant_method: Literal["fips"] = "fips"
    format_version: Literal[1] = 1
    bases: dict[str, BasisLayout]
    layers: dict[str, LayerLayout]

    @classmethod
    def parse(cls, fields: Any, *, where: str) -> Layout:
        """Validate what a file holds; ``where`` names it in errors. Raises ``CheckpointError``."""
        if not isinstance(fields, dict) or fields.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(f"{where} has no `quantization_config` of fips; give a directory written by fips")
        if fields.get("format_version") != 1:
            raise CheckpointError(
                f"{where} has format_version {fields.get('format_version')!r}, this fips reads 1; install the fips "
                "version that wrote it"
            )
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise CheckpointError(f"{where}: `quantization_config.{name}`: {first['msg']}") from None

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        layers = {name: layer.model_dump(exclude_defaults=True) for name, layer in self.layers.items()}
        return {**self.model_dump(exclude={"layers"}), "layers": layers}


def describe_layout(model: nn.Module) -> Layout:
    """The layout of a compressed model, read off its modules."""
    bases: dict[str, SharedBasis] = dict(getattr(basis_owner(model), BASES).items())
    names = {id(basis): name for name, basis in bases.items()}
    return Layout(
        bases={
            name: BasisLayout(width=basis.weight.shape[0], rank=basis.weight.shape[1]) for name, basis in bases.items()
        },
        layers={
            name: LayerLayout(
                basis=None if layer.basis is None else names[id(layer.basis)],
                width=layer.width if layer.basis is None else None,
                role=layer.role,
                columns=layer.columns,
                nonzeros=layer.nonzeros,
                format=layer.fmt,
                values=layer.kind,
                activation_bits=8 if layer.bits is not None and layer.runtime.activation_bits == 8 else None,
                bias=layer.bias is not None,
                conv1d=layer.conv1d,
            )
            for name, layer in factored_layers(model).items()
        },
    )


def install_layout(model: nn.Module, layout: Layout, *, partial: bool = False) -> None:
    """Put empty bases and factored layers of a layout into a dense model, in place.

    Names are those of the model the layout was read off; a model with or without a head around the same base model
    (``LlamaModel`` for ``LlamaForCausalLM``) is filled too. With ``partial`` layers that the model does not have are
    left out (an encoder of an encoder-decoder), as long as some remain. Raises ``CheckpointError`` if a named layer
    is not in the model or a basis is not in the layout.
    """
    places = {name: _place(model, name) for name in layout.layers}
    absent = next((name for name, place in places.items() if place is None), None)
    if absent is not None and not (partial and any(places.values())):
        raise CheckpointError(f"layer `{absent}` of the checkpoint is not in `{type(model).__name__}`")
    present = {places[name] or "": entry for name, entry in layout.layers.items() if places[name] is not None}
    used = {entry.basis for entry in present.values()}
    bases = {name: SharedBasis(basis.width, basis.rank) for name, basis in layout.bases.items() if name in used}
    setattr(basis_owner(model), BASES, nn.ModuleDict(bases))
    for name, entry in present.items():
        if entry.basis is not None and entry.basis not in bases:
            raise CheckpointError(f"layer `{name}` names basis `{entry.basis}`; known: {', '.join(layout.bases)}")
        layer = FactoredLinear(
            None if entry.basis is None else bases[entry.basis],
            role=entry.role,
            columns=entry.columns,
            nonzeros=entry.nonzeros,
            fmt=entry.format,
            bias=entry.bias,
            width=entry.width,
            values=entry.values,
        )
        layer.conv1d = entry.conv1d
        if entry.activation_bits is not None:
            layer.runtime.activation_bits = entry.activation_bits
        replace_linear(model, name, layer)


def replace_linear(model: nn.Module, name: str, layer: FactoredLinear) -> None:
    """Put a factored layer in the place of a dense one, whose type and device its placeholder weight takes."""
    dense = model.get_submodule(name).weight
    assert isinstance(dense, torch.Tensor)
    layer.weight = torch.empty(0, dtype=dense.dtype, device=dense.device)
    replace_everywhere(model, name, layer)


def _place(model: nn.Module, name: str) -> str | None:
    """The name of a layer in a model with or without a head around its base model; None if it is in neither."""
    prefix = getattr(model, "base_model_prefix", "")
    candidates = [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"] if prefix else [name]
    return next((place for place in candidates if _has_submodule(model, place)), None)


def _has_submodule(model: nn.Module, name: str) -> bool:
    for part in name.split("."):
        child = getattr(model, part, None)
        if not isinstance(child, nn.Module):
            return False
        model = child
    return True


def check_patterns(model: nn.Module) -> None:
    """Raise ``CheckpointError`` if a pattern keeps more or fewer entries than its layer has values."""
    for name, layer in factored_layers(model).items():
        if not layer.values.is_meta and layer.num_kept() != layer.nonzeros:
            raise CheckpointError(
                f"layer `{name}`: its pattern keeps {layer.num_kept()} entries, but it has {layer.nonzeros} values"
            )
