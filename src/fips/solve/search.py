"""The solver in the metric of both sides of a layer, with or without a basis that layers share.

See ``fips.solve.structures`` for what is tried and ``fips.solve.allocate`` for what comes of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from fips.errors import BudgetError
from fips.solve.alternate import Factorization, alternate, keep_all, prune, rounded, total_loss
from fips.solve.problems import LayerProblem
from fips.solve.structures import FLOOR, Choice, Point, Pricing, Structures
from fips.solve.supports import ByteBudget, FixedPattern, Reduction, SupportRule
from fips.solve.svd import shared_svd

__all__ = ["GroupSearch"]

SAMPLE = 1024
"""Stored rows of a layer that stand for all of them when choices are tried. Rows make up for each other's errors where
their metric lets them, few rows less so: a choice that prunes then looks worse than it is beside one that only rounds.
256 of 768 cost nothing where it was measured, 96 of 768 and of 192 5 % of the error (ViT-Tiny)."""
COLUMNS = 8
"""Columns per basis vector, at least, where some columns stand for all of them: a basis fits fewer too well. One
that is kept is learnt on ``SAMPLE`` columns of a matrix at least, then fitted to all in ``LAST_ROUNDS``: learnt on 512
of 2,048 it left AntiBERTy the error of one learnt on 1,024, on 192 of 768 it left ViT-Tiny 2 % more than one of all."""
ROUNDS, TRIAL_ROUNDS, LAST_ROUNDS = 6, 2, 2
LATE_GAIN = 1.1
"""Rounds 3 to 6 have lowered the error by 5 to 8 % where it was measured; more is not expected of them."""


class GroupSearch(Structures):
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
        super().__init__(
            [(len(problem.weight_DF), problem.weight_DF.shape[1]) for problem in problems], reductions, pricing
        )
        self.problems, self.dtype = problems, dtype
        self._solved: dict[tuple[Choice, float, int], Factorization] = {}

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
        self.require_fit(choice, size)
        if choice.shared:
            return self._share(choice, size, rounds)
        if self._keeps_all(choice, size):
            return keep_all(self.problems)
        return prune(self.problems, self._rule(choice, size))

    def _share(self, choice: Choice, size: float, rounds: int) -> Factorization:
        """With a basis of full rank, learnt on some columns but for the last rounds; exact if all entries are kept."""
        basis_DR, factors_RF = shared_svd([problem.weight_DF for problem in self.problems], rank=self.width)
        if self._keeps_all(choice, size):
            return keep_all(self.problems, basis_DR, factors_RF)
        if rounds > LAST_ROUNDS and choice.layout.block == 1:
            small, share = self._some_columns(SAMPLE)
            if small is not self:
                rule = small._rule(choice, self._part_of(size, choice, small, share))
                basis = alternate(small.problems, basis_DR, rule, max_rounds=rounds - LAST_ROUNDS).basis_DR
                assert basis is not None
                basis_DR, rounds = basis, LAST_ROUNDS
        return alternate(self.problems, basis_DR, self._rule(choice, size), max_rounds=rounds)

    def error(self, found: Factorization) -> float:
        """Of what was found for these layers, perhaps on other data, in the metric of these problems."""
        return total_loss(self.problems, found.basis_DR, found.factors_RF)

    def forget(self) -> None:
        """Drop solved factorizations; the problems stay."""
        self._solved.clear()

    def trials(self, choices: Sequence[Choice], size: float) -> list[Point]:
        sizes = self.wanted(choices, size)
        rows = [problem.weight_DF.shape[1 - axis] for problem, axis in zip(self.problems, self.reductions, strict=True)]
        if any(choice.layout.block > 1 for choice in choices):  # blocks of neighbours, which a sample parts
            return self._measured(sizes)
        if len(rows) > 1:
            return self._from_some_columns(sizes)
        return self._measured(sizes) if rows[0] <= SAMPLE else self._estimated(sizes)

    def _measured(self, sizes: Sequence[tuple[Choice, float]]) -> list[Point]:
        """Points of those that fit, of a shared basis after its first rounds: the later ones lower all errors alike."""
        points: list[Point] = []
        for choice, bytes_ in sizes:
            with suppress(BudgetError):
                loss = self.solve(choice, bytes_, rounds=TRIAL_ROUNDS).losses[-1]
                if math.isfinite(loss):
                    points.append(Point(choice, bytes_, loss))
        return points

    def _estimated(self, sizes: Sequence[tuple[Choice, float]]) -> list[Point]:
        """Points of a single layer, from the errors of ``SAMPLE`` of its stored rows."""
        (problem,), (axis,) = self.problems, self.reductions
        part, error_share = problem.sample(axis, SAMPLE)
        small = GroupSearch([part], [axis], self.pricing, self.dtype)
        small.least = 0  # the whole layer decides what fits
        return self._from_part(sizes, small, SAMPLE / problem.weight_DF.shape[1 - axis], error_share)

    def _from_some_columns(self, sizes: Sequence[tuple[Choice, float]]) -> list[Point]:
        """Points of layers with a shared basis, from the errors of some of their columns."""
        small, share = self._some_columns()
        return self._from_part(sizes, small, share, share)

    def _from_part(
        self, sizes: Sequence[tuple[Choice, float]], small: GroupSearch, share: float, error_share: float
    ) -> list[Point]:
        """Points of those that fit, from the errors of a part that has a share of the entries and one of the error."""
        points: list[Point] = []
        for choice, bytes_ in sizes:
            if self.expected(choice, bytes_) < math.inf:
                part = self._part_of(bytes_, choice, small, share)
                found = small._measured([(choice, part)])
                points += [Point(choice, bytes_, point.loss / error_share) for point in found]
        return points

    def _part_of(self, size: float, choice: Choice, small: GroupSearch, share: float) -> float:
        """Bytes of a part of the layers that leave its entries as much room as ``size`` leaves those of all."""
        if self._keeps_all(choice, size):
            return small.dense_bytes(choice)
        return small.overhead(choice) + share * (size - self.overhead(choice))

    def _some_columns(self, least: int = 1) -> tuple[GroupSearch, float]:
        """The search of some columns of every layer, at least so many, a basis entry priced by their share, and this
        share."""
        share = max(
            least / min(problem.weight_DF.shape[1] for problem in self.problems), COLUMNS * self.width / self.hidden
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
        zero = total_loss(self.problems, None, [torch.zeros_like(problem.weight_DF) for problem in self.problems])
        if known <= FLOOR * zero:
            return math.inf
        small, share = self._some_columns(SAMPLE)
        try:
            if small is not self and small.first_ratio(choice, self._part_of(size, choice, small, share)) > LATE_GAIN:
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

    def _rule(self, choice: Choice, size: float) -> SupportRule:
        """Supports of factors that take ``size`` bytes together with what goes beside them."""
        if not choice.free:
            return FixedPattern(choice.layout, self.reductions)
        left = size - self.overhead(choice)
        return ByteBudget(left, self.pricing.entry(choice.numbers), self.pricing.pattern_bit, choice.layout)
