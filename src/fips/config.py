"""Settings: frozen, validated when they are made, unknown names refused with the known ones listed.

``CompressionConfig`` is everything that decides *how* a model is compressed: here what methods share, the rest
beside each method; ``DataConfig`` says on which data; ``Recipe`` joins both to the model they were made for and is what
the YAML files under ``recipes/`` hold.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from fips.errors import ConfigError
from fips.formats.patterns import Pattern, pattern_for

__all__ = [
    "NAMED",
    "SEEDS",
    "SETTINGS",
    "CompressionConfig",
    "DataConfig",
    "InputsConfig",
    "Recipe",
    "ReconstructionConfig",
    "Settings",
    "SparseConfig",
    "all_settings",
    "bytes_of",
    "known_methods",
    "same_data",
    "settings_of",
    "size_bytes",
]

FactorDtype = Literal["float32", "bfloat16", "float16"]
DEFAULT_METHOD = "fips"
SEEDS = 1 << 64
"""Seeds that torch tells apart: 0 and those below."""
MILLION = 1_000_000
"""Of a unit, so that none of its bytes is lost where whole ones are counted."""


def bytes_of(text: str) -> float:
    """What ``400MB`` or ``1.5 GiB`` says; raises ``ValueError`` for anything else.

    The units are those of ``ByteSize``, which itself reads 8.04 kB as 8,039 bytes and 1,5 GiB as one.
    """
    wrong = f"wants a size such as 6GiB, got {text[:60]!r}"
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*([a-zA-Z]*)\s*", text)
    if found is None:
        raise ValueError(wrong)
    try:
        many = TypeAdapter(ByteSize).validate_python(f"{MILLION}{found[2]}")  # a single bit is no whole byte
    except ValidationError:  # no such unit
        raise ValueError(wrong) from None
    number = round(float(found[1]) * many / MILLION, 3)
    if number == float("inf"):
        raise ValueError(wrong)
    return number


def _whole_bytes(value: Any) -> Any:
    return int(bytes_of(value)) if isinstance(value, str) else value


Memory = Annotated[int, Field(ge=0), BeforeValidator(_whole_bytes)]
"""A number of bytes, or how they are written."""


class Settings(BaseModel):
    """Base of all settings: immutable, unknown fields are an error, errors are one readable line."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_explain(error, type(self))) from None

    def replace(self, **fields: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return type(self)(**{**self.model_dump(exclude_unset=True), **fields})

    @classmethod
    def unknown_field(cls, name: str) -> str:
        """What to say about a field that these settings do not have."""
        owners = [
            method for method, owner in all_settings().items() if any(name in inner for inner in _nested(owner, cls))
        ]
        if owners:
            return f"`{name}` of {cls.__name__} belongs to {_methods(owners)}"
        known = sorted(cls.model_fields)
        return f"unknown field `{name}` in {cls.__name__}; {_guess(name, known)}known fields: {', '.join(known)}"


def _explain(error: ValidationError, owner: type[Settings]) -> str:
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(owner.unknown_field(name))
        elif item["type"] == "value_error":
            where = f"`{name}`: " if isinstance(item["input"], str) else ""
            lines.append(f"{where}{item['msg'].removeprefix('Value error, ')}")
        elif item["type"] == "missing":
            lines.append(f"`{name}` is required in {owner.__name__}")
        else:
            lines.append(f"`{name}`: {item['msg']}, got {item['input']!r}{_meaning(owner, item['loc'])}")
    return "; ".join(lines)


def _meaning(owner: type[Settings], place: tuple[int | str, ...]) -> str:
    """What a field is, in the first sentence that its documentation says of it."""
    field = owner.model_fields.get(str(place[0])) if len(place) == 1 else None
    words = "" if field is None or field.description is None else " ".join(field.description.split())
    first = words.partition(". ")[0].rstrip(".")
    return f" ({first[0].lower()}{first[1:]})" if first and not first.startswith("`") else ""


def _guess(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean `{near[0]}`? " if near else ""


def _methods(names: Iterable[str]) -> str:
    return " and ".join(f"`method: {name}`" for name in names)


def _nested(owner: type[Settings], kind: type[Settings]) -> Iterator[Mapping[str, Any]]:
    """The fields of settings of some kind within settings."""
    for field in owner.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, kind):
            yield field.annotation.model_fields


class ReconstructionConfig(Settings):
    """Joint block-wise reconstruction: AdamW with a cosine schedule on the original activations."""

    steps: int = Field(default=0, ge=0)
    """Optimizer steps per group; 0 keeps the closed-form start (then pruning is static)."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW."""
    min_learning_rate: float = Field(default=1e-5, ge=0)
    """Where the cosine schedule ends."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled weight decay."""
    update_every: int = Field(default=50, ge=1)
    """Steps between two updates of the sparse support (GMP and RigL)."""
    update_end: float = Field(default=0.75, gt=0, le=1)
    """Fraction of the steps after which the support stays fixed."""
    initial_sparsity: float = Field(default=0.05, ge=0, lt=1)
    """Sparsity at which gradual pruning starts; at most the final one is used."""
    regrow_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the support that RigL replaces at its first update (cosine decay to 0)."""


class InputMetricConfig(Settings):
    """How the inputs of layers are measured."""

    memory: Memory = 4 << 30
    """Bound for the moments held at a time; at least one group is. Less means more passes over the data."""


class CompressionConfig(Settings):
    """How to compress: the method, and what all methods share. One of `bits`, `size` and `budget` is required.

    ``CompressionConfig(method="gptq", ...)`` makes settings of the class that belongs to the method and takes the
    fields of that class too; they are listed where the method is, in ``fips.methods``.
    """

    method: str = DEFAULT_METHOD
    """`fips`: solver in the metric of the model's output, best structure per group for the bytes. Others, the paper's
    recipe among them, are in ``fips.methods``."""
    budget: float | None = Field(default=None, gt=0, le=1)
    """Fraction of the parameters of the layers to keep: basis entries plus kept entries of the factors."""
    bits: float | None = Field(default=None, gt=0, le=16)
    """Stored bits per weight of the compressed layers, on average: values, patterns, scales and bases."""
    size: str | None = None
    """Bytes of all tensors of the compressed model together: `400MB`, `25%` of what they take now, `4x` less. What is
    not compressed keeps its type, unless `rest_dtype` says another."""
    activation_bits: Literal[8, 16] | None = None
    """8: kernels may round the inputs of layers with integer values to 8 bits, 64 of which share a scale; 16: inputs
    count as exactly as their type says. Written with the model. Default: 8 beside inputs of 16-bit types, exact beside
    float32."""
    share_blocks: int = Field(default=4, ge=1)
    """Consecutive blocks of equal width that share a basis."""
    groups: tuple[tuple[int, ...], ...] | None = None
    """Explicit groups of block indices, counted over all blocks found; overrides `share_blocks`."""
    layers: Literal["mlp", "blocks", "all"] = "blocks"
    """`mlp`: the linear layers of the MLPs; `blocks`: those of attention too; `all`: also the embedding of tokens and
    the output head."""
    targets: tuple[str, ...] | None = None
    """Layers to compress instead of those found: names, suffixes, globs, or `re:` patterns."""
    ignore: tuple[str, ...] = ()
    """Layers to leave alone, same syntax."""
    factor_dtype: FactorDtype | None = None
    """Storage type of bases, floating values and scales. Default: that of the weights, but 16 bits (bfloat16 for
    float32 weights) with `bits`."""
    rest_dtype: FactorDtype | None = None
    """Type that what is not compressed is written in, and that the compressed model then runs in. Default: the one it
    has."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of passes over the data; `auto` is bfloat16 where the hardware multiplies it natively."""
    activation_memory: Memory = 1 << 30
    """Upper bound for recorded activations in RAM, per group; what exceeds it goes to a temporary file."""
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    """Seed of the order in which calibration batches are drawn and of the random directions of gradients."""

    packs_ends: ClassVar[bool] = False
    """Whether the method knows what to do with an embedding and a head."""
    recipe: ClassVar[str] = "fips"
    """Name of the recipe that the command line starts from."""

    @field_validator("size")
    @classmethod
    def _known_size(cls, size: str | None) -> str | None:
        if size is not None:
            size_bytes(size, 1)
        return size

    def __new__(cls, /, **fields: Any) -> Self:
        found: type[Any] = settings_of(fields.get("method", DEFAULT_METHOD)) if cls is CompressionConfig else cls
        instance: Self = object.__new__(found)
        return instance

    def __init__(self, /, **fields: Any) -> None:
        super().__init__(**_in_full(fields))

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("bits", "size", "budget") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "give one of `bits` (stored bits per weight), `size` (of the whole file) and `budget` (fraction of "
                f"parameters), got {' and '.join(given) or 'none'}"
            )
        if self.groups is not None and not all((self.groups, *self.groups)):
            raise ValueError(
                "`groups` wants at least one group of at least one block index, such as `[[0, 1], [2, 3]]`, got "
                f"{[list(group) for group in self.groups]}; leave it out for groups of `share_blocks` blocks"
            )
        if self.targets is not None and self.layers == "all":
            raise ValueError(f"`targets` names the layers, so `layers: {self.layers}` says nothing; leave one out")
        if self.layers == "all" and not self.packs_ends:
            able = [name for name, owner in SETTINGS.items() if owner.packs_ends]
            raise ValueError(
                f"`layers: all` is for {_methods(able)}, got `method: {self.method}`; take `layers: blocks`, which "
                "leaves embedding and head as they are"
            )
        if self.layers == "all" and self.budget is not None:
            raise ValueError("`layers: all` stores embedding and head in few bits: give `bits` or `size`, not `budget`")
        if self.activation_bits is not None and not self.has_integers:
            raise ValueError("`activation_bits` goes with integer `values`, got `values: float`")
        self.check()
        return self

    def check(self) -> None:
        """Raise ``ValueError`` for fields of the method that contradict each other."""

    @property
    def has_integers(self) -> bool:
        """Whether the method stores integers."""
        return False

    def replace(self, **fields: Any) -> Self:
        """A copy with some fields changed, validated again.

        With another ``method``, settings made before that it does not have are dropped.
        """
        fields = _in_full(fields)
        method = fields.get("method", self.method)
        kept = _known(self.model_dump(exclude_unset=True), settings_of(method))
        replaced: Self = CompressionConfig(**{**kept, "method": method, **fields})  # type: ignore[assignment]
        return replaced

    @classmethod
    def from_record(cls, fields: Mapping[str, Any]) -> CompressionConfig:
        """Settings from a report. Those of earlier versions hold the fields of all methods, null for a default."""
        return CompressionConfig(**_known(_renamed(fields), settings_of(fields.get("method", DEFAULT_METHOD))))

    @classmethod
    def unknown_field(cls, name: str) -> str:
        method = cls.model_fields["method"].default
        owners = [other for other, owner in all_settings().items() if name in owner.model_fields]
        if owners:
            return f"`{name}` belongs to {_methods(owners)}, not to `method: {method}`"
        known = sorted(cls.model_fields)
        everywhere = [*known, *(field for owner in all_settings().values() for field in owner.model_fields)]
        return (
            f"unknown field `{name}` of `method: {method}`; {_guess(name, everywhere)}known fields: {', '.join(known)}"
        )


