"""What changes with the steps of a training: the support, and by how much; the learning rate."""

from __future__ import annotations

import math

__all__ = ["cosine", "gmp_sparsity", "rigl_fraction", "update_steps"]


def cosine(step: int, steps: int) -> float:
    r"""Half a cosine from 1 to 0, :math:`\frac{1}{2}(1 + \cos \pi t / T)`."""
    return 0.5 + 0.5 * math.cos(math.pi * step / steps)


def update_steps(*, steps: int, every: int, end: float) -> tuple[int, ...]:
    """Steps at which the support is updated: every ``every`` steps from 0, and always the last, ``end * steps``."""
    last = min(round(end * steps), max(steps - 1, 0))
    return (*range(0, last, every), last)


def gmp_sparsity(step: int, *, initial: float, final: float, begin: int, end: int) -> float:
    r"""Cubic schedule of gradual magnitude pruning.

    .. math:: s_t = s_f + (s_0 - s_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3, \qquad t_0 \le t \le t_1,

    equal to ``initial`` before ``begin`` and exactly to ``final`` from ``end`` on. Reference: Zhu & Gupta,
    arXiv 1710.01878.
    """
    if step >= end:
        return final
    if step <= begin:
        return initial
    return final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3


def rigl_fraction(step: int, *, initial: float, end: int) -> float:
    r"""Share of the support exchanged at a step, :math:`\frac{\alpha}{2}(1 + \cos \pi t / t_1)`, 0 from ``end`` on.

    Reference: Evci et al., arXiv 1911.11134.
    """
    return 0.0 if step >= end else initial * cosine(step, end)
