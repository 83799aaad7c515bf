"""Which structure a group gets for its bytes, and how many bytes every group gets: both by measured errors.

A *choice* is a pattern with or without a shared basis. Each is solved at a few sizes; between them the logarithm of
the error is taken as linear in the bytes. Errors of all groups are in one unit (see ``fips.solve.problems``), so the
best split of the bytes is where one more byte is worth the same everywhere.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from fips.errors import BudgetError
from fips.solve.alternate import Factorization, alternate, prune
from fips.solve.problems import LayerProblem
from fips.solve.supports import ByteBudget, FixedPattern, Reduction, SupportRule
from fips.solve.svd import shared_svd

__all__ = ["Choice", "GroupSearch", "Point", "Pricing", "allocate"]

SIZES = (1.0, 0.6, 1.5)
"""Sizes at which the cheap choice of a group is measured, relative to an equal split."""
STEPS = 200
WORTH_SHARING = 0.85
"""Error of a shared basis relative to pruning, at equal bytes, below which it is taken: a basis adapts to the
calibration data more than a support does, and promises of less than this were not kept on other data."""
ROUNDS, TRIAL_ROUNDS = 6, 2
LATE_GAIN = 1.1
"""Rounds 3 to 6 have lowered the error by 5 to 8 % where it was measured; more is not expected of them."""
FLOOR = 1e-4
"""Smallest error on a curve, relative to its largest: what is kept whole has none."""


class Choice(NamedTuple):
    """Structure of a group."""

    shared: bool
    """Whether its matrices share a basis of full rank."""
    pattern: str
    """``unstructured``, ``block4``, ``block8`` or N:M."""

    @property
    def nm(self) -> tuple[int, int] | None:
        """``(N, M)`` of an N:M pattern, whose size is fixed; None of the others."""
        n, colon, m = self.pattern.partition(":")
        return (int(n), int(m)) if colon else None

    @property
    def block(self) -> int:
        """Neighbours under one bit of the pattern."""
        return int(self.pattern.removeprefix("block")) if self.pattern.startswith("block") else 1


class Point(NamedTuple):
    """A choice, the bytes it took and the error it left."""

    choice: Choice
    bytes: float
    loss: float


@dataclass(frozen=True, slots=True)
class Pricing:
    """What the parts of a factorization cost, in bytes (or in numbers, where only numbers count)."""

    value: float
    """One kept entry."""
    basis_entry: float
    pattern_bit: float = 1 / 8
    row_scale: float = 0.0
    """One scale per stored row, where values are int8."""


class GroupSearch:
    """The problems of one group under all choices that its shapes allow.

    ``reductions`` is the axis of every factor along which N:M patterns run; ``code_bits`` the bits of an N:M pattern
    per M entries, by pattern.
    """

    def __init__(
        self,
        problems: Sequence[LayerProblem],
        reductions: Sequence[Reduction],
        pricing: Pricing,
        code_bits: Mapping[str, int],
    ) -> None:
        self.problems, self.reductions, self.pricing = problems, tuple(reductions), pricing
        self.code_bits = code_bits
        self.width = problems[0].weight_DF.shape[0]
        self.columns = sum(problem.weight_DF.shape[1] for problem in problems)
        self._solved: dict[tuple[Choice, float, int], Factorization] = {}

    def overhead(self, choice: Choice) -> float:
        """Bytes besides values and patterns: basis and scales."""
        rows = sum(
            problem.weight_DF.shape[1] if axis == 0 else self.width
            for problem, axis in zip(self.problems, self.reductions, strict=True)
        )
        return self.pricing.row_scale * rows + choice.shared * self.width**2 * self.pricing.basis_entry

    def fixed_bytes(self, choice: Choice) -> float | None:
        """The size of an N:M choice, which its pattern decides; None for the others."""
        if choice.nm is None:
            return None
        n, m = choice.nm
        entry = (n * self.pricing.value + self.code_bits[choice.pattern] * self.pricing.pattern_bit) / m
        return self.overhead(choice) + self.width * self.columns * entry

    def _dense_bytes(self, choice: Choice) -> float:
        """The most a choice can take: all factors whole, without patterns."""
        return self.overhead(choice) + self.width * self.columns * self.pricing.value

    def solve(self, choice: Choice, size: float, *, rounds: int = ROUNDS) -> Factorization:
        """The best factorization of a structure within ``size`` bytes. Raises ``BudgetError`` if it cannot fit."""
        key = (choice, size, rounds if choice.shared else 0)
        if key not in self._solved:
            rule = self._rule(choice, size - self.overhead(choice))
            found = prune(self.problems, rule)
            if choice.shared:
                weights_DF = [problem.weight_DF for problem in self.problems]
                basis_DR, _ = shared_svd(weights_DF, rank=self.width)
                found = alternate(self.problems, basis_DR, rule, max_rounds=rounds)
            self._solved[key] = found
        return self._solved[key]

    def forget(self) -> None:
        """Drop solved factorizations; the problems stay."""
        self._solved.clear()

    def trials(self, choices: Sequence[Choice], size: float) -> list[Point]:
        """Errors of the choices around an equal share of ``size`` bytes.

        A shared basis is solved at that size alone, and counts only where it leaves clearly less error than pruning;
        its curve is then that of pruning, scaled to go through this point.
        """
        points: list[Point] = []
        for choice in sorted(choices):
            if choice.shared and any(not point.choice.shared for point in points):
                points += self._shared_trials(choice, size, points)
                continue
            fixed = self.fixed_bytes(choice)
            if fixed is not None and len(choices) > 1 and not min(SIZES) <= fixed / size <= max(SIZES):
                continue
            sizes = [fixed] if fixed is not None else [factor * size for factor in SIZES]
            for bytes_ in sizes:
                try:
                    loss = self.solve(choice, bytes_).losses[-1]
                except BudgetError:
                    continue
                points.append(Point(choice, min(bytes_, self._dense_bytes(choice)), loss))
        return points

    def _shared_trials(self, choice: Choice, size: float, points: Sequence[Point]) -> list[Point]:
        pruned = [point for point in points if point.choice == Choice(False, choice.pattern)]
        known = _on_curve(pruned, size) if pruned else 0.0
        if known <= FLOOR * max((point.loss for point in pruned), default=0.0):
            return []  # pruning leaves nothing to gain
        try:
            if self.solve(choice, size, rounds=TRIAL_ROUNDS).losses[-1] > LATE_GAIN * known:
                return []
            ratio = self.solve(choice, size).losses[-1] / known
        except BudgetError:
            return []
        return [Point(choice, point.bytes, ratio * point.loss) for point in pruned] if ratio < WORTH_SHARING else []

    def _rule(self, choice: Choice, left: float) -> SupportRule:
        if choice.nm is not None:
            return FixedPattern(*choice.nm, self.reductions)
        return ByteBudget(left, self.pricing.value, self.pricing.pattern_bit, choice.block)


def allocate(trials: Sequence[Sequence[Point]], total: float) -> list[tuple[Choice, float]]:
    """A choice and its bytes for every group, so that the sum of errors is least within ``total`` bytes.

    Greedy on the lower convex hull of every group's measured curve, which is optimal for convex curves. Where N:M
    patterns, whose sizes are fixed, leave bytes unused, the best split without them is taken if it promises less
    error. Raises ``BudgetError`` if even the smallest choices do not fit.
    """
    free = [[point for point in points if point.choice.nm is None] for points in trials]
    splits = [_split(trials, total)]
    if all(free) and any(choice.nm is not None for choice, _ in splits[0]):
        with suppress(BudgetError):
            splits.append(_split(free, total))
    return min(splits, key=lambda split: _promise(trials, split))


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


def _split(trials: Sequence[Sequence[Point]], total: float) -> list[tuple[Choice, float]]:
    hulls = [_hull(points) for points in trials]
    spent = sum(hull[0].bytes for hull in hulls)
    if spent > total * (1 + 1e-9):
        raise BudgetError(
            f"the smallest structures tried take {spent:.0f} bytes, {total:.0f} are allowed; ask for more bytes or for "
            "a pattern with fewer non-zeros"
        )
    position = [0] * len(hulls)
    queue = [(_slope(hull, 0), index) for index, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, index = heapq.heappop(queue)
        hull, at = hulls[index], position[index]
        step = hull[at + 1].bytes - hull[at].bytes
        if spent + step > total * (1 + 1e-9):
            continue
        spent += step
        position[index] += 1
        if at + 2 < len(hull):
            heapq.heappush(queue, (_slope(hull, at + 1), index))
    ends = [hull[at] for hull, at in zip(hulls, position, strict=True)]
    open_ends = [index for index, end in enumerate(ends) if end.choice.nm is None]
    spare = max(total - spent, 0.0) / max(len(open_ends), 1)
    return [(end.choice, end.bytes + (spare if index in open_ends else 0.0)) for index, end in enumerate(ends)]


def _slope(hull: Sequence[Point], at: int) -> float:
    return (hull[at + 1].loss - hull[at].loss) / (hull[at + 1].bytes - hull[at].bytes)


def _hull(points: Sequence[Point]) -> list[Point]:
    """Lower convex hull of all choices' curves, finely sampled."""
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
