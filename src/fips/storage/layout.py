"""The ``quantization_config`` of a compressed model: everything needed to build its modules without weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator, model_validator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fips.errors import CheckpointError
from fips.formats.patterns import FULL, pattern_in_file, pattern_named
from fips.formats.rotation import ROTATIONS
from fips.formats.values import FLOAT, values_named
from fips.layers.embedding import Lookup, PackedEmbedding, TiedLayer, tied_layers
from fips.layers.linear import (
    BASES,
    Bases,
    FactoredLinear,
    Homes,
    SharedBasis,
    basis_owner,
    factored_layers,
    homes_of,
    replace_everywhere,
)
from fips.models.ends import embedding_scale
from fips.models.experts import experts_apart
from fips.models.sites import Role

__all__ = [
    "QUANT_METHOD",
    "Layout",
    "check_layers",
    "describe_layout",
    "install_layout",
    "replace_embedding",
    "replace_linear",
]

QUANT_METHOD = "fips"
Version = Literal[1, 2, 3, 4]
VERSIONS: tuple[Version, ...] = get_args(Version)
Size = Annotated[int, Field(ge=1, lt=1 << 31)]
"""Features on one side of a matrix."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BasisLayout(_Strict):
    width: Size
    rank: Size


class LayerLayout(_Strict):
    """One factored layer, made of the words that the file has. Fields equal to their default are not written."""

    basis: str | None = None
    """Name of its basis; None is the identity."""
    width: Size | None = None
    """Features on the side of the residual stream, given where no basis says it."""
    role: Literal["up", "down"]
    hidden: Size = Field(alias="columns")
    kept: int = Field(alias="nonzeros", ge=0, lt=1 << 62)
    format: str
    """Name of its pattern, which files may call otherwise."""
    values: str = FLOAT
    rotation: int = 1
    """Columns of a block that are stored turned, see ``fips.formats.rotation``."""
    activation_bits: Literal[8, 16] | None = None
    """What inputs may be rounded to, see ``fips.kernels.runtime``."""
    bias: bool
    conv1d: bool
    embedding: bool = False
    """Whether its rows are looked up."""
    tied: tuple[str, ...] = ()
    """Of an embedding: other modules that have its matrix, such as the output head."""

    @field_validator("tied", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value  # JSON has no tuples

    @field_validator("format")
    @classmethod
    def _known(cls, value: str) -> str:
        return pattern_in_file(value).name

    @field_serializer("format")
    def _in_file(self, value: str) -> str:
        return pattern_named(value).file_name

    @field_validator("values")
    @classmethod
    def _known_values(cls, value: str) -> str:
        values_named(value)
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.basis is None) != (self.width is not None):
            raise ValueError("wants either `basis` or `width`")
        if self.hidden % pattern_named(self.format).block:
            raise ValueError(f"`columns` {self.hidden} does not fill the blocks of {self.format}")
        if values_named(self.values).memory and self.format != FULL:
            raise ValueError(f"`values` {self.values} are of `format` {FULL}, got {self.format}")
        if self.activation_bits is not None and not values_named(self.values).scaled:
            raise ValueError("`activation_bits` is for integer `values`")
        if self.rotation not in ROTATIONS:
            raise ValueError(f"`rotation` is one of {', '.join(map(str, ROTATIONS))}")
        if self.rotation > 1 and (self.basis is not None or not values_named(self.values).scaled):
            raise ValueError("`rotation` is for numbers on a grid and layers without a basis")
        if self.tied and not self.embedding:
            raise ValueError("`tied` is for embeddings")
        whole = self.format == FULL and self.basis is None and values_named(self.values).scaled
        if self.embedding and (not whole or self.role != "up" or self.bias or self.conv1d):
            raise ValueError("an `embedding` is an up layer without basis and bias that keeps all entries on a grid")
        return self

    @property
    def version(self) -> Version:
        """The first format version that has what this layer has."""
        values = values_named(self.values)
        if values.memory or self.embedding:
            return 4
        return 3 if values.levels or self.rotation > 1 else 1 if values.scale_group is None else 2