def size_bytes(size: str, before: int) -> float:
    """What ``400MB``, ``25%`` or ``4x`` says of ``before`` bytes; raises ``ValueError`` for anything else."""
    number, unit = size.strip().rstrip("%x"), size.strip()[-1:]
    try:
        if unit == "%":
            share = float(number) / 100
        elif unit == "x":
            share = 1 / float(number)
        else:
            found = bytes_of(size)
            if found > 100:  # no model is of so few bytes: a share without its sign
                return found
            share = 0.0
    except (ValueError, ArithmeticError):  # of digits without end, too
        share = 0.0
    if not 0 < share <= 1:
        hint = f"; a share is written `{number}%`" if number.isdecimal() and unit.isdecimal() else ""
        raise ValueError(f"wants bytes (`400MB`), a share (`25%`) or how much smaller (`4x`), got {size!r}{hint}")
    return share * before


SETTINGS: dict[str, type[CompressionConfig]] = {}
"""The settings of every method by its name, entered by ``fips.methods.registry.register``; read ``all_settings()``."""
NAMED: dict[str, dict[str, Any]] = {}
"""Settings of a method that have a name of their own, such as ``fips-shared``: their fields, ``method`` among them."""
METHODS = "fips.methods"
"""The package that enters both."""


def all_settings() -> Mapping[str, type[CompressionConfig]]:
    """The settings of every method by its name.

    Methods stand above settings and enter theirs as plug-ins do, when they are imported: here, at the latest.
    """
    import_module(METHODS)
    return SETTINGS


