r"""The smallest size that makes sense, so that no setting leaves a matrix all but empty.

Sensible is what keeps, on average, at least one entry for every row and every column of every matrix, besides the
patterns, scales and bases that these need. Every method says how much that is (``Planner.smallest_size``):

* pruning, ours and others': :math:`\max(D, F)` kept entries of a (D, F) matrix; where the density is the same in all
  layers of a group, enough for the narrowest of them;
* N:M: what the pattern keeps; its size is fixed;
* ``fips-paper``: a rank R with :math:`(1 - s)\, R \ge 1`, or M vectors for N:M;
* low rank: one vector for every matrix; ``gptq``: 2 bits for every entry.

Shape legend: D width of the residual stream, F hidden features of one matrix; s is the sparsity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fips.config import CompressionConfig
from fips.errors import BudgetError

__all__ = ["BYTES_PER_BIT", "EPS", "require_sensible_size", "round_up"]

BYTES_PER_BIT = 1 / 8
EPS = 1e-9


def require_sensible_size(sizes: Mapping[str, float], config: CompressionConfig) -> None:
    """Raise ``BudgetError`` with the smallest size to use if the one asked for leaves a matrix all but empty.

    ``sizes`` are the smallest sensible ones of all groups by name.
    """
    by_budget = config.budget is not None
    name, value, most = ("budget", config.budget, 1) if by_budget else ("bits", config.bits, 16)
    assert value is not None
    worst = max(sizes, key=lambda key: sizes[key])
    least = sizes[worst]
    if value >= least * (1 - EPS):
        return
    start = f"`{name}` {value:g} is too small for group {worst}: less than an entry for every row and column"
    if float(round_up(least)) > most:
        raise BudgetError(f"{start}, and so is {most}, the most there is; leave its layers out with `ignore`")
    raise BudgetError(
        f"{start} would be left of a matrix; the smallest `{name}` for these settings is {round_up(least)}"
    )


def round_up(value: float) -> str:
    """A number with three digits that is not below ``value``."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    steps = math.ceil(value / unit - EPS)
    while float(f"{steps * unit:.3g}") < value:
        steps += 1
    return f"{steps * unit:.3g}"
