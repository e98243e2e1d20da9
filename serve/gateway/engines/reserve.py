"""How much of a time budget an engine is told, so that what it finishes at the last moment is still in time."""

_LEAST, _MOST = 0.02, 0.4
_STEP = 0.03


class Reserve:
    """The part of the remaining budget that is kept back, so that in the long run `misses` of the promised answers are late.

    Approximates that quantile step by step (Robbins and Monro): a late answer raises it by much, one in time lowers it by little.
    """

    def __init__(self, *, misses: float = 0.015) -> None:
        self._misses = misses
        self.part = 0.08

    def after_reserve_s(self, remaining_s: float) -> float:
        """What the engine is told of `remaining_s`."""
        return max(0.001, remaining_s * (1.0 - self.part))

    def observe(self, *, late: bool) -> None:
        """Learn from a promised answer."""
        self.part = min(_MOST, max(_LEAST, self.part + _STEP * (float(late) - self._misses)))
