"""How much of a time budget the gateway keeps back from the engine, so that an answer at the last moment is still in time."""

_MIN_SHARE, _MAX_SHARE = 0.02, 0.4
_STEP = 0.03


class Reserve:
    """The share of the remaining budget that is kept back, so that in the long run a share `misses` of promised answers is late.

    Approximates that quantile step by step (Robbins and Monro): a late answer raises it a lot, one in time lowers it a little.
    """

    def __init__(self, *, misses: float = 0.015) -> None:
        self._misses = misses
        self.share = 0.08

    def after_reserve_s(self, remaining_s: float) -> float:
        """The seconds of `remaining_s` that the engine gets."""
        return max(0.001, remaining_s * (1.0 - self.share))

    def observe(self, *, late: bool) -> None:
        """Adapt to a promised answer."""
        self.share = min(_MAX_SHARE, max(_MIN_SHARE, self.share + _STEP * (float(late) - self._misses)))