def settings_of(method: str) -> type[CompressionConfig]:
    """The class of a method's settings; raises ``ConfigError`` for a name that no method and none of ``NAMED`` has."""
    known = known_methods()
    if method not in known:
        guess = _guess(str(method), known)
        raise ConfigError(f"`method`: there is no `{method}`; {guess}known methods: {', '.join(known)}")
    return SETTINGS[NAMED.get(method, {"method": method})["method"]]


def known_methods() -> list[str]:
    """What ``method`` may be: the methods, and the names of some settings of theirs."""
    return [*all_settings(), *NAMED]


def _in_full(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields with those that the name of their ``method`` stands for, if that is one of ``NAMED``."""
    named = NAMED.get(str(fields.get("method")))
    return fields if named is None else {**named, **fields, "method": named["method"]}


def _renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of reports and recipes of earlier versions under the names of now."""
    found = dict(fields)
    if found.get("target_bytes") is not None:  # a fraction of 16 bits
        found["bits"] = 16 * found.pop("target_bytes")
    for old, new in (("group_size", "share_blocks"), ("threshold", "threshold_scope")):
        if old in found:
            found[new] = found.pop(old)
    calibration = dict(found.pop("calibration", None) or {})
    moved = {name: calibration.pop(name) for name in ("precision", "activation_memory") if name in calibration}
    return {**found, **moved, **({"reconstruction": calibration} if calibration else {})}


def _known(fields: Mapping[str, Any], owner: type[Settings]) -> dict[str, Any]:
    """Those fields, but for null, that a class of settings has, within nested settings too."""
    found = {}
    for name, value in fields.items():
        field = owner.model_fields.get(name)
        if field is None or value is None:
            continue
        inner = field.annotation
        nested = isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, Settings)
        found[name] = _known(value, inner) if nested else value  # type: ignore[arg-type]
    return found


