"""The small convex problem inside a Newton step: a quadratic over non-negative variables, solved exactly by active sets."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def minimise_quadratic(hessian_AA: FloatArray, linear_A: FloatArray, start_A: FloatArray) -> FloatArray:
    """The y >= 0 that minimises 0.5 y'Hy - b'y, for a symmetric positive definite H.

    The active-set method of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23) in terms of the normal equations:
    minimise over the free variables; where that would cross a bound, stop at the bound and fix the variable there; when it does
    not, free the fixed variable whose slack is largest. Ends at the Karush-Kuhn-Tucker point, or, where rounding hinders that,
    at a point no worse than `start_A`, which must be >= 0.
    """
    y_A = start_A.copy()
    free_A = start_A > 0
    tolerance = 1e-12 * max(1.0, float(np.abs(linear_A).max()))
    for _ in range(3 * len(y_A) + 10):
        y_A = _minimise_over_free(hessian_AA, linear_A, y_A, free_A)
        slack_A = np.where(free_A, -np.inf, linear_A - hessian_AA @ y_A)
        most = int(slack_A.argmax())
        if slack_A[most] <= tolerance:
            break
        free_A[most] = True
    return y_A


def _minimise_over_free(
    hessian_AA: FloatArray, linear_A: FloatArray, y_A: FloatArray, free_A: NDArray[np.bool_]
) -> FloatArray:
    """Move to the minimiser over the free variables; those that hit their bound on the way are fixed, in `free_A` itself."""
    y_A = y_A.copy()
    while free_A.any():
        idx = np.flatnonzero(free_A)
        wanted = np.linalg.solve(hessian_AA[np.ix_(idx, idx)], linear_A[idx])
        crossing = wanted <= 0
        if not crossing.any():
            y_A[idx] = wanted
            return y_A
        here = y_A[idx]
        share = here[crossing] / (here[crossing] - wanted[crossing] + np.finfo(float).tiny)
        moved = here + float(share.min()) * (wanted - here)
        moved[np.flatnonzero(crossing)[share.argmin()]] = 0.0
        moved = np.maximum(moved, 0.0)
        y_A[idx] = moved
        free_A[idx] = moved > 0
    return y_A
