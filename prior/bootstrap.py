"""Confidence intervals for losses: a bootstrap over whole documents, paired between methods.

Tokens of one document are not independent, so documents are resampled, not tokens. All methods share the same resamples: the
interval of a difference comes from paired differences and is far narrower than the intervals of the two losses.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chorus.population.errors import ChorusError
from chorus.prior.quadratic import FloatArray

# N tokens, D documents, R draws
NUM_DRAWS = 2_000
LEVEL = 0.95
_MAX_COUNTS = 20_000_000  # 160 MB; splits of more than 10,000 documents get fewer draws
FEW_DOCUMENTS = 10  # with fewer, percentile intervals are known to be too narrow


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its 95 % interval, nats per token."""

    nats: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the choice of documents alone does not explain the difference."""
        return self.low > 0 or self.high < 0


class Bootstrap:
    """Resamples the documents of one split. All losses and differences use the same draws."""

    def __init__(self, offsets: NDArray[np.int64], *, num_draws: int = NUM_DRAWS, seed: int = 0) -> None:
        """`offsets` (D + 1): document d has scored tokens offsets[d] : offsets[d + 1]. Documents without scored tokens are ignored.

        Raises:
            ChorusError: fewer than two documents have scored tokens.
        """
        tokens_D = np.diff(offsets)
        self._starts = offsets[:-1][tokens_D > 0]
        self._tokens_D = tokens_D[tokens_D > 0]
        self._stop = int(offsets[-1])
        self.num_documents = len(self._tokens_D)
        if self.num_documents < 2:
            raise ChorusError(
                f"the held-out text has {self.num_documents} document(s): an interval needs at least 2, better a few dozen. "
                "Give more text, or split it into more documents with --split-on."
            )
        num_draws = min(num_draws, max(200, _MAX_COUNTS // self.num_documents))
        generator = np.random.default_rng(seed)
        equal = np.full(self.num_documents, 1 / self.num_documents)
        self._counts_RD = generator.multinomial(self.num_documents, equal, size=num_draws).astype(np.float64)
        self._draw_tokens_R = self._counts_RD @ self._tokens_D

    def loss(self, losses_N: FloatArray) -> Interval:
        """Mean loss per token (a ratio of sums) with its interval."""
        return self._interval(losses_N)

    def difference(self, losses_N: FloatArray, baseline_N: FloatArray) -> Interval:
        """Mean of `losses_N - baseline_N`, paired by token; negative means `losses_N` is better."""
        return self._interval(losses_N - baseline_N)

    def by_document(self, losses_N: FloatArray) -> FloatArray:
        """Mean loss of each document (D), nats per token."""
        return np.asarray(self._sums(losses_N) / self._tokens_D)

    def _interval(self, values_N: FloatArray) -> Interval:
        if len(values_N) != self._stop:
            raise ValueError(f"got {len(values_N)} losses for {self._stop} scored tokens")
        sums_D = self._sums(values_N)
        drawn_R = self._counts_RD @ sums_D / self._draw_tokens_R
        low, high = np.quantile(drawn_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(nats=float(sums_D.sum() / self._tokens_D.sum()), low=float(low), high=float(high))

    def _sums(self, values_N: FloatArray) -> FloatArray:
        return np.asarray(np.add.reduceat(values_N, self._starts), dtype=np.float64)