class InputsConfig(CompressionConfig):
    """What methods share that measure the inputs of layers."""

    metric: InputMetricConfig = InputMetricConfig()


class SparseConfig(CompressionConfig):
    """What methods share that prune factors to a pattern and can train them block by block."""

    pattern: str = "unstructured"
    """`unstructured`, or `N:M`, N entries kept of every M consecutive ones along the reduction."""
    schedule: Literal["static", "gmp", "rigl"] = "static"
    """How the support changes while training: not, by gradual magnitude pruning, or by prune-and-regrow."""
    reconstruction: ReconstructionConfig = ReconstructionConfig()

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, pattern: str) -> str:
        if pattern != "auto":
            pattern_for(pattern)
        return pattern

    def check(self) -> None:
        if self.nm is not None and self.schedule == "rigl":
            raise ValueError("`schedule: rigl` needs `pattern: unstructured`; N:M works with `static` and `gmp`")

    @property
    def format(self) -> Pattern:
        """The pattern asked for; any entries where it is to be measured."""
        return pattern_for("unstructured" if self.pattern == "auto" else self.pattern)

    @property
    def nm(self) -> tuple[int, int] | None:
        """``(N, M)`` of a pattern that keeps N of every M entries, None of one that leaves it free."""
        kept = self.format.group_kept
        return None if kept is None else (kept, self.format.group)


