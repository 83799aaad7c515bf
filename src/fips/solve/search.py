"""Which structure some layers get for their bytes, and how many bytes each gets: both by measured errors.

A *choice* is a pattern and a width of the values, with or without a shared basis. What a choice can be expected to
leave is known roughly beforehand (see ``expected_error``), so only the promising ones are solved, at a few sizes;
between them the logarithm of the error is taken as linear in the bytes. Errors of all layers are in one unit (see
``fips.solve.problems``), so the best split of the bytes is where one more byte is worth the same everywhere.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from fips.errors import BudgetError
from fips.formats.patterns import Pattern, pattern_for
from fips.formats.values import FLOAT, Values, values_named
from fips.solve.alternate import Factorization, alternate, keep_all, prune, rounded
from fips.solve.problems import LayerProblem
from fips.solve.supports import ByteBudget, FixedPattern, Reduction, SupportRule
from fips.solve.svd import shared_svd

__all__ = ["Choice", "GroupSearch", "Point", "Pricing", "allocate", "expected_error", "expected_total"]

SIZES = (1.0, 0.6, 1.5)
"""Sizes at which the cheap choice of a group is measured, relative to an equal split."""
STEPS = 200
SAMPLE = 1024
"""Stored rows of a layer that stand for all of them when choices are tried. Rows make up for each other's errors where
their metric lets them, few rows less so: a choice that prunes then looks worse than it is beside one that only rounds.
256 of 768 cost nothing where it was measured, 96 of 768 and of 192 5 % of the error (ViT-Tiny)."""
COLUMNS = 8
"""Columns per basis vector, at least, where some columns stand for all of them: a basis fits fewer too well."""
PROMISING = 2
"""Choices of free size that are solved."""
WORTH_SHARING = 0.85
"""Error of a shared basis relative to pruning, at equal bytes, below which it is taken: a basis adapts to the
calibration data more than a support does, and promises of less than this were not kept on other data."""
ROUNDS, TRIAL_ROUNDS = 6, 2
LATE_GAIN = 1.1
"""Rounds 3 to 6 have lowered the error by 5 to 8 % where it was measured; more is not expected of them."""
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
"""Shares of the plain errors that error feedback and refitting left where it was measured (ViT-Tiny)."""


def expected_error(density: float, values: Values) -> float:
    """Rough error of a matrix, relative to that of no matrix at all: entries normal, the smallest removed."""
    if density >= 1:
        return ROUNDING_KEPT * values.rounding_error
    cut = math.sqrt(2) * _inverse_erf(1 - density)
    removed = (1 - density) - cut * math.sqrt(2 / math.pi) * math.exp(-cut * cut / 2)
    return PRUNING_KEPT * removed + ROUNDING_KEPT * values.rounding_error * (1 - removed)


class GroupSearch:
    """The problems of some layers, solved together, under all choices that their shapes allow.

    ``reductions`` is the axis of every factor along which layers sum and N:M patterns run; ``dtype`` the type that
    steps of integers are stored in.
    """

    def __init__(
        self,
        problems: Sequence[LayerProblem],
        reductions: Sequence[Reduction],
        pricing: Pricing,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.problems, self.reductions, self.pricing = problems, tuple(reductions), pricing
        self.dtype = dtype
        self.width = problems[0].weight_DF.shape[0]
        self.hidden = sum(problem.weight_DF.shape[1] for problem in problems)
        self.least = sum(max(problem.weight_DF.shape) for problem in problems)
        """Entries to keep at least, where that is free: one for every row and column on average."""
        self._solved: dict[tuple[Choice, float, int], Factorization] = {}

    def overhead(self, choice: Choice) -> float:
        """Bytes besides values and patterns: basis, scales and what whole bytes round up."""
        numbers = choice.numbers
        scales = sum(
            numbers.num_scales(problem.weight_DF.shape[1 - axis], problem.weight_DF.shape[axis])
            for problem, axis in zip(self.problems, self.reductions, strict=True)
        )
        ends = len(self.problems) if self.pricing.pattern_bit and (numbers.bits or 0) % 8 else 0
        return ends + self.pricing.row_scale * scales + choice.shared * self.width**2 * self.pricing.basis_entry

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

    def solve(self, choice: Choice, size: float, *, rounds: int = ROUNDS) -> Factorization:
        """The best factorization of a structure within ``size`` bytes. Raises ``BudgetError`` if it cannot fit."""
        size = min(size, self.dense_bytes(choice))
        key = (choice, size, rounds if choice.shared else 0)
        if key not in self._solved:
            found = self._solve(choice, size, rounds)
            if choice.numbers.scaled:
                found = rounded(self.problems, found, self.reductions, values=choice.numbers, dtype=self.dtype)
            self._solved[key] = found
        return self._solved[key]

    def _solve(self, choice: Choice, size: float, rounds: int) -> Factorization:
        if choice.free and not self._keeps_all(choice, size) and size < self.least_bytes(choice) * (1 - 1e-9):
            raise BudgetError(
                f"{size:.0f} bytes leave less than one entry for every row and column beside patterns and scales; ask "
                f"for {self.least_bytes(choice):.0f} or more"
            )
        rule = self._rule(choice, size - self.overhead(choice))
        if choice.shared:
            basis_DR, _ = shared_svd([problem.weight_DF for problem in self.problems], rank=self.width)
            return alternate(self.problems, basis_DR, rule, max_rounds=rounds)
        if self._keeps_all(choice, size):
            return keep_all(self.problems)
        return prune(self.problems, rule)

    def forget(self) -> None:
        """Drop solved factorizations; the problems stay."""
        self._solved.clear()

    def trials(self, choices: Sequence[Choice], size: float) -> list[Point]:
        """Errors of the promising choices around an equal share of ``size`` bytes.

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
        rows = [problem.weight_DF.shape[1 - axis] for problem, axis in zip(self.problems, self.reductions, strict=True)]
        if len(rows) > 1 or rows[0] <= SAMPLE or any(choice.layout.block > 1 for choice in choices):
            return self._measured(sorted(wanted))
        return self._estimated(sorted(wanted))

    def _measured(self, sizes: Sequence[tuple[Choice, float]]) -> list[Point]:
        points: list[Point] = []
        for choice, bytes_ in sizes:
            with suppress(BudgetError):
                loss = self.solve(choice, bytes_).losses[-1]
                if math.isfinite(loss):
                    points.append(Point(choice, bytes_, loss))
        return points

    def _estimated(self, sizes: Sequence[tuple[Choice, float]]) -> list[Point]:
        """Points of a single layer, from the errors of ``SAMPLE`` of its stored rows."""
        (problem,), (axis,) = self.problems, self.reductions
        part, share = problem.sample(axis, SAMPLE)
        small = GroupSearch([part], [axis], self.pricing, self.dtype)
        small.least = 0  # the whole layer decides what fits
        sizes = [(choice, bytes_) for choice, bytes_ in sizes if self.expected(choice, bytes_) < math.inf]
        rows = SAMPLE / problem.weight_DF.shape[1 - axis]
        points: list[Point] = []
        for choice, bytes_ in sizes:
            less = small.overhead(choice) + rows * (bytes_ - self.overhead(choice))
            points += [Point(choice, bytes_, point.loss / share) for point in small._measured([(choice, less)])]
        return points

    def _keeps_all(self, choice: Choice, size: float) -> bool:
        return choice.free and size >= self.dense_bytes(choice) * (1 - 1e-9)

    def _some_columns(self) -> tuple[GroupSearch, float]:
        """The search of some columns of every layer, a basis entry priced by their share, and this share."""
        share = max(
            SAMPLE / min(problem.weight_DF.shape[1] for problem in self.problems), COLUMNS * self.width / self.hidden
        )
        if share >= 1:
            return self, 1.0
        problems = [problem.sample(0, round(share * problem.weight_DF.shape[1]))[0] for problem in self.problems]
        pricing = replace(self.pricing, basis_entry=share * self.pricing.basis_entry)
        small = GroupSearch(problems, self.reductions, pricing, self.dtype)
        small.least = 0
        return small, small.hidden / self.hidden

    def sharing_ratio(self, choice: Choice, size: float, known: float) -> float:
        """Error of a shared basis at a size relative to ``known``, that of pruning in the same bytes; infinite where
        pruning leaves nothing to gain, where the first rounds promise no less error, or where nothing fits."""
        zero = sum(problem.loss(None, torch.zeros_like(problem.weight_DF)) for problem in self.problems)
        if known <= FLOOR * zero:
            return math.inf
        small, share = self._some_columns()
        try:
            if small is not self and small.first_ratio(choice, share * size) > LATE_GAIN:
                return math.inf
            if self.solve(choice, size, rounds=TRIAL_ROUNDS).losses[-1] > LATE_GAIN * known:
                return math.inf
            return self.solve(choice, size).losses[-1] / known
        except BudgetError:
            return math.inf

    def first_ratio(self, choice: Choice, size: float) -> float:
        """Error of a shared basis after the first rounds, relative to that of pruning with values of the same width."""
        pruned = self.solve(choice._replace(shared=False), size).losses[-1]
        return self.solve(choice, size, rounds=TRIAL_ROUNDS).losses[-1] / pruned if pruned > 0 else math.inf

    def _rule(self, choice: Choice, left: float) -> SupportRule:
        if not choice.free:
            return FixedPattern(choice.layout, self.reductions)
        return ByteBudget(left, self.pricing.entry(choice.numbers), self.pricing.pattern_bit, choice.layout)


