"""What may be asked of the default method."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from fips.config import InputMetricConfig, SparseConfig
from fips.formats.patterns import Pattern, pattern_for
from fips.formats.values import FLOAT, Values, automatic_values, values_named
from fips.solve.coded import searches_fast
from fips.training.distill import DistillConfig

__all__ = ["FipsConfig", "MetricConfig"]

LEAST_ROTATED_BITS = 2.5
"""Stored bits of a weight from which columns are turned and all entries kept where values are not coded together: at
2.6 that left 0.88 of the KL of the best mixture with pruning (ViT-Tiny); fewer were not compared."""

SWEEPS = 2
"""Over the columns of a matrix after it was rounded. The first takes 8 % off its error, the second 3, a third 1."""


class MetricConfig(InputMetricConfig):
    """What an error costs: the second-order change of the model's output."""

    temperature: float = Field(default=2.0, gt=0)
    """Temperature of the softmax whose change counts; 1 is the KL divergence, large values treat logits alike."""
    token_floor: float = Field(default=0.4, ge=0, le=1)
    """Share of the weight that all tokens get alike; the rest goes by what a token does to the output."""
    gradient_examples: int = Field(default=32, ge=1)
    """Examples whose gradients say how much layers and their outputs count beside each other (`max` asks all)."""
    propagate_errors: bool = False
    """Measure every group behind the compressed groups before it instead of behind the original ones; then the effort
    is `max`. On ViT-Tiny it did not help."""