class Layout(_Strict):
    """Bases and factored layers by name. Format version 2 has values with group scales, version 3 levels that are not
    evenly spaced and rotated columns, version 4 values that are coded together and embeddings."""

    quant_method: Literal["fips"] = "fips"
    format_version: Version = 1
    bases: dict[str, BasisLayout]
    layers: dict[str, LayerLayout]

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if not self.layers:
            raise ValueError("`layers` is empty; a compressed model has at least one")
        odd = [name for name in self.bases if not name or "." in name]
        places = [name for layer in self.layers.values() for name in layer.tied]
        odd += [name for name in (*self.layers, *places) if not all(name.split("."))]
        twice = [name for name, count in Counter([*self.layers, *places]).items() if count > 1]
        if odd:
            raise ValueError(f"{odd[0][:100]!r} cannot be the name of a module")
        if twice:
            raise ValueError(f"`{twice[0][:100]}` is named twice")
        for name, entry in self.layers.items():
            if entry.basis is not None and entry.basis not in self.bases:
                raise ValueError(f"layer `{name}` names basis `{entry.basis}`; known: {', '.join(self.bases)}")
            _require_kept(name, entry, self.rank(entry))
            if self.format_version < entry.version:
                what = f"`rotation` {entry.rotation}" if entry.rotation > 1 else f"`values` {entry.values}"
                what = "`embedding`" if entry.embedding else what
                raise ValueError(f"layer `{name}` has {what}, which format_version {self.format_version} does not know")
            inputs, _ = self.features(entry)
            if inputs % entry.rotation:
                raise ValueError(
                    f"layer `{name}` has `rotation` {entry.rotation}, which does not divide {inputs} inputs"
                )
        unused = set(self.bases) - {entry.basis for entry in self.layers.values()}
        if unused:
            raise ValueError(f"no layer uses basis `{min(unused)}`")
        return self

    def width(self, entry: LayerLayout) -> int:
        """Features of a layer on the side of the residual stream."""
        return self.bases[entry.basis].width if entry.basis is not None else entry.width or 0

    def rank(self, entry: LayerLayout) -> int:
        """Columns of the basis of a layer; its width where it has none."""
        return self.bases[entry.basis].rank if entry.basis is not None else entry.width or 0

    def features(self, entry: LayerLayout) -> tuple[int, int]:
        """``(inputs, outputs)`` of a layer."""
        width = self.width(entry)
        return Role(entry.role).features(width, entry.hidden)

    @classmethod
    def parse(cls, fields: Any, *, where: str) -> Layout:
        """Validate what a file holds; ``where`` names it in errors. Raises ``CheckpointError``."""
        if not isinstance(fields, dict) or fields.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(f"{where} has no `quantization_config` of fips; give a directory written by fips")
        if fields.get("format_version") not in VERSIONS:
            raise CheckpointError(
                f"{where} has format_version {fields.get('format_version')!r}, this fips reads 1 to {max(VERSIONS)}; "
                "install the fips version that wrote it"
            )
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(["quantization_config", *(str(part)[:100] for part in first["loc"])])
            raise CheckpointError(f"{where}: `{name}`: {first['msg']}") from None

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        layers = {name: layer.model_dump(by_alias=True, exclude_defaults=True) for name, layer in self.layers.items()}
        return {**self.model_dump(exclude={"layers"}), "layers": layers}


def describe_layout(model: nn.Module) -> Layout:
    """The layout of a compressed model, read off its modules."""
    bases: dict[str, SharedBasis] = dict(getattr(basis_owner(model), BASES).items())
    names = {id(basis): name for name, basis in bases.items()}
    tied: dict[int, list[str]] = {}
    for name, place in tied_layers(model).items():
        tied.setdefault(id(place.embedding), []).append(name)
    layers = {
        name: _layer_layout(layer, names, tuple(tied.get(id(layer), ())))
        for name, layer in factored_layers(model).items()
    }
    return Layout(
        format_version=max((layer.version for layer in layers.values()), default=1),
        bases={
            name: BasisLayout(width=basis.weight.shape[0], rank=basis.weight.shape[1]) for name, basis in bases.items()
        },
        layers=layers,
    )


