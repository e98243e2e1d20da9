"""Least squares that learns as it goes: what an engine's time depends on, as a linear function that slowly forgets."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SWEEPS, _ENOUGH, _RIDGE = 40, 1e-6, 1e-4
_UNCLIPPED, _CLIP, _LEAST_MISS, _MISS_RATE = 8, 4.0, 0.05, 0.05


class LeastSquares:
    """Exponentially weighted least squares over weights at or above zero: no load makes an engine faster.

    Minimises sum_t forgetting^(n-t) (y_t - w x_t)^2 + ridge |w - w_before|^2 by coordinate descent from the weights before.
    A few features need a few sweeps. The ridge keeps what has not been seen for long where it was.
    Recursive least squares with a projection was tried first and diverged: bench/LOG.md.

    What misses its prediction by more than `_CLIP` times the usual counts as if it missed by that much (Huber's clipping): a
    hiccup of the engine says little, and an engine that has changed for good soon makes larger misses usual.
    """

    def __init__(self, scales: tuple[float, ...], *, forgetting: float) -> None:
        self._scales_F = np.array(scales)
        self._forgetting = forgetting
        self._gram_FF: NDArray[np.float64] = np.zeros((len(scales), len(scales)))
        self._moment_F: NDArray[np.float64] = np.zeros(len(scales))
        self.weights_F: NDArray[np.float64] = np.zeros(len(scales))
        self.count = 0
        """Observations so far."""
        self._mean = 0.0
        """Of the targets."""
        self._miss = _LEAST_MISS
        """Usual size of a miss, as a part of the prediction or of the mean target, whichever is larger."""

    def observe(self, features: tuple[float, ...], target: float) -> None:
        """Learn that `features` came out as `target`."""
        features_F = np.array(features) / self._scales_F
        target = self._clip(features_F, target)
        self._gram_FF = self._forgetting * self._gram_FF + np.outer(features_F, features_F)
        self._moment_F = self._forgetting * self._moment_F + target * features_F
        self.count += 1
        self._solve()

    def _clip(self, features_F: NDArray[np.float64], target: float) -> float:
        """The target as far as it is believed."""
        expected = float(features_F @ self.weights_F)
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
        return float((np.array(features) / self._scales_F) @ self.weights_F)

    def coefficients(self) -> list[float]:
        """What each feature adds to a prediction."""
        return [float(value) for value in self.weights_F / self._scales_F]

    def state(self) -> dict[str, Any]:
        """What was learned, for JSON."""
        return {
            "weights": self.weights_F.tolist(),
            "gram": self._gram_FF.tolist(),
            "moment": self._moment_F.tolist(),
            "count": self.count,
            "mean": self._mean,
            "miss": self._miss,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` said."""
        self.weights_F = np.array(state["weights"], dtype=np.float64).reshape(self.weights_F.shape)
        self._gram_FF = np.array(state["gram"], dtype=np.float64).reshape(self._gram_FF.shape)
        self._moment_F = np.array(state["moment"], dtype=np.float64).reshape(self._moment_F.shape)
        self.count = int(state["count"])
        self._mean, self._miss = float(state["mean"]), float(state["miss"])

    def _solve(self) -> None:
        before, gram, moment = self.weights_F.tolist(), self._gram_FF.tolist(), self._moment_F.tolist()
        weights = list(before)
        for _ in range(_SWEEPS):
            earlier = list(weights)
            for i, row in enumerate(gram):
                others = sum(row[j] * weights[j] for j in range(len(weights)) if j != i)
                weights[i] = max(0.0, (moment[i] - others + _RIDGE * before[i]) / (row[i] + _RIDGE))
            if max(abs(new - old) for new, old in zip(weights, earlier, strict=True)) <= _ENOUGH * max(weights):
                break
        self.weights_F = np.array(weights)