class FipsConfig(SparseConfig):
    """What each group may become, the metric, and training afterwards; structure and sparsity follow from the size."""

    packs_ends: ClassVar[bool] = True
    method: Literal["fips"] = "fips"
    effort: Literal["fast", "default", "max"] = "default"
    """How much time to take. `fast` and `default` prune and round every layer once, with error feedback; `fast` decides
    on structures before it has measured inputs and keeps all entries where it may, `default` after it has tried some
    rows. `max` weighs the gradients of all tokens, lets layers share a basis where that measures better, and solves
    every choice that it tries."""
    sharing: Literal["auto", "always", "never"] = "auto"
    """Whether the matrices of a group share a basis: as measured per group, always, or never (plain pruning)."""
    values: str | None = None
    """Type of the factor values: floating, integers of 2 to 8 bits (`int4`), levels of 2 to 5 (`nl4`) or codes of 2 to
    4 for the entries of a column together (`tc4`) with a scale per row, or beside it one per group of weights
    (`nl4g64`), or `auto`, 2 to 8 bits as measured per layer. Default: `auto` with `bits`, else float."""
    pattern: str = "auto"
    """`unstructured`; `N:M`, N entries kept of every M consecutive ones along the reduction; `block4` or `block8`, one
    mask bit for that many neighbouring hidden neurons, which are reordered for it; `auto`, unstructured or N:16 as
    measured per group."""
    schedule: Literal["static", "gmp", "rigl"] = "static"
    """Whether the support that was found stays (`static`) or changes while training (`rigl`)."""
    rotate: bool = True
    """Whether layers that keep all entries on a grid are stored in turned columns (``fips.formats.rotation``), and may
    have values that are coded together (``fips.formats.trellis``): `fast` and `default`, with `pattern: auto`, from 2.5
    bits on, or 2 where they are coded."""
    metric: MetricConfig = MetricConfig()
    distill: DistillConfig = DistillConfig()

    def check(self) -> None:
        super().check()
        if self.sharing == "always" and self.nm is not None:
            raise ValueError(
                "`sharing: always` needs a pattern of free size, got N:M; leave `pattern` or `sharing` out"
            )
        if self.values == "auto" and self.budget is not None:
            raise ValueError("`values: auto` weighs bits against bytes: give `bits`, not `budget`")
        if self.values not in (None, "auto") and values_named(self.values).memory and not self._may_code:
            raise ValueError(
                f"`values: {self.values}` codes all entries of a column together, as they are solved in one pass: it "
                "goes with `bits`, `effort: fast` or `default` and `pattern: auto`, not with a shared basis, `rigl` or "
                "`rotate: false`; take another format, such as `nl4`, or leave `values` out"
            )
        if self.schedule == "gmp":
            raise ValueError("`schedule: gmp` starts from dense factors; `method: fips` takes `static` or `rigl`")
        if self.schedule == "rigl" and self.pattern not in ("auto", "unstructured"):
            raise ValueError(f"`schedule: rigl` needs `pattern: unstructured`, got {self.pattern!r}")
        if self.layers == "all":
            self._check_ends()

    def _check_ends(self) -> None:
        """Embedding and head are rounded once, all their entries kept."""
        if not self.one_shot or self.reconstruction.steps or self.distill.steps:
            raise ValueError(
                "`layers: all` goes with `effort: default` or `fast`, without sharing, `propagate_errors` and "
                "training; leave those out or take `layers: blocks`"
            )
        if not self.has_integers:
            raise ValueError(f"`layers: all` stores embedding and head in few bits, got `values: {self.values}`")
        if self.pattern not in ("auto", "unstructured"):
            raise ValueError(f"`layers: all` keeps all entries of embedding and head, got `pattern: {self.pattern}`")

    @field_validator("values")
    @classmethod
    def _known_values(cls, values: str | None) -> str | None:
        return values if values in (None, "auto") else values_named(values).name

    @property
    def has_integers(self) -> bool:
        return self.value_choices[0].scaled

    @property
    def value_choices(self) -> list[Values]:
        """The value formats that a layer may get, fewest bits first; by default `auto` where bytes are counted."""
        return self._choices(coded=False)

    @property
    def whole_choices(self) -> list[Values]:
        """Those of a layer that keeps all entries: then they may be coded together, where the search for the codes is
        there in compiled code."""
        return self._choices(coded=self._may_code and searches_fast())

    @property
    def misses_codes(self) -> bool:
        """Whether values would be coded together if the search for the codes were there in compiled code."""
        wanted, there = self._choices(coded=self._may_code), self.whole_choices
        return any(one.memory for one in wanted) and not any(one.memory for one in there)

    def _choices(self, *, coded: bool) -> list[Values]:
        found = self.values or ("auto" if self.budget is None else FLOAT)
        return automatic_values(coded=coded) if found == "auto" else [values_named(found)]

    @property
    def _may_code(self) -> bool:
        return self.rotate and self._keeps_all and self.bits is not None

    @property
    def moment_copies(self) -> int:
        """Moments of a group and the problems made of them; where sharing is judged the same of half the data, too."""
        return 4 if not self.one_shot and self.sharing == "auto" else 2

    @property
    def one_shot(self) -> bool:
        """Whether layers are solved in one pass each, from moments of inputs."""
        return self.effort != "max" and self.sharing != "always" and not self.metric.propagate_errors

    @property
    def sweeps(self) -> int:
        """Sweeps over every matrix after it was rounded."""
        return SWEEPS if self.one_shot and self.effort == "default" else 0

    @property
    def rotated(self) -> bool:
        """Whether layers are stored in turned columns. Few entries of those are small: nothing is pruned then."""
        least = 0 if self.whole_choices[0].memory else LEAST_ROTATED_BITS
        return self.rotate and self._keeps_all and self.has_integers and (self.bits or 0) >= least

    @property
    def _keeps_all(self) -> bool:
        """Whether nothing is pruned where there is room for all entries."""
        return self.one_shot and self.pattern == "auto" and self.schedule == "static"

    @property
    def resolved_pattern(self) -> str:
        """``pattern``, where supports that change need a free one."""
        return "unstructured" if self.schedule == "rigl" else self.pattern

    @property
    def format(self) -> Pattern:
        return pattern_for("unstructured" if self.resolved_pattern == "auto" else self.resolved_pattern)