def _layer_layout(layer: FactoredLinear, names: Mapping[int, str], tied: tuple[str, ...]) -> LayerLayout:
    return LayerLayout(
        basis=None if layer.basis is None else names[id(layer.basis)],
        width=layer.width if layer.basis is None else None,
        role=layer.role.value,
        columns=layer.hidden,
        nonzeros=layer.kept,
        format=layer.pattern_format.file_name,
        values=layer.kind,
        rotation=layer.rotation,
        activation_bits=_input_bits(layer),
        bias=layer.bias is not None,
        conv1d=layer.conv1d,
        embedding=isinstance(layer, PackedEmbedding),
        tied=tied,
    )


def install_layout(model: nn.Module, layout: Layout, *, partial: bool = False) -> None:
    """Put empty bases and factored layers of a layout into a dense model, in place.

    Names are those of the model the layout was read off; a model with or without a head around the same base model
    (``LlamaModel`` for ``LlamaForCausalLM``) is filled too. With ``partial`` layers that the model does not have are
    left out (an encoder of an encoder-decoder), as long as some remain. Fused experts that have a layer among them are
    taken apart. Raises ``CheckpointError``, with the model as
    it was, if a named layer is not in the model, is no linear layer there, or differs from it in features or bias.
    """
    with experts_apart(model):
        _install(model, layout, partial=partial)


def _install(model: nn.Module, layout: Layout, *, partial: bool) -> None:
    places = {name: _place(model, name) for name in layout.layers}
    absent = next((name for name, place in places.items() if place is None), None)
    if absent is not None and not (partial and any(places.values())):
        raise CheckpointError(f"layer `{absent}` of the checkpoint is not in `{type(model).__name__}`")
    present = {place: layout.layers[name] for name, place in places.items() if place is not None}
    if len(present) != sum(place is not None for place in places.values()):
        raise CheckpointError(f"two layers of the checkpoint have one place in `{type(model).__name__}`")
    tied = _tied_weights(model)
    others = {name: _tied_places(model, entry) for name, entry in present.items()}
    for name, entry in present.items():
        for place in (name, *others[name]):
            _require_fit(place, model.get_submodule(place), layout, entry)
        if entry.embedding:
            if not isinstance(dense := model.get_submodule(name), nn.Embedding):
                raise CheckpointError(
                    f"layer `{name}` of the checkpoint is an embedding, in the model it is a `{type(dense).__name__}`; "
                    "`config.json` and its `quantization_config` are not of one model"
                )
            _require_tied_alike(model, name, others[name])
        elif f"{name}.weight" in tied:
            raise CheckpointError(
                f"layer `{name}` of the checkpoint shares its weight with another; it cannot be packed"
            )
    used, homes = {entry.basis for entry in present.values()}, homes_of(model)
    bases = {name: SharedBasis(basis.width, basis.rank) for name, basis in layout.bases.items() if name in used}
    setattr(basis_owner(model), BASES, Bases(bases))
    for name, entry in present.items():
        layer = _empty_layer(entry, None if entry.basis is None else bases[entry.basis])
        if entry.embedding:
            replace_embedding(model, name, layer, others[name])
        else:
            replace_linear(model, name, layer, homes)


def _empty_layer(entry: LayerLayout, basis: SharedBasis | None) -> FactoredLinear:
    layer = FactoredLinear(
        basis,
        role=entry.role,
        hidden=entry.hidden,
        kept=entry.kept,
        fmt=entry.format,
        bias=entry.bias,
        width=entry.width,
        values=entry.values,
        rotation=entry.rotation,
    )
    layer.conv1d = entry.conv1d
    if entry.activation_bits is not None:
        layer.runtime.activation_bits = entry.activation_bits
    return layer


