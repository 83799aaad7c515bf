"""What a layer, or layers that share a basis, may become, what that takes, and which of it is worth trying.

A *choice* is a pattern and a width of the values, with or without a shared basis. What a choice can be expected to
leave is known roughly beforehand (see ``expected_error``), so only the promising ones are solved, at a few sizes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fips.errors import BudgetError
from fips.formats.patterns import Pattern, pattern_for
from fips.formats.values import FLOAT, Values, values_named
from fips.solve.alternate import Factorization
from fips.solve.supports import Reduction

__all__ = ["FLOOR", "SIZES", "Choice", "Point", "Pricing", "Structures", "expected_error"]

SIZES = (1.0, 0.6, 1.5)
"""Sizes at which the cheap choice of a group is measured, relative to an equal split."""
PROMISING = 2
"""Choices of free size that are solved."""
FLOOR = 1e-4
"""Smallest error on a curve, relative to its largest: what is kept whole has none."""


class Choice(NamedTuple):
    """Structure of some layers."""

    shared: bool
    """Whether their matrices share a basis of full rank."""
    pattern: str
    """As settings name it: ``unstructured``, ``block4``, ``block8``, N:M."""
    values: str = FLOAT
    """Name of its value format."""

    @property
    def layout(self) -> Pattern:
        """What the pattern means."""
        return pattern_for(self.pattern)

    @property
    def numbers(self) -> Values:
        """What the values mean."""
        return values_named(self.values)

    @property
    def free(self) -> bool:
        """Whether the pattern leaves open how many entries are kept, and with them the size."""
        return self.layout.density is None


class Point(NamedTuple):
    """A choice, the bytes it took and the error it left."""

    choice: Choice
    bytes: float
    loss: float


@dataclass(frozen=True, slots=True)
class Pricing:
    """What the parts of a factorization cost, in bytes (or in numbers, where only numbers count)."""

    value: float
    """One kept floating entry."""
    basis_entry: float
    pattern_bit: float = 1 / 8
    row_scale: float = 0.0
    """One scale per stored row, where values are integers."""
    value_bit: float = 1 / 8
    """One bit of a kept integer."""

    def entry(self, values: Values) -> float:
        """One kept entry."""
        return self.value if values.bits is None else values.bits * self.value_bit


ROUNDING_KEPT, PRUNING_KEPT = 0.3, 0.05
"""Shares of the plain errors that error feedback and refitting left where it was measured (ViT-Tiny). With the shares
that are left on data held out, which are alike, too few pruned sizes were tried (docs/method.md)."""


def expected_error(density: float, values: Values) -> float:
    """Rough error of a matrix, relative to that of no matrix at all: entries normal, the smallest removed."""
    if density >= 1:
        return ROUNDING_KEPT * values.rounding_error
    cut = math.sqrt(2) * _inverse_erf(1 - density)
    removed = (1 - density) - cut * math.sqrt(2 / math.pi) * math.exp(-cut * cut / 2)
    return PRUNING_KEPT * removed + ROUNDING_KEPT * values.rounding_error * (1 - removed)


class Structures(ABC):
    """All choices that the shapes of some layers allow.

    ``shapes`` are (D, F) of every layer, ``reductions`` the axis of every factor along which layers sum and N:M
    patterns run.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], reductions: Sequence[Reduction], pricing: Pricing) -> None:
        self.shapes, self.reductions, self.pricing = tuple(shapes), tuple(reductions), pricing
        self.width = self.shapes[0][0]
        self.hidden = sum(hidden for _, hidden in self.shapes)
        self.least = sum(max(shape) for shape in self.shapes)
        """Entries to keep at least, where that is free: one for every row and column on average."""

    @abstractmethod
    def solve(self, choice: Choice, size: float) -> Factorization:
        """The best factorization of a structure within ``size`` bytes. Raises ``BudgetError`` if it cannot fit."""

    @abstractmethod
    def trials(self, choices: Sequence[Choice], size: float) -> list[Point]:
        """Errors of the promising choices around an equal share of ``size`` bytes."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what is kept of solved factorizations."""

    def overhead(self, choice: Choice) -> float:
        """Bytes besides values and patterns: basis, scales and what whole bytes round up."""
        numbers = choice.numbers
        scales = sum(
            numbers.scale_bytes(shape[1 - axis], shape[axis], self.pricing.row_scale)
            for shape, axis in zip(self.shapes, self.reductions, strict=True)
            if self.pricing.row_scale  # else numbers are counted, of which scales are none
        )
        ends = len(self.shapes) if self.pricing.pattern_bit and (numbers.bits or 0) % 8 else 0
        return ends + scales + choice.shared * self.width**2 * self.pricing.basis_entry

    def fixed_bytes(self, choice: Choice) -> float | None:
        """The size of a choice whose pattern decides it; None for the others."""
        pattern = choice.layout
        if pattern.group_kept is None:
            return None
        numbers = pattern.group_kept * self.pricing.entry(choice.numbers)
        entry = (numbers + pattern.group_bits * self.pricing.pattern_bit) / pattern.group
        return self.overhead(choice) + self.width * self.hidden * entry

    def least_bytes(self, choice: Choice) -> float:
        """The smallest size of a choice whose size is free: ``least`` entries with their pattern."""
        block = choice.layout.block
        kept = -(-self.least // block) * block
        pattern = self._pattern_bytes(choice)
        return self.overhead(choice) + pattern + kept * self.pricing.entry(choice.numbers)

    def _pattern_bytes(self, choice: Choice) -> float:
        """Of all factors, of a choice whose size is free."""
        return self.width * self.hidden * self.pricing.pattern_bit * choice.layout.group_bits / choice.layout.group

    def dense_bytes(self, choice: Choice) -> float:
        """The most a choice can take: all factors whole, without patterns."""
        return self.overhead(choice) + self.width * self.hidden * self.pricing.entry(choice.numbers)

    def expected(self, choice: Choice, size: float) -> float:
        """``expected_error`` of a choice at a size; infinite where it does not fit."""
        fixed = self.fixed_bytes(choice)
        density = choice.layout.density
        if density is not None and fixed is not None:
            return expected_error(density, choice.numbers) if size >= fixed else math.inf
        if self._keeps_all(choice, size):
            return expected_error(1.0, choice.numbers)
        if size < self.least_bytes(choice) * (1 - 1e-9):
            return math.inf
        entries = self.width * self.hidden
        left = size - self.overhead(choice) - self._pattern_bytes(choice)
        density = left / (entries * self.pricing.entry(choice.numbers))
        return expected_error(min(density, 1.0), choice.numbers) if density > 0 else math.inf

    def wanted(self, choices: Sequence[Choice], size: float) -> list[tuple[Choice, float]]:
        """Choices and sizes worth trying around an equal share.

        Of the choices whose size is free the ``PROMISING`` best are tried at a few sizes; sizes that a choice fixes,
        of N:M and of whole factors, where they lie around the share and promise as much.
        """
        free = [choice for choice in choices if choice.free]
        free = sorted(free, key=lambda choice: self.expected(choice, size))[:PROMISING]
        wanted = {(choice, min(factor * size, self.dense_bytes(choice))) for choice in free for factor in SIZES}
        for choice in choices:
            fixed = self.dense_bytes(choice) if choice.free else self.fixed_bytes(choice)
            assert fixed is not None
            known = min((self.expected(other, fixed) for other in free), default=math.inf)
            near = min(SIZES) <= fixed / size <= 2 * max(SIZES) and self.expected(choice, fixed) <= 1.2 * known
            if near or not free:
                wanted.add((choice, fixed))
        return sorted(wanted)

    def require_fit(self, choice: Choice, size: float) -> None:
        """Raise ``BudgetError`` if a choice of free size does not fit into a size."""
        if choice.free and not self._keeps_all(choice, size) and size < self.least_bytes(choice) * (1 - 1e-9):
            raise BudgetError(
                f"{size:.0f} bytes leave less than one entry for every row and column beside patterns and scales; ask "
                f"for {self.least_bytes(choice):.0f} or more"
            )

    def _keeps_all(self, choice: Choice, size: float) -> bool:
        return choice.free and size >= self.dense_bytes(choice) * (1 - 1e-9)


def _inverse_erf(value: float) -> float:
    return float(torch.erfinv(torch.tensor(value, dtype=torch.float64)))
