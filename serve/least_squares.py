"""Least squares that learns as it goes: what an engine's time depends on, as a linear function that slowly forgets.

Plain lists: a handful of features take numpy longer to look at than to compute with, and both engine and gateway learn while
requests wait.
"""

import operator
from collections.abc import Sequence
from typing import Any

_ROUNDING, _RIDGE = 1e-12, 1e-4
_MOST = 1e12
"""What is restored lies below it."""
_UNCLIPPED, _CLIP, _LEAST_MISS, _MISS_RATE = 8, 4.0, 0.05, 0.05


class LeastSquares:
    """Exponentially weighted least squares over weights at or above zero: no load makes an engine faster.

    Minimises sum_t forgetting^(n-t) (y_t - w x_t)^2 + ridge |w - w_before|^2. The ridge keeps what has not been seen for long where
    it was. Recursive least squares with a projection was tried first and diverged: bench/LOG.md.

    What misses its prediction by more than `_CLIP` times the usual counts as if it missed by that much (Huber's clipping): a
    hiccup of the engine says little, and an engine that has changed for good soon makes larger misses usual.
    """

    def __init__(self, scales: tuple[float, ...], *, forgetting: float) -> None:
        self._scales = scales
        self._forgetting = forgetting
        self._gram = [[0.0] * len(scales) for _ in scales]
        self._moment = [0.0] * len(scales)
        self.weights = [0.0] * len(scales)
        """Of the features, each divided by its scale."""
        self.count = 0
        """Observations so far."""
        self._mean = 0.0
        """Of the targets."""
        self._miss = _LEAST_MISS
        """Usual size of a miss, as a part of the prediction or of the mean target, whichever is larger."""

    def observe(self, features: tuple[float, ...], target: float) -> None:
        """Learn that `features` came out as `target`."""
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
        """The target as far as it is believed."""
        unit = max(expected, self._mean)
        if self.count >= _UNCLIPPED and unit > 0:
            most = _CLIP * self._miss
            miss = min(most, max(-most, (target - expected) / unit))
            target = expected + miss * unit
            self._miss = max(_LEAST_MISS, self._miss + _MISS_RATE * (abs(miss) - self._miss))
        self._mean += max(1.0 - self._forgetting, 1 / (self.count + 1)) * (target - self._mean)
        return target

    def predict(self, features: tuple[float, ...]) -> float:
        """What is expected for `features`."""
        return _dot(features, self.coefficients())

    def coefficients(self) -> list[float]:
        """What each feature adds to a prediction."""
        return [weight / scale for weight, scale in zip(self.weights, self._scales, strict=True)]

    def state(self) -> dict[str, Any]:
        """What was learned, for JSON."""
        return {
            "weights": self.weights,
            "gram": [list(row) for row in self._gram],
            "moment": list(self._moment),
            "count": self.count,
            "mean": self._mean,
            "miss": self._miss,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` said.

        Raises:
            KeyError, TypeError, ValueError: it is not of that form; the model is then as before.
        """
        num = len(self._scales)
        weights, moment = _floats(state["weights"], num), _floats(state["moment"], num)
        gram = [_floats(row, num) for row in state["gram"]]
        if len(gram) != num:
            raise ValueError(f"{len(gram)} rows for {num} features")
        mean, miss = _floats([state["mean"], state["miss"]], 2)
        count = int(state["count"])
        self.weights, self._moment, self._gram = weights, moment, gram
        self.count, self._mean, self._miss = count, mean, miss


def _solve(gram: list[list[float]], moment: list[float], before: list[float]) -> list[float]:
    """The weights at or above zero that minimise w (gram + ridge) w / 2 - (moment + ridge before) w.

    By principal pivoting with one exchange at a time, the last of those that are wrong: finite for a positive definite matrix
    (Murty 1974), and one look where the weights that are zero stay the same, as they mostly do.
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
    return before  # rounding goes round in circles


def _solve_free(rows: list[list[float]], target: list[float], free: list[bool]) -> list[float]:
    """The solution of the equations of those that are free, with zero for the others. The matrix is positive definite."""
    places = [i for i, is_free in enumerate(free) if is_free]
    left = [[*(rows[i][j] for j in places), target[i]] for i in places]
    for k, pivot in enumerate(left):
        for row in left[k + 1 :]:
            factor = row[k] / pivot[k]
            for j in range(k, len(pivot)):
                row[j] -= factor * pivot[j]
    weights = [0.0] * len(free)
    for k in reversed(range(len(left))):
        row = left[k]
        known = sum(row[j] * weights[places[j]] for j in range(k + 1, len(left)))
        weights[places[k]] = (row[-1] - known) / row[k]
    return weights


def _dot(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(map(operator.mul, first, second), 0.0)


def _floats(values: Any, num: int) -> list[float]:
    found = [float(value) for value in values]
    if len(found) != num:
        raise ValueError(f"{len(found)} values for {num} features")
    if not all(abs(value) < _MOST for value in found):
        raise ValueError(f"{found} are not all below {_MOST:g}")
    return found
