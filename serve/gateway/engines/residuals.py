"""Residuals of recent answers, and the margin for the next one that follows from them.

An answer over its expected time either lost time once (a hiccup, the first use of something) or was slower throughout. A short
answer does not show which, and its ratio of actual to expected seconds may be of any size: applied to long answers, one hiccup
would make every deadline look out of reach. So the time that a short answer lost is added once, and only the part by which the next
answer is longer is scaled by the ratio, by `_MAX_RATIO` at most.
"""

import math
from collections import deque
from collections.abc import Iterable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_WINDOW = 256
_MAX_RATIO = 2.0
_MIN_S = 1e-4
_NUM_ASSUMED = 32
_ASSUMED_MARGIN = 1.3
"""Factor assumed to keep 97 of 100 promises before there are observations."""
_SPREAD = math.log(_ASSUMED_MARGIN) / NormalDist().inv_cdf(0.97)
# S answers
_ASSUMED_S: NDArray[np.float64] = np.exp(
    [_SPREAD * NormalDist().inv_cdf((idx + 0.5) / _NUM_ASSUMED) for idx in range(_NUM_ASSUMED)]
)


class Residuals:
    """Recent answers, as pairs of expected and actual seconds."""

    def __init__(self, pairs: Iterable[tuple[float, float]] = ()) -> None:
        self._pairs: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._factor_cache: dict[tuple[int, float], float] = {}
        for expected_s, seconds in pairs:
            self.observe(expected_s, seconds)

    def observe(self, expected_s: float, seconds: float) -> None:
        """Record that an answer expected to take `expected_s` took `seconds`."""
        self._pairs.append((max(expected_s, _MIN_S), max(seconds, 0.0)))
        self._factor_cache.clear()

    def factor(self, level: float, expected_s: float) -> float:
        """The factor on `expected_s` that a share `level` of recent answers stayed within."""
        size = round(8 * math.log2(max(expected_s, _MIN_S)))  # rounded to within 5 %, so that the cache is hit
        if (size, level) not in self._factor_cache:
            self._factor_cache[size, level] = self._quantile(level, 2 ** (size / 8))
        return self._factor_cache[size, level]

    def pairs(self) -> list[tuple[float, float]]:
        """The observations, oldest first."""
        return list(self._pairs)

    def _quantile(self, level: float, target_s: float) -> float:
        # A few answers have no tail: assumed ones supply it, and fade out as observations accumulate.
        num_assumed = max(0, _NUM_ASSUMED - len(self._pairs) // 4)
        picks = np.linspace(0, _NUM_ASSUMED - 1, num_assumed).round().astype(int)
        factors_S = np.sort(np.concatenate([_ASSUMED_S[picks], self._factors(target_s)]))
        return float(factors_S[int(level * (len(factors_S) - 1))])

    def _factors(self, target_s: float) -> NDArray[np.float64]:
        """Each answer's factor, converted to an answer that is expected to take `target_s`."""
        if not self._pairs:
            return np.empty(0)
        expected_S, seconds_S = np.array(self._pairs).T
        ratios_S = seconds_S / expected_S
        longer_S = seconds_S + (target_s - expected_S) * np.clip(ratios_S, 0.0, _MAX_RATIO)
        factors_S: NDArray[np.float64] = np.where(target_s > expected_S, longer_S / target_s, ratios_S)
        return factors_S
