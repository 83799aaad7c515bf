"""Conjugate gradients on tensors of any shape, for symmetric positive semidefinite operators that are never formed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["conjugate_gradients"]

Operator = Callable[[Tensor], Tensor]


def conjugate_gradients(
    apply: Operator,
    start: Tensor,
    residual: Tensor,
    *,
    iterations: int,
    enough: Tensor,
    precondition: Operator | None = None,
) -> Tensor:
    """The solution of ``apply(x) = b`` from ``start`` with ``residual`` = b - apply(start).

    Ends after ``iterations``, or when the squared (preconditioned) residual norm is at most ``enough``. Every iterate
    lowers the quadratic that the equation is the gradient of. Reference: Hestenes & Stiefel (1952).
    """
    improved = precondition or (lambda tensor: tensor)
    solution = start
    direction = better = improved(residual)
    product = (residual * better).sum()
    for _ in range(iterations):
        if product <= enough or product == 0:
            break
        moved = apply(direction)
        curvature = (direction * moved).sum()
        if not curvature > 0:  # a direction that changes nothing, or rounding errors alone
            break
        step = product / curvature
        solution = solution + step * direction
        residual = residual - step * moved
        better = improved(residual)
        before, product = product, (residual * better).sum()
        direction = better + (product / before) * direction
    return solution