class DataConfig(Settings):
    """Which examples to read, and how many."""

    source: str
    """Image folder, text file, or `datasets` id with an optional configuration, `id:configuration`. For calibration
    also several with shares, `a.txt:0.7,b.txt:0.3`."""
    split: str | None = None
    """Split of a hub dataset; default: `train` for calibration, `test` or `validation` for evaluation."""
    column: str | None = None
    """Column with the text or the image; default: found by type. Several with commas: texts one below the other, a
    pair of texts for a classifier, source and target for an encoder-decoder."""
    chat: bool = False
    """Whether the column holds chats, lists of messages, to be read in the tokenizer's template."""
    stream: bool | None = None
    """Whether tables and hub data sets are read only as far as needed, from a shuffled buffer of their rows, and not
    downloaded or converted whole; default: hub data sets when calibrating."""
    num_samples: int | None = Field(default=None, ge=1)
    """Images or text windows to use; null uses all, but 1,024 images or 128 windows when calibrating."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens per text window; default: the model's context, at most 2,048, and 512 when calibrating."""
    document_separator: str | None = None
    """String between the documents of a text; windows then never cross a document."""
    batch_size: int = Field(default=32, ge=1)
    """Examples per batch."""
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    """Seed of the choice of samples."""


def same_data(one: DataConfig, other: DataConfig) -> bool:
    """Whether two settings name the same source and split."""
    return (one.source, one.split) == (other.source, other.split)


class Recipe(Settings):
    """A complete, named setting: the model it was made for, the compression and the calibration data."""

    description: str = ""
    model: str | None = None
    """Hub id or directory the recipe was made for; a MODEL argument overrides it."""
    architecture: dict[str, Any] | None = None
    """Configuration of that model, so that `--dry-run` can plan without the hub."""
    compression: SerializeAsAny[CompressionConfig]
    data: DataConfig | None = None

    @field_validator("compression", mode="before")
    @classmethod
    def _of_earlier_versions(cls, fields: Any) -> Any:
        """Earlier versions wrote the fields of all methods beside a compressed model."""
        everything = isinstance(fields, Mapping) and {"sharing", "growth_tau"} <= fields.keys()
        return CompressionConfig.from_record(fields) if everything else fields

    @classmethod
    def from_yaml(cls, text: str, *, name: str) -> Recipe:
        """Parse one recipe; ``name`` (a file or recipe name) opens every error message."""
        try:
            fields = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # of the grammar, of dates, of lists in lists
            raise ConfigError(f"recipe `{name}` is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(fields, Mapping):
            raise ConfigError(f"recipe `{name}` must be a mapping with `compression`, got {type(fields).__name__}")
        try:
            return cls(**{str(key): value for key, value in fields.items()})
        except ConfigError as error:
            raise ConfigError(f"recipe `{name}`: {error}") from None

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """The recipe in a file; raises ``ConfigError`` for one that cannot be read or holds none."""
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"recipe `{path}` is not UTF-8 text (byte {error.start}); write it anew in that encoding"
            ) from None
        except OSError as error:
            raise ConfigError(f"cannot read recipe `{path}`: {error.strerror}; give a YAML file") from None
        return cls.from_yaml(text, name=str(path))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)