def expected_total(trials: Sequence[Sequence[Point]], size: float) -> float:
    """The error that curves of several units promise for the best split of some bytes; infinite if nothing fits."""
    try:
        return _promise(trials, allocate(trials, size))
    except BudgetError:
        return math.inf


def allocate(trials: Sequence[Sequence[Point]], total: float) -> list[tuple[Choice, float]]:
    """A choice and its bytes for every unit, so that the sum of errors is least within ``total`` bytes.

    Greedy on the lower convex hull of every unit's measured curve, which is optimal for convex curves; what is left
    then, because sizes are fixed or steps large, goes step by step to where it helps most, and in the end to those
    whose size is free. Raises ``BudgetError`` if even the smallest choices do not fit.
    """
    curves = [_sampled(points) for points in trials]
    hulls = [_hull(curve) for curve in curves]
    spent = sum(hull[0].bytes for hull in hulls)
    limit = total * (1 + 1e-9)
    if spent > limit:
        raise BudgetError(
            f"the smallest structures tried take {spent:.0f} bytes, {total:.0f} are allowed; ask for more bytes or for "
            "a pattern that keeps fewer entries"
        )
    ends = [hull[0] for hull in hulls]
    queue = [(_slope(hull, 0), index, 0) for index, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, index, at = heapq.heappop(queue)
        hull = hulls[index]
        step = hull[at + 1].bytes - hull[at].bytes
        if spent + step > limit:
            continue
        spent += step
        ends[index] = hull[at + 1]
        if at + 2 < len(hull):
            heapq.heappush(queue, (_slope(hull, at + 1), index, at + 1))
    spent = _spend_rest(curves, ends, spent, limit)
    return _with_spare(trials, ends, max(total - spent, 0.0))


def _spend_rest(curves: Sequence[Sequence[Point]], ends: list[Point], spent: float, limit: float) -> float:
    """Move single units to the points that lower the error most within what is left; returns what is spent then."""
    while True:
        gains = [
            (end.loss - point.loss, index, point)
            for index, (curve, end) in enumerate(zip(curves, ends, strict=True))
            for point in curve
            if point.loss < end.loss and point.bytes <= end.bytes + limit - spent
        ]
        if not gains:
            return spent
        _, index, point = max(gains, key=lambda gain: gain[0])
        spent += point.bytes - ends[index].bytes
        ends[index] = point


def _with_spare(trials: Sequence[Sequence[Point]], ends: Sequence[Point], spare: float) -> list[tuple[Choice, float]]:
    """The bytes left go in equal parts to the units whose size is free: their curves may end before."""
    free = [
        index
        for index, (points, end) in enumerate(zip(trials, ends, strict=True))
        if end.choice.free and any(point.choice == end.choice and point.bytes > end.bytes for point in points)
    ] or [index for index, end in enumerate(ends) if end.choice.free]
    part = spare / max(len(free), 1)
    return [(end.choice, end.bytes + (part if index in free else 0.0)) for index, end in enumerate(ends)]


def _promise(trials: Sequence[Sequence[Point]], split: Sequence[tuple[Choice, float]]) -> float:
    """The error that the measured curves promise for a split."""
    return sum(
        _on_curve([point for point in points if point.choice == choice], size)
        for points, (choice, size) in zip(trials, split, strict=True)
    )


def _on_curve(points: Sequence[Point], size: float) -> float:
    curve = sorted(points, key=lambda point: point.bytes)
    for left, right in itertools.pairwise(curve):
        if left.bytes <= size <= right.bytes and left.bytes < right.bytes:
            return _between(left, right, size, FLOOR * curve[0].loss)
    return curve[0].loss if size <= curve[0].bytes else curve[-1].loss


def _slope(hull: Sequence[Point], at: int) -> float:
    return (hull[at + 1].loss - hull[at].loss) / (hull[at + 1].bytes - hull[at].bytes)


def _sampled(points: Sequence[Point]) -> list[Point]:
    """All choices' curves, finely sampled."""
    sampled = [*points]
    for _, group in itertools.groupby(sorted(points), key=lambda point: point.choice):
        curve = sorted(group, key=lambda point: point.bytes)
        floor = FLOOR * curve[0].loss
        for left, right in itertools.pairwise(curve):
            if left.bytes == right.bytes:
                continue
            for step in range(1, STEPS):
                size = left.bytes + (right.bytes - left.bytes) * step / STEPS
                sampled.append(Point(left.choice, size, _between(left, right, size, floor)))
    return sampled


def _hull(sampled: Sequence[Point]) -> list[Point]:
    """Lower convex hull."""
    hull: list[Point] = []
    for point in sorted(sampled, key=lambda point: (point.bytes, point.loss)):
        if hull and point.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope([hull[-2], hull[-1]], 0) >= _slope([hull[-1], point], 0):
            hull.pop()
        hull.append(point)
    return hull


def _between(left: Point, right: Point, size: float, floor: float) -> float:
    share = (size - left.bytes) / (right.bytes - left.bytes)
    ends = (math.log(max(point.loss, floor, 1e-30)) for point in (left, right))
    return math.exp(sum(weight * end for weight, end in zip((1 - share, share), ends, strict=True)))


def _inverse_erf(value: float) -> float:
    return float(torch.erfinv(torch.tensor(value, dtype=torch.float64)))
