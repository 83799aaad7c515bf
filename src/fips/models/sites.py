"""A linear layer as what it reads and writes. Which way its matrix lies follows from that, here and nowhere else.

Every matrix is seen with the residual stream on axis 0, so that all of them fit one basis; a linear layer stores
(outputs, inputs) instead. The two differ by a transposition for layers that read the stream.

Shape legend: D width of the residual stream, F hidden features (those on the other side), O outputs, I inputs, R
rank (D without a basis).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, NamedTuple, TypeVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fips.errors import ConfigError

__all__ = ["Linear", "Part", "Role", "Site", "Space"]

T = TypeVar("T")
Axis = Literal[0, 1]
Space = Literal["residual", "hidden", "queries", "keys", "values", "heads", "latent", "vocabulary"]
"""Where features live: the residual stream, the neurons of an MLP, what attention compares and adds up, or what its
heads put out (also queries, keys and values in an order of their own), the small space inside a low-rank projection,
the tokens of a vocabulary."""


class Role(StrEnum):
    """Which side of a layer is the residual stream; the names are those of files.

    ``Role(name)`` raises ``ConfigError`` for an unknown name.
    """

    UP = "up"
    """Reads the stream: fc1, gate, up, query, key, value."""
    DOWN = "down"
    """Writes it: fc2, down, the output projection of attention."""

    @classmethod
    def _missing_(cls, value: object) -> Role:
        raise ConfigError(f"unknown role {value!r}; known: {', '.join(cls)}")

    @property
    def reads_stream(self) -> bool:
        return self is Role.UP

    def to_linear(self, matrix_DF: Tensor) -> Tensor:
        """(D, F) as (O, I), a factor (R, F) as it is stored."""
        return matrix_DF.T if self.reads_stream else matrix_DF

    def to_factor(self, weight_OI: Tensor) -> Tensor:
        """(O, I) as (D, F), a stored factor as (R, F)."""
        return weight_OI.T if self.reads_stream else weight_OI

    def stored_shape(self, rank: int, hidden: int) -> tuple[int, int]:
        """Of a factor (R, F); the first number is that of its scales where values are integers."""
        return (hidden, rank) if self.reads_stream else (rank, hidden)

    def features(self, width: int, hidden: int) -> tuple[int, int]:
        """``(inputs, outputs)`` of a layer between D = ``width`` and F = ``hidden``."""
        return (width, hidden) if self.reads_stream else (hidden, width)

    def sides(self, of_inputs: T, of_outputs: T) -> tuple[T, T]:
        """What belongs to inputs and outputs as what belongs to the stream and to the other side."""
        return (of_inputs, of_outputs) if self.reads_stream else (of_outputs, of_inputs)

    @property
    def reduction(self) -> Axis:
        """Axis of a factor (R, F) that the layer sums along, and that one step or scale spans."""
        return 0 if self.reads_stream else 1

    @property
    def hidden_axis(self) -> Axis:
        """Axis of a stored factor that runs over F."""
        return 0 if self.reads_stream else 1


class Linear(NamedTuple):
    """A linear layer of a model."""

    name: str
    module: nn.Module
    inputs: int
    outputs: int


class Part(NamedTuple):
    """Neighbouring features on one side of a layer that are in one space.

    A fused layer writes several: ``gate_up_proj`` two parts of the hidden space, neuron by neuron the same;
    ``qkv_proj`` queries, keys and values, of which the last two are narrower in grouped-query attention.
    """

    space: Space
    features: int


@dataclass(frozen=True, slots=True)
class Site:
    """One linear layer and what it reads and writes; one of the two is the residual stream, but for ``inner`` ones."""

    name: str
    reads: tuple[Part, ...]
    writes: tuple[Part, ...]
    conv1d: bool
    """Stored as ``(in, out)`` like GPT-2's Conv1D instead of ``(out, in)``."""
    has_bias: bool
    """Whether a bias can take up the mean error."""
    looked_up: bool = False
    """Whether it is the matrix of an embedding, whose rows are looked up."""
    tied: tuple[str, ...] = ()
    """Other modules that have the matrix of an embedding too: the output head, further embeddings."""
    heads: tuple[str, ...] = ()
    """Those of them that multiply by it."""
    mixture: str = ""
    """Of one expert among several the module that holds them all: only some tokens reach it, maybe none."""

    @classmethod
    def of(cls, linear: Linear, *, reads: tuple[Part, ...], writes: tuple[Part, ...]) -> Site:
        has_bias = getattr(linear.module, "bias", None) is not None
        return cls(linear.name, reads, writes, isinstance(linear.module, Conv1D), has_bias)

    @classmethod
    def reader(cls, linear: Linear, space: Space = "hidden", *, parts: int = 1, absorbs: bool = True) -> Site:
        """A layer that reads the stream and writes a space, ``parts`` times side by side.

        Where its bias is not to be changed it ``absorbs`` nothing.
        """
        written = (Part(space, linear.outputs // parts),) * parts
        site = cls.of(linear, reads=(Part("residual", linear.inputs),), writes=written)
        return site if absorbs else replace(site, has_bias=False)

    @classmethod
    def writer(cls, linear: Linear, space: Space = "hidden") -> Site:
        """A layer that reads a space and writes the stream."""
        return cls.of(linear, reads=(Part(space, linear.inputs),), writes=(Part("residual", linear.outputs),))

    @classmethod
    def inner(cls, linear: Linear) -> Site:
        """A layer that does neither. What it writes takes the place of the stream: nothing else shares its basis."""
        return cls.of(linear, reads=(Part("latent", linear.inputs),), writes=(Part("heads", linear.outputs),))

    @classmethod
    def embedding(
        cls, name: str, shape: tuple[int, int], *, tied: tuple[str, ...] = (), heads: tuple[str, ...] = ()
    ) -> Site:
        """The matrix (tokens, D) of an embedding, which lies as that of a head does."""
        tokens, width = shape
        reads, writes = (Part("residual", width),), (Part("vocabulary", tokens),)
        return cls(name, reads, writes, conv1d=False, has_bias=False, looked_up=True, tied=tied, heads=heads)

    @property
    def lookups(self) -> tuple[str, ...]:
        """The embeddings that look its rows up."""
        return tuple(name for name in (self.name, *self.tied) if name not in self.heads) if self.looked_up else ()

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that compute with the matrix, whose inputs and outputs say what an error costs."""
        return (*self.lookups, *self.heads) if self.looked_up else (self.name,)

    @property
    def multiplied_by(self) -> str | None:
        """The module that multiplies its inputs by the matrix; None for an embedding by itself."""
        return next(iter(self.heads), None) if self.looked_up else self.name

    @property
    def judges(self) -> tuple[str, ...]:
        """Modules of which one has to run and count, or nothing is known of the matrix."""
        return (self.heads or self.lookups) if self.looked_up else (self.name,)

    @property
    def role(self) -> Role:
        return Role.UP if self.reads[0].space == "residual" else Role.DOWN

    @property
    def inputs(self) -> int:
        return sum(part.features for part in self.reads)

    @property
    def outputs(self) -> int:
        return sum(part.features for part in self.writes)

    @property
    def width(self) -> int:
        """D: features on the side of the residual stream."""
        return self.role.sides(self.inputs, self.outputs)[0]

    @property
    def hidden(self) -> int:
        """F: hidden features, those on the other side."""
        return self.role.sides(self.inputs, self.outputs)[1]

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the features on the other side are."""
        return self.role.sides(self.reads, self.writes)[1]

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the stored dense weight."""
        return (self.inputs, self.outputs) if self.conv1d else (self.outputs, self.inputs)

    def matrix(self, weight: Tensor) -> Tensor:
        """The stored dense weight as (D, F)."""
        return self.role.to_factor(weight.T if self.conv1d else weight)
