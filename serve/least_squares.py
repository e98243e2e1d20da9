"""Least squares that learns as it goes: what an engine's time depends on, as a linear function that slowly forgets."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SWEEPS, _ENOUGH, _RIDGE = 40, 1e-6, 1e-4


class LeastSquares:
    """Exponentially weighted least squares over weights at or above zero: no load makes an engine faster.

    Minimises sum_t forgetting^(n-t) (y_t - w x_t)^2 + ridge |w - w_before|^2 by coordinate descent from the weights before.
    A few features need a few sweeps. The ridge keeps what has not been seen for long where it was. Solved when it is next asked
    for: an observation costs a few microseconds, a solution some fifty.
    Recursive least squares with a projection was tried first and diverged: bench/LOG.md.
    """

    def __init__(self, scales: tuple[float, ...], *, forgetting: float) -> None:
        self._scales_F = np.array(scales)
        self._forgetting = forgetting
        self._weights_F: NDArray[np.float64] = np.zeros(len(scales))
        self._gram_FF: NDArray[np.float64] = np.zeros((len(scales), len(scales)))
        self._moment_F: NDArray[np.float64] = np.zeros(len(scales))
        self._is_solved = True
        self.count = 0
        """Observations so far."""

    def observe(self, features: tuple[float, ...], target: float) -> None:
        """Learn that `features` came out as `target`."""
        features_F = np.array(features) / self._scales_F
        self._gram_FF = self._forgetting * self._gram_FF + np.outer(features_F, features_F)
        self._moment_F = self._forgetting * self._moment_F + target * features_F
        self._is_solved = False
        self.count += 1

    @property
    def weights(self) -> NDArray[np.float64]:
        """The weights, per scaled feature."""
        if not self._is_solved:
            self._solve()
        return self._weights_F

    def predict(self, features: tuple[float, ...]) -> float:
        """What is expected for `features`."""
        return float((np.array(features) / self._scales_F) @ self.weights)

    def state(self) -> dict[str, Any]:
        """What was learned, for JSON."""
        return {
            "weights": self.weights.tolist(),
            "gram": self._gram_FF.tolist(),
            "moment": self._moment_F.tolist(),
            "count": self.count,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` said."""
        self._weights_F = np.array(state["weights"], dtype=np.float64).reshape(self._weights_F.shape)
        self._gram_FF = np.array(state["gram"], dtype=np.float64).reshape(self._gram_FF.shape)
        self._moment_F = np.array(state["moment"], dtype=np.float64).reshape(self._moment_F.shape)
        self._is_solved = True
        self.count = int(state["count"])

    def _solve(self) -> None:
        before, gram, moment = self._weights_F.tolist(), self._gram_FF.tolist(), self._moment_F.tolist()
        weights = list(before)
        for _ in range(_SWEEPS):
            earlier = list(weights)
            for i, row in enumerate(gram):
                others = sum(row[j] * weights[j] for j in range(len(weights)) if j != i)
                weights[i] = max(0.0, (moment[i] - others + _RIDGE * before[i]) / (row[i] + _RIDGE))
            if max(abs(new - old) for new, old in zip(weights, earlier, strict=True)) <= _ENOUGH * max(weights):
                break
        self._weights_F = np.array(weights)
        self._is_solved = True