def _require_kept(name: str, entry: LayerLayout, rank: int) -> None:
    """Raise ``ValueError`` if the format keeps another number of entries than ``nonzeros`` says."""
    pattern = pattern_named(entry.format)
    wanted = pattern.kept(entry.hidden * rank)
    if wanted is not None and entry.kept != wanted:
        raise ValueError(f"layer `{name}` has `nonzeros` {entry.kept}, {pattern.file_name} keeps {wanted}")
    if entry.kept > entry.hidden * rank or entry.kept % pattern.block:
        raise ValueError(f"layer `{name}` has `nonzeros` {entry.kept} of {entry.hidden} x {rank} entries")


def _require_fit(name: str, dense: nn.Module, layout: Layout, entry: LayerLayout) -> None:
    """Raise ``CheckpointError`` unless the packed layer takes and gives what the dense one in its place does."""
    if entry.embedding:
        _require_same_matrix(name, dense, layout, entry)
        return
    if isinstance(dense, Conv1D):
        features = (dense.nx, dense.nf)
    elif isinstance(dense, nn.Linear) and not isinstance(dense, nn.modules.linear.NonDynamicallyQuantizableLinear):
        features = (dense.in_features, dense.out_features)
    else:
        raise CheckpointError(
            f"layer `{name}` of the checkpoint is a `{type(dense).__name__}` in the model; "
            "only linear layers are packed"
        )
    got = (*layout.features(entry), entry.bias, entry.conv1d)
    wanted = (*features, getattr(dense, "bias", None) is not None, isinstance(dense, Conv1D))
    if got != wanted:
        names = ("in_features", "out_features", "bias", "conv1d")
        field = next(field for field, a, b in zip(names, got, wanted, strict=True) if a != b)
        index = names.index(field)
        raise CheckpointError(
            f"layer `{name}` of the checkpoint has {field} {got[index]}, the model wants {wanted[index]}; "
            "`config.json` and its `quantization_config` are not of one model"
        )


def _require_same_matrix(name: str, dense: nn.Module, layout: Layout, entry: LayerLayout) -> None:
    """Raise ``CheckpointError`` unless a module can have the matrix of an embedding."""
    plain = isinstance(dense, nn.Embedding) and embedding_scale(dense) is not None
    if not plain and type(dense) is not nn.Linear:
        raise CheckpointError(
            f"layer `{name}` of the checkpoint is a `{type(dense).__name__}` in the model; an embedding or a linear "
            "layer was packed"
        )
    weight, (width, tokens) = dense.weight, layout.features(entry)
    assert isinstance(weight, Tensor)
    if tuple(weight.shape) != (tokens, width):
        raise CheckpointError(
            f"layer `{name}` of the checkpoint has {tokens} rows of {width}, the model wants {tuple(weight.shape)}; "
            "`config.json` and its `quantization_config` are not of one model"
        )


def _tied_places(model: nn.Module, entry: LayerLayout) -> list[str]:
    """Further places of an embedding that the model has: one without a head has no tied head."""
    return [place for name in entry.tied if (place := _place(model, name)) is not None]


def _require_tied_alike(model: nn.Module, name: str, others: Sequence[str]) -> None:
    """Raise ``CheckpointError`` unless an embedding shares its weight with just the places that the layout names."""
    weight, tied = model.get_submodule(name).weight, getattr(model, "all_tied_weights_keys", None) or {}
    same = {place for place, module in model.named_modules() if module._parameters.get("weight") is weight}
    sources = {tied.get(f"{place}.weight", f"{place}.weight") for place in same}
    same |= {place.rpartition(".")[0] for pair in tied.items() if sources & {*pair} for place in pair}
    odd = next((place for place in sorted(same ^ {name, *others}) if place != name), None)
    if odd is not None:
        words = "shares" if odd in same else "does not share"
        raise CheckpointError(
            f"`{odd}` {words} the weight of the embedding `{name}` in the model, the checkpoint says otherwise; "
            "`config.json` (`tie_word_embeddings`) and its `quantization_config` are not of one model"
        )


