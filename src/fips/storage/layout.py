"""The ``quantization_config`` of a compressed model: everything needed to build its modules without weights."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from fips.errors import CheckpointError
from fips.nn import BASES, FactoredLinear, SharedBasis, ValueKind, basis_owner, factored_layers
from fips.storage.packing import block_size, parse_nm

__all__ = ["QUANT_METHOD", "Layout", "describe_layout", "install_layout"]

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
                nonzeros=layer.values.numel(),
                format=layer.fmt,
                values=layer.kind,
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
        if entry.basis is not None and entry.basis not in bases:
            raise CheckpointError(f"layer `{name}` names basis `{entry.basis}`; known: {', '.join(bases)}")
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
        model.set_submodule(name, layer)
