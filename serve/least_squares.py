"""Online non-negative least squares with forgetting, used to learn how an engine's times depend on its load.

Uses plain lists: for a handful of features, numpy's overhead exceeds the computation, and both the engine and the gateway learn
while requests wait.
"""

import operator
from collections.abc import Sequence
from typing import Any

_ROUNDING, _RIDGE = 1e-12, 1e-4
_MAX_RESTORED = 1e12
"""Bound on the absolute values that `restore` accepts."""
_NUM_UNCLIPPED, _CLIP, _MIN_ERROR, _ERROR_RATE = 8, 4.0, 0.05, 0.05
"""Of clipping: observations before it starts, bound as a multiple of the usual error, minimum and learning rate of that error."""


class LeastSquares:
    """Exponentially weighted least squares with non-negative weights, since no load makes an engine faster.

    Minimises sum_t forgetting^(n-t) (y_t - w x_t)^2 + ridge |w - w_before|^2 over w >= 0. The ridge keeps the weights of features
    that have not varied for long. Recursive least squares with a projection was tried first and diverged (bench/LOG.md).

    Errors are clipped at `_CLIP` times the usual error (Huber). A single hiccup of the engine then has little effect, while after a
    lasting change larger errors soon become the usual ones.
    """

    def __init__(self, scales: tuple[float, ...], *, forgetting: float) -> None:
        self._scales = scales
        self._forgetting = forgetting
        self._gram = [[0.0] * len(scales) for _ in scales]
        self._moment = [0.0] * len(scales)
        self.weights = [0.0] * len(scales)
        """Weights of the features, each divided by its scale."""
        self.count = 0
        """Observations so far."""
        self._mean = 0.0
        """Running mean of the targets."""
        self._error = _MIN_ERROR
        """Usual absolute error, relative to the prediction or the mean target, whichever is larger."""

    def observe(self, features: tuple[float, ...], target: float) -> None:
        """Learn from one observation."""
        scaled = [feature / scale for feature, scale in zip(features, self._scales, strict=True)]
        target = self._clip(_dot(scaled, self.weights), target)
        for row, feature in zip(self._gram, scaled, strict=True):
            for j, other in enumerate(scaled):
                row[j] = self._forgetting * row[j] + feature * other
        for i, feature in enumerate(scaled):
            self._moment[i] = self._forgetting * self._moment[i] + target * feature
        self.count += 1
        self.weights = _solve(self._gram, self._moment, self.weights)

    def _clip(self, expected: float, target: float) -> float:
        """`target`, moved towards `expected` if the error exceeds the clipping bound."""
        unit = max(expected, self._mean)
        if self.count >= _NUM_UNCLIPPED and unit > 0:
            bound = _CLIP * self._error
            error = min(bound, max(-bound, (target - expected) / unit))
            target = expected + error * unit
            self._error = max(_MIN_ERROR, self._error + _ERROR_RATE * (abs(error) - self._error))
        self._mean += max(1.0 - self._forgetting, 1 / (self.count + 1)) * (target - self._mean)
        return target

    def predict(self, features: tuple[float, ...]) -> float:
        """The expected target for `features`."""
        return _dot(features, self.coefficients())

    def coefficients(self) -> list[float]:
        """The prediction's increase per unit of each feature."""
        return [weight / scale for weight, scale in zip(self.weights, self._scales, strict=True)]

    def state(self) -> dict[str, Any]:
        """The learned state, for JSON."""
        return {
            "weights": self.weights,
            "gram": [list(row) for row in self._gram],
            "moment": list(self._moment),
            "count": self.count,
            "mean": self._mean,
            "miss": self._error,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Replace the learned state by one from `state()`.

        Raises:
            KeyError, TypeError, ValueError: the state is malformed. The model is then unchanged.
        """
        num = len(self._scales)
        weights, moment = _floats(state["weights"], num), _floats(state["moment"], num)
        gram = [_floats(row, num) for row in state["gram"]]
        if len(gram) != num:
            raise ValueError(f"gram has {len(gram)} rows, expected {num}, one per feature")
        mean, error = _floats([state["mean"], state["miss"]], 2)
        count = int(state["count"])
        self.weights, self._moment, self._gram = weights, moment, gram
        self.count, self._mean, self._error = count, mean, error


def _solve(gram: list[list[float]], moment: list[float], before: list[float]) -> list[float]:
    """The non-negative weights w that minimise w (gram + ridge) w / 2 - (moment + ridge before) w.

    Principal pivoting that exchanges one index at a time, the last violating one. It terminates for a positive definite matrix
    (Murty 1974), and takes a single pass if the set of zero weights is unchanged, as it mostly is.
    """
    num = len(moment)
    rows = [[value + _RIDGE * (i == j) for j, value in enumerate(row)] for i, row in enumerate(gram)]
    target = [value + _RIDGE * weight for value, weight in zip(moment, before, strict=True)]
    slack = _ROUNDING * max(map(abs, target))
    free = [weight > 0 for weight in before]
    for _ in range(2**num):
        weights = _solve_free(rows, target, free)
        for i in reversed(range(num)):
            if weights[i] < 0 if free[i] else _dot(rows[i], weights) < target[i] - slack:
                free[i] = not free[i]
                break
        else:
            return weights
    return before  # rounding errors made it cycle


def _solve_free(rows: list[list[float]], target: list[float], free: list[bool]) -> list[float]:
    """Solves for the free weights by Gaussian elimination, with zero for the others. The matrix must be positive definite."""
    indices = [i for i, is_free in enumerate(free) if is_free]
    system = [[*(rows[i][j] for j in indices), target[i]] for i in indices]
    for k, pivot in enumerate(system):
        for row in system[k + 1 :]:
            factor = row[k] / pivot[k]
            for j in range(k, len(pivot)):
                row[j] -= factor * pivot[j]
    weights = [0.0] * len(free)
    for k in reversed(range(len(system))):
        row = system[k]
        known = sum(row[j] * weights[indices[j]] for j in range(k + 1, len(system)))
        weights[indices[k]] = (row[-1] - known) / row[k]
    return weights


def _dot(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(map(operator.mul, first, second), 0.0)


def _floats(values: Any, num: int) -> list[float]:
    found = [float(value) for value in values]
    if len(found) != num:
        raise ValueError(f"{len(found)} values, expected {num}")
    if not all(abs(value) < _MAX_RESTORED for value in found):
        raise ValueError(f"values {found} are not all below {_MAX_RESTORED:g} in magnitude")
    return found
