"""Settings: frozen, validated when they are made, unknown names refused with the known ones listed.

``CompressionConfig`` is everything that decides *how* a model is compressed; ``DataConfig`` says on which data;
``Recipe`` joins both to the model they were made for and is what the YAML files under ``recipes/`` hold.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from fips.errors import ConfigError
from fips.formats.patterns import BITMASK, Pattern, pattern_for
from fips.formats.values import Values, automatic_values, values_named

__all__ = ["CalibrationConfig", "CompressionConfig", "DataConfig", "DistillConfig", "MetricConfig", "Recipe"]

FactorDtype = Literal["float32", "bfloat16", "float16"]
Method = Literal["fips", "fips-paper", "gptq", "magnitude", "wanda", "sparsegpt", "svd", "svd-llm", "basis-sharing"]
DEFAULT_SPARSITY = 0.75
PRUNERS = ("magnitude", "wanda", "sparsegpt")
BASELINES = ("gptq", *PRUNERS, "svd", "svd-llm", "basis-sharing")


class Settings(BaseModel):
    """Base of all settings: immutable, unknown fields are an error, errors are one readable line."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_explain(error, type(self))) from None

    def replace(self, **fields: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return type(self)(**{**self.model_dump(exclude_unset=True), **fields})


def _explain(error: ValidationError, owner: type[Settings]) -> str:
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = sorted(owner.model_fields)
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            guess = f"did you mean `{near[0]}`? " if near else ""
            lines.append(f"unknown field `{name}` in {owner.__name__}; {guess}known fields: {', '.join(known)}")
        elif item["type"] == "value_error":
            where = f"`{name}`: " if isinstance(item["input"], str) else ""
            lines.append(f"{where}{item['msg'].removeprefix('Value error, ')}")
        elif item["type"] == "missing":
            lines.append(f"`{name}` is required in {owner.__name__}")
        else:
            lines.append(f"`{name}`: {item['msg']}, got {item['input']!r}")
    return "; ".join(lines)


class CalibrationConfig(Settings):
    """Joint block-wise reconstruction: AdamW with a cosine schedule on the original activations."""

    steps: int | None = Field(default=None, ge=0)
    """Optimizer steps per group; 0 keeps the closed-form start (then pruning is static). Default: 600 for
    `fips-paper`, 0 for `fips`."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of AdamW. Default: 4e-4 for `fips-paper`, 1e-4 for `fips`."""
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
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the calibration passes; `auto` is bfloat16 where the hardware multiplies it natively."""
    activation_memory: ByteSize = ByteSize(1 << 30)
    """Upper bound for recorded activations in RAM, per group; what exceeds it goes to a temporary file."""


class MetricConfig(Settings):
    """What an error costs: the second-order change of the model's output (`method: fips`)."""

    temperature: float = Field(default=2.0, gt=0)
    """Temperature of the softmax whose change counts; 1 is the KL divergence, large values treat logits alike."""
    token_floor: float = Field(default=0.4, ge=0, le=1)
    """Share of the weight that all tokens get alike; the rest goes by what a token does to the output."""
    propagate_errors: bool = False
    """Measure every group behind the compressed groups before it instead of behind the original ones."""
    memory: ByteSize = ByteSize(4 << 30)
    """Bound for the moments held at a time; at least one group is. Less means more passes over the data."""


class DistillConfig(Settings):
    """End-to-end training of the compressed layers with the original model as teacher; no labels."""

    steps: int = Field(default=0, ge=0)
    """Optimizer steps; 0 leaves it out."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW, linear warm-up over a tenth of the steps, then cosine to 0."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of both softmaxes in the KL divergence."""
    hidden_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean relative squared error of the block outputs, beside 1 for the logits."""


class CompressionConfig(Settings):
    """How to compress: size, method, grouping and calibration. One of `budget` and `target_bytes` is required."""

    budget: float | None = Field(default=None, gt=0, le=1)
    """Fraction of the MLP parameters to keep: basis entries plus non-zeros of the factors."""
    target_bytes: float | None = Field(default=None, gt=0, le=1)
    """Stored bytes of the MLPs (values, patterns, scales, bases) as a fraction of the dense ones in a 16-bit type."""
    method: Method = "fips"
    """`fips`: solver in the metric of the model's output, best structure per group for the bytes.
    `fips-paper`: SVD start, magnitude sparsity, block-wise AdamW (arXiv 2411.09816).
    Others to compare with, see ``fips.baselines``."""
    sharing: Literal["auto", "always", "never"] = "auto"
    """Whether the matrices of a group share a basis: as measured per group, always, or never (plain pruning); `fips`
    only, the paper's recipe always shares."""
    values: str | None = None
    """Type of the factor values: floating, integers of 2 to 8 bits with a scale per row (`int4`), or `auto`, 3 to 8
    bits as measured per layer. Default: `auto` for `fips` with `target_bytes`, else float."""
    activation_bits: Literal[8] | None = None
    """8: kernels may round the inputs of layers with integer values to 8 bits, one scale per token; written with the
    model. Faster for many tokens; results differ a little. Default: inputs as exact as their type."""
    metric: MetricConfig = MetricConfig()
    distill: DistillConfig = DistillConfig()
    sparsity: float | None = Field(default=None, ge=0, lt=1)
    """Fraction of zeros in the factors of `fips-paper`; default 1 - N/M when `pattern` is N:M, else 0.75. `fips` fills
    its bytes instead."""
    pattern: str | None = None
    """`unstructured`; `N:M`, N non-zeros in every M consecutive entries along the reduction; `block4` or `block8`, one
    mask bit for that many neighbouring hidden neurons, which are reordered for it; `auto`, unstructured or N:16 as
    measured per group. Default: `auto` for `fips`, `unstructured` for `fips-paper`."""
    threshold: Literal["group", "layer"] = "group"
    """One magnitude threshold over all factors of a group, or one per layer."""
    schedule: Literal["static", "gmp", "rigl"] | None = None
    """How the support changes while training: not, by gradual magnitude pruning, or by prune-and-regrow; default
    `gmp` for `fips-paper`, `static` for `fips` (whose solver has found a support before)."""
    group_size: int = Field(default=4, ge=1)
    """Consecutive blocks of equal width that share a basis."""
    groups: tuple[tuple[int, ...], ...] | None = None
    """Explicit groups of block indices, counted over all blocks found; overrides `group_size`."""
    targets: tuple[str, ...] | None = None
    """Layers to compress instead of those found: names, suffixes, globs, or `re:` patterns."""
    ignore: tuple[str, ...] = ()
    """Layers to leave alone, same syntax."""
    growth_tau: float = Field(default=32.0, gt=0)
    """Rows added when the rank exceeds the width are copies of the first rows divided by this."""
    factor_dtype: FactorDtype | None = None
    """Storage type of bases, floating values and scales. Default: that of the weights, but 16 bits (bfloat16 for
    float32 weights) with `target_bytes`."""
    calibration: CalibrationConfig = CalibrationConfig()
    seed: int = Field(default=0, ge=0)
    """Seed of the order in which calibration batches are drawn."""

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, pattern: str | None) -> str | None:
        if pattern not in (None, "auto"):
            pattern_for(pattern)
        return pattern

    @field_validator("values")
    @classmethod
    def _known_values(cls, values: str | None) -> str | None:
        if values not in (None, "auto"):
            values_named(values)
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.budget is None) == (self.target_bytes is None):
            given = "both" if self.budget is not None else "neither"
            raise ValueError(f"give either `budget` (parameters) or `target_bytes` (stored bytes), got {given}")
        if self.nm is not None:
            self._check_fixed(*self.nm)
        if self.activation_bits is not None and self.value_kind == "float":
            raise ValueError("`activation_bits` goes with integer `values`, got `values: float`")
        self._check_fips() if self.method == "fips" else self._check_other()
        return self

    def _check_fixed(self, n: int, m: int) -> None:
        if self.sparsity is not None and abs(self.sparsity - (1 - n / m)) > 1e-9:
            raise ValueError(
                f"`sparsity` {self.sparsity} contradicts `pattern` {self.pattern!r} (sparsity {1 - n / m:g}); "
                "give only one of them"
            )
        if self.support_schedule == "rigl":
            raise ValueError("`schedule: rigl` needs `pattern: unstructured`; N:M works with `static` and `gmp`")

    def _check_other(self) -> None:
        if self.pattern == "auto" or (self.nm is None and self.format.name != BITMASK):
            raise ValueError(f"`pattern: {self.pattern}` needs `method: fips`, got `{self.method}`")
        if self.sharing != "auto":
            raise ValueError(f"`sharing: {self.sharing}` needs `method: fips`, got `{self.method}`")
        if self.values == "auto" or (self.value_kind != "float" and self.method not in PRUNERS):
            wanted = "`method: fips`" if self.values == "auto" else "`method: fips` or pruning"
            raise ValueError(f"`values: {self.values}` needs {wanted}, got `{self.method}`")
        if self.distill.steps:
            raise ValueError(f"`distill` needs `method: fips`, got `{self.method}`")
        if self.method == "gptq" and self.target_bytes is None:
            raise ValueError("`method: gptq` keeps all parameters in fewer bits: give `target_bytes`, not `budget`")
        if self.method in BASELINES and (self.nm is not None or self.sparsity is not None):
            raise ValueError(
                f"`method: {self.method}` takes neither `pattern` nor `sparsity`; its size follows the bytes"
            )

    def _check_fips(self) -> None:
        if self.sharing == "always" and self.nm is not None:
            raise ValueError(
                "`sharing: always` needs a pattern of free size, got N:M; leave `pattern` or `sharing` out"
            )
        if self.values == "auto" and self.target_bytes is None:
            raise ValueError("`values: auto` weighs bits against bytes: give `target_bytes`, not `budget`")
        if self.schedule == "gmp":
            raise ValueError("`schedule: gmp` starts from dense factors; `method: fips` takes `static` or `rigl`")
        if self.sparsity is not None and self.nm is None:
            raise ValueError(
                "`sparsity` belongs to `method: fips-paper`; `fips` fills the bytes or parameters asked for"
            )
        if self.schedule == "rigl" and self.resolved_pattern not in ("auto", "unstructured"):
            raise ValueError(f"`schedule: rigl` needs `pattern: unstructured`, got {self.pattern!r}")

    @property
    def support_schedule(self) -> Literal["static", "gmp", "rigl"]:
        """``schedule``, or its default for the method."""
        if self.schedule is not None:
            return self.schedule
        return "gmp" if self.method == "fips-paper" else "static"

    @property
    def calibration_steps(self) -> int:
        """``calibration.steps``, or its default for the method."""
        if self.calibration.steps is not None:
            return self.calibration.steps
        return 600 if self.method == "fips-paper" else 0

    @property
    def calibration_rate(self) -> float:
        """``calibration.learning_rate``, or its default for the method."""
        return self.calibration.learning_rate or (4e-4 if self.method == "fips-paper" else 1e-4)

    @property
    def resolved_pattern(self) -> str:
        """``pattern``, or its default for the method and schedule."""
        if self.pattern is not None:
            return self.pattern
        return "auto" if self.method == "fips" and self.schedule != "rigl" else "unstructured"

    @property
    def value_kind(self) -> str:
        """``values``, or its default for the method."""
        if self.values is not None:
            return self.values
        return "auto" if self.method == "fips" and self.target_bytes is not None else "float"

    @property
    def value_choices(self) -> list[Values]:
        """The value formats that a layer may get, fewest bits first."""
        return automatic_values() if self.value_kind == "auto" else [values_named(self.value_kind)]

    @property
    def format(self) -> Pattern:
        """The pattern asked for; any entries where it is to be measured."""
        return pattern_for("unstructured" if self.resolved_pattern == "auto" else self.resolved_pattern)

    @property
    def nm(self) -> tuple[int, int] | None:
        """``(N, M)`` of a pattern that keeps N of every M entries, None of one that leaves it free."""
        kept = self.format.group_kept
        return None if kept is None else (kept, self.format.group)

    @property
    def factor_sparsity(self) -> float:
        """The fraction of zeros the factors of `fips-paper` end with."""
        if self.nm is not None:
            return 1 - self.nm[0] / self.nm[1]
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity


class DataConfig(Settings):
    """Which examples to read, and how many."""

    source: str
    """Image folder, text file, or `datasets` id with an optional configuration, `id:configuration`."""
    split: str | None = None
    """Split of a hub dataset; default: `train` for calibration, `test` or `validation` for evaluation."""
    column: str | None = None
    """Column with the text or the image; default: found by type."""
    num_samples: int | None = Field(default=None, ge=1)
    """Images or text windows to use; null uses all, or 128 windows when calibrating on text."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens per text window; default: the model's context, at most 2,048."""
    document_separator: str | None = None
    """String between the documents of a text; windows then never cross a document."""
    batch_size: int = Field(default=32, ge=1)
    """Examples per batch."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of samples."""


class Recipe(Settings):
    """A complete, named setting: the model it was made for, the compression and the calibration data."""

    description: str = ""
    model: str | None = None
    """Hub id or directory the recipe was made for; a MODEL argument overrides it."""
    architecture: dict[str, Any] | None = None
    """Configuration of that model, so that `--dry-run` can plan without the hub."""
    compression: CompressionConfig
    data: DataConfig | None = None

    @classmethod
    def from_yaml(cls, text: str, *, name: str) -> Recipe:
        """Parse one recipe; ``name`` (a file or recipe name) opens every error message."""
        try:
            fields = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"recipe `{name}` is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(fields, Mapping):
            raise ConfigError(f"recipe `{name}` must be a mapping with `compression`, got {type(fields).__name__}")
        try:
            return cls(**{str(key): value for key, value in fields.items()})
        except ConfigError as error:
            raise ConfigError(f"recipe `{name}`: {error}") from None

    @classmethod
    def load(cls, path: Path) -> Recipe:
        return cls.from_yaml(path.read_text(encoding="utf-8"), name=str(path))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)
