"""A packed embedding, which decodes the rows it is asked for, and the other places of its matrix, such as a tied head.

Shape legend: V entries of the vocabulary, D width.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from fips.errors import ConfigError
from fips.formats.packed import rows_of
from fips.formats.patterns import FULL
from fips.kernels.validity import without_autocast
from fips.layers.linear import FactoredLinear, factored_layers
from fips.models.ends import embedding_scale

__all__ = ["Lookup", "PackedEmbedding", "TiedLayer", "packed_places", "tied_layers"]


class Lookup:
    """What an embedding does beside looking rows up, and how a dense one like it is made."""

    def __init__(self, kind: type[nn.Embedding], padding_idx: int | None, scale: float) -> None:
        self.kind, self.padding_idx, self.scale = kind, padding_idx, scale

    @classmethod
    def of(cls, dense: nn.Embedding) -> Self:
        """Raises ``ConfigError`` for a class that does more than to multiply rows by a number."""
        scale = embedding_scale(dense)
        if scale is None:
            raise ConfigError(f"a `{type(dense).__name__}` cannot be packed; only rows times a number are known")
        return cls(type(dense), dense.padding_idx, scale)

    def scaled(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows in a type, times the scale in that type."""
        rows = rows.to(dtype)
        return rows if self.scale == 1 else rows * torch.tensor(self.scale, dtype=dtype, device=rows.device)

    def dense(self, weight_VD: nn.Parameter) -> nn.Embedding:
        """An embedding of the same class."""
        more: dict[str, Any] = {} if self.kind is nn.Embedding else {"embed_scale": self.scale}
        small = self.kind(1, weight_VD.shape[1], None, **more).to(weight_VD.device)
        small.num_embeddings, small.padding_idx, small.weight = weight_VD.shape[0], self.padding_idx, weight_VD
        return small


class PackedEmbedding(FactoredLinear):
    r"""The embedding of a vocabulary as a packed matrix (V, D) on a grid; a call decodes the rows it is given.

    It is stored as the matrix of an ``up`` layer is, all entries kept: :math:`x S^\top` are the logits of a tied head,
    which ``multiply`` gives. Inputs of a floating type are multiplied, integers are looked up: (...) gives (..., D), in
    the type of ``weight``, times the scale of the embedding that it stands for (Gemma's).

    ``weight`` is an empty placeholder of shape (V, 0). Raises ``IndexError`` for an id that is not in the vocabulary.
    """

    def __init__(self, *, lookup: Lookup, **arguments: Any) -> None:
        super().__init__(None, fmt=FULL, **arguments)
        self.lookup = lookup

    @classmethod
    def of(cls, layer: FactoredLinear, lookup: Lookup) -> Self:
        """The embedding with the tensors of a layer; ``ConfigError`` if entries are left out or not on a grid."""
        known = layer.arguments()
        if known.pop("fmt") != FULL or layer.bits is None or not layer.reads_stream or layer.bias is not None:
            raise ConfigError(f"an embedding keeps all entries on a grid, got {layer}")
        with torch.device("meta"):
            found = cls(lookup=lookup, **known)
        found.weight = torch.empty(found.placeholder_shape, dtype=layer.weight.dtype, device=layer.values.device)
        for name in ("values", "scales", *(("group_scales",) if layer.value_format.scale_group else ())):
            setattr(found, name, getattr(layer, name))
        return found

    @property
    def placeholder_shape(self) -> tuple[int, ...]:
        return (self.out_features, 0)

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    @property
    def padding_idx(self) -> int | None:
        return self.lookup.padding_idx

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x) if x.is_floating_point() else self.rows(x, self.lookup)

    def multiply(self, x: Tensor) -> Tensor:
        """The logits (..., V) of (..., D)."""
        return super().forward(x)

    def rows(self, ids: Tensor, lookup: Lookup) -> Tensor:
        """Rows of ids, with what an embedding that has this matrix does to them."""
        with without_autocast(ids.device):
            return lookup.scaled(rows_of(self.packed(), ids), self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.lookup.scale}, padding_idx={self.padding_idx}"


class TiedLayer(nn.Module):
    """Another place of the matrix of a packed embedding: an output head, or with a ``lookup`` a further embedding.

    The embedding is borrowed: it owns the matrix, which is saved, moved and held once. A head multiplies by it with the
    kernels of any packed layer and adds its own ``bias``. ``weight`` is the placeholder of the embedding, in no file.
    """

    bias: nn.Parameter | None
    weight: Tensor
    conv1d = False

    def __init__(self, embedding: PackedEmbedding, *, bias: nn.Parameter | None = None, lookup: Lookup | None = None):
        super().__init__()
        self._borrowed = (embedding,)
        self.lookup = lookup
        self.register_buffer("weight", embedding.weight, persistent=False)
        self.register_parameter("bias", None)
        self._parameters["bias"] = bias  # the very parameter: BERT has it under two names

    @property
    def embedding(self) -> PackedEmbedding:
        return self._borrowed[0]

    @property
    def in_features(self) -> int:
        return self.embedding.in_features

    @property
    def out_features(self) -> int:
        return self.embedding.out_features

    num_embeddings, embedding_dim = out_features, in_features

    @property
    def padding_idx(self) -> int | None:
        return None if self.lookup is None else self.lookup.padding_idx

    def forward(self, x: Tensor) -> Tensor:
        owner, home = self.embedding, x.device
        if self.lookup is not None:
            return owner.rows(x.to(owner.weight.device), self.lookup).to(home)
        # a call of the module itself lets accelerate bring tensors that it has taken away
        y: Tensor = owner(x) if "_hf_hook" in vars(owner) else owner.multiply(x.to(owner.weight.device))
        y = y.to(home)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self) -> Tensor:
        """As ``FactoredLinear.dense_weight``."""
        return self.embedding.dense_weight()

    def dense(self, weight_VD: nn.Parameter) -> nn.Module:
        """A plain module with this matrix in its place."""
        if self.lookup is not None:
            return self.lookup.dense(weight_VD).train(self.training)
        with torch.device("meta"):
            found = nn.Linear(self.in_features, self.out_features, bias=False)
        found.weight = weight_VD
        found.register_parameter("bias", self.bias)
        return found.train(self.training)

    def extra_repr(self) -> str:
        what = "embedding" if self.lookup is not None else "head"
        return f"{what} of {self.num_embeddings} x {self.embedding_dim}, bias={self.bias is not None}"


def tied_layers(model: nn.Module) -> dict[str, TiedLayer]:
    """The further places of packed embeddings by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TiedLayer)}


def packed_places(model: nn.Module) -> list[str]:
    """Names of all packed layers, further places of an embedding included."""
    return [*factored_layers(model), *tied_layers(model)]
