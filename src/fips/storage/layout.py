"""The ``quantization_config`` of a compressed model: everything needed to build its modules without weights."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import nn

from fips.errors import CheckpointError
from fips.nn import BASES, FactoredLinear, SharedBasis, basis_owner, factored_layers
from fips.storage.packing import parse_nm

__all__ = ["QUANT_METHOD", "Layout", "describe_layout", "install_layout"]

QUANT_METHOD = "fips"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BasisLayout(_Strict):
    width: int = Field(ge=1)
    rank: int = Field(ge=1)


class LayerLayout(_Strict):
    basis: str
    role: Literal["up", "down"]
    columns: int = Field(ge=1)
    nonzeros: int = Field(ge=0)
    format: str
    bias: bool
    conv1d: bool

    @field_validator("format")
    @classmethod
    def _known(cls, value: str) -> str:
        parse_nm(value)
        return value


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
                basis=names[id(layer.basis)],
                role=layer.role,
                columns=layer.out_features if layer.role == "up" else layer.in_features,
                nonzeros=layer.values.numel(),
                format=layer.fmt,
                bias=layer.bias is not None,
                conv1d=layer.conv1d,
            )
            for name, layer in factored_layers(model).items()
        },
    )


def install_layout(model: nn.Module, layout: Layout) -> None:
    """Put empty bases and factored layers of a layout into a dense model, in place.

    Raises ``CheckpointError`` if a named layer is not in the model or a basis is not in the layout.
    """
    bases = {name: SharedBasis(basis.width, basis.rank) for name, basis in layout.bases.items()}
    setattr(basis_owner(model), BASES, nn.ModuleDict(bases))
    for name, entry in layout.layers.items():
        try:
            model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(f"layer `{name}` of the checkpoint is not in `{type(model).__name__}`") from None
        if entry.basis not in bases:
            raise CheckpointError(f"layer `{name}` names basis `{entry.basis}`; known: {', '.join(bases)}")
        layer = FactoredLinear(
            bases[entry.basis],
            role=entry.role,
            columns=entry.columns,
            nonzeros=entry.nonzeros,
            fmt=entry.format,
            bias=entry.bias,
        )
        layer.conv1d = entry.conv1d
        model.set_submodule(name, layer)