def _tied_weights(model: nn.Module) -> set[str]:
    """Names of parameters that another module has, or is to get, too; modules registered twice are one."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
    shared = {name for several in names.values() if len(several) > 1 for name in several}
    pairs = {pair for pair in tied.items() if not _one_module(model, *pair)}
    return shared | {name for pair in pairs for name in pair}


def _one_module(model: nn.Module, first: str, second: str) -> bool:
    """Whether two names of a tensor lead to one module."""
    places = [name.rpartition(".")[0] for name in (first, second)]
    return all(_has_submodule(model, place) for place in places) and (
        model.get_submodule(places[0]) is model.get_submodule(places[1])
    )


def _input_bits(layer: FactoredLinear) -> Literal[8, 16] | None:
    bits = layer.runtime.activation_bits
    return None if layer.bits is None or bits is None else 8 if bits == 8 else 16


def replace_linear(model: nn.Module, name: str, layer: FactoredLinear, homes: Homes | None = None) -> None:
    """Put a factored layer in the place of a dense one, whose class it remembers and whose type and device its
    placeholder weight takes; ``homes`` as for ``replace_everywhere``."""
    dense = model.get_submodule(name)
    weight = dense.weight
    assert isinstance(weight, torch.Tensor)
    layer.weight = torch.empty(0, dtype=weight.dtype, device=weight.device)
    if isinstance(dense, nn.Linear):
        layer.dense_class = type(dense)
    replace_everywhere(model, name, layer, homes)


def replace_embedding(model: nn.Module, name: str, layer: FactoredLinear, tied: Sequence[str]) -> None:
    """Put a packed embedding with the tensors of a layer in the place of a dense one, and its further places beside it.

    A head keeps its bias. Nothing is left to be tied then.
    """
    dense = {place: model.get_submodule(place) for place in (name, *tied)}
    owner, weight = dense[name], dense[name].weight
    assert isinstance(owner, nn.Embedding)
    assert isinstance(weight, Tensor)
    packed = PackedEmbedding.of(layer, Lookup.of(owner))
    packed.runtime.activation_bits = layer.runtime.activation_bits
    packed.weight = torch.empty(packed.placeholder_shape, dtype=weight.dtype, device=weight.device)
    replace_everywhere(model, name, packed.train(owner.training))
    for place in tied:
        other = dense[place]
        bias = other.bias if isinstance(other, nn.Linear) else None
        lookup = Lookup.of(other) if isinstance(other, nn.Embedding) else None
        replace_everywhere(model, place, TiedLayer(packed, bias=bias, lookup=lookup).train(other.training))
    keys = vars(model).get("all_tied_weights_keys")
    if keys is not None:
        gone = {f"{place}.weight" for place in dense}
        vars(model)["all_tied_weights_keys"] = {one: two for one, two in keys.items() if not gone & {one, two}}


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


def check_layers(model: nn.Module) -> None:
    """Look at what the packed tensors of a filled model hold; layers elsewhere (offloaded) are passed over.

    Raises ``CheckpointError`` naming the layer if a pattern keeps more or fewer entries than it has values, has bits
    behind its end, or a floating tensor holds NaN or Inf.
    """
    for name, tensor in _floating(model):
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"tensor `{name}` holds NaN or Inf; copy the directory again")
    for name, layer in factored_layers(model).items():
        if layer.values.is_meta:
            continue
        if layer.num_kept() != layer.kept:
            raise CheckpointError(
                f"layer `{name}`: its pattern keeps {layer.num_kept()} entries, but it has {layer.kept} values"
            )
        used = layer.pattern_format.bits(layer.factor_shape[0] * layer.factor_shape[1]) % 8
        if used and int(layer.pattern[-1]) >> used:
            raise CheckpointError(f"layer `{name}`: its pattern has bits behind its end; copy the directory again")


def _floating(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Floating tensors of packed layers and of bases, by name."""
    for path, module in model.named_modules():
        if isinstance(module, FactoredLinear | SharedBasis):
            for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor.is_floating_point():
                    yield f"{path}.{key}", tensor
