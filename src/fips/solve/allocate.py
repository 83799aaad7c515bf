"""How many bytes every unit gets, and in which structure, by measured errors.

Between the sizes that were tried the logarithm of the error is taken as linear in the bytes. Errors of all layers are
in one unit (see ``fips.solve.problems``), so the best split of the bytes is where one more byte is worth the same
everywhere.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Collection, Sequence

from fips.errors import BudgetError
from fips.solve.structures import FLOOR, Choice, Point

__all__ = ["allocate", "expected_total", "tempered"]

STEPS = 200
"""Sizes between two that were tried."""
TRUST = 0.5
"""How far the level of a layer's errors beside those of other layers is believed. Of 1, 0.5, 0.25 and 0, at 3.2 to 4.8
bits, 0.5 and 0.25 were best on ViT-Tiny (1 lost 9 %) and on the demo's model (1 lost 40 %)."""


def expected_total(trials: Sequence[Sequence[Point]], size: float) -> float:
    """The error that curves of several units promise for the best split of some bytes; infinite if nothing fits."""
    try:
        return _promise(trials, allocate(trials, size))
    except BudgetError:
        return math.inf


def tempered(trials: Sequence[Sequence[Point]], believed: Collection[int] = ()) -> list[list[Point]]:
    r"""Curves whose levels differ less: errors times :math:`m^{\tau - 1}`, m their geometric mean at full density.

    Gradients of a few examples in the original model say how much layers count beside each other only roughly, and a
    split that believes them takes bits away where they were underestimated. Curves that are ``believed``, by their
    place, keep their level beside the mean level of the others: for these m is the geometric mean of all of those.
    """
    levels = [_level(points) for points in trials]
    others = [level for place, level in enumerate(levels) if place not in believed] or levels
    middle = sum(others) / max(len(others), 1)
    factors = [math.exp((TRUST - 1) * (middle if place in believed else level)) for place, level in enumerate(levels)]
    return [
        [point._replace(loss=point.loss * factor) for point in points]
        for points, factor in zip(trials, factors, strict=True)
    ]


def _level(points: Sequence[Point]) -> float:
    """Logarithm of the geometric mean of a curve's errors at full density."""
    ends = {point.choice: point for point in sorted(points, key=lambda point: point.bytes) if point.choice.free}
    known = [point.loss for point in (ends.values() or points) if point.loss > 0]
    return sum(map(math.log, known)) / max(len(known), 1)


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
