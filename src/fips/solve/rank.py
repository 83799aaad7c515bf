"""How many basis vectors and non-zeros a budget buys."""

from __future__ import annotations

import math

from fips.errors import BudgetError

__all__ = ["num_nonzeros", "rank_for_budget"]

_EPS = 1e-9


def rank_for_budget(*, budget: float, width: int, columns: int, sparsity: float, multiple: int = 1) -> int:
    r"""Largest rank whose basis and factors fit a budget.

    .. math:: R = \left\lfloor \frac{b\, d\, P}{d + (1 - s) P} \right\rfloor

    with budget ``b`` (fraction of the ``d P`` dense parameters), width ``d``, ``P`` columns of all matrices of the
    group together and sparsity ``s`` of the factors, rounded down to a ``multiple``. The rank may exceed ``d``.

    Raises ``BudgetError`` if not even ``multiple`` vectors fit. Reference: arXiv 2411.09816, section 3.
    """
    cost = width + (1 - sparsity) * columns
    rank = int(budget * width * columns / cost + _EPS) // multiple * multiple
    if rank < 1:
        least = multiple * cost / (width * columns)
        vectors = "one basis vector" if multiple == 1 else f"{multiple} basis vectors"
        raise BudgetError(
            f"`budget` {budget:g} is below the cost of {vectors} in a group of width {width} and {columns} columns; "
            f"the smallest budget for it is {math.ceil(least * 1e4) / 1e4:g}"
        )
    return rank


def num_nonzeros(*, size: int, sparsity: float) -> int:
    """Entries kept out of ``size``: ``floor((1 - sparsity) * size)``."""
    return int((1 - sparsity) * size + _EPS * max(size, 1))
