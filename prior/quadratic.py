"""Minimises a convex quadratic over non-negative variables with an active-set method: the inner problem of a Newton step."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def minimise_quadratic(hessian_AA: FloatArray, linear_A: FloatArray, start_A: FloatArray) -> FloatArray:
    """The y >= 0 that minimises 0.5 y'Hy - b'y, for a symmetric positive definite H.

    The active-set method of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23) on the normal equations. Minimise
    over the free variables. If that crosses a bound, stop there and fix the variable at the bound; otherwise free the fixed
    variable with the largest slack. Ends at the Karush-Kuhn-Tucker point or, if rounding prevents that, at a point no worse than
    `start_A`, which must be >= 0.
    """
    y_A = start_A.copy()
    free_A = start_A > 0
    tolerance = 1e-12 * max(1.0, float(np.abs(linear_A).max()))
    for _ in range(3 * len(y_A) + 10):
        y_A = _minimise_over_free(hessian_AA, linear_A, y_A, free_A)
        slack_A = np.where(free_A, -np.inf, linear_A - hessian_AA @ y_A)
        largest = int(slack_A.argmax())
        if slack_A[largest] <= tolerance:
            break
        free_A[largest] = True
    return y_A


def _minimise_over_free(
    hessian_AA: FloatArray, linear_A: FloatArray, y_A: FloatArray, free_A: NDArray[np.bool_]
) -> FloatArray:
    """Move to the minimiser over the free variables. Fixes variables that reach a bound on the way, in `free_A` itself."""
    y_A = y_A.copy()
    while free_A.any():
        idx = np.flatnonzero(free_A)
        minimiser = np.linalg.solve(hessian_AA[np.ix_(idx, idx)], linear_A[idx])
        crossing = minimiser <= 0
        if not crossing.any():
            y_A[idx] = minimiser
            return y_A
        current = y_A[idx]
        steps = current[crossing] / (current[crossing] - minimiser[crossing] + np.finfo(float).tiny)
        moved = current + float(steps.min()) * (minimiser - current)
        moved[np.flatnonzero(crossing)[steps.argmin()]] = 0.0
        moved = np.maximum(moved, 0.0)
        y_A[idx] = moved
        free_A[idx] = moved > 0
    return y_A
