"""Demand: the tokens per second that were requested lately."""

import math
import time
from dataclasses import dataclass, fields

from chorus.serve.gateway.request.size import Size

_MEMORY_BUDGETS = 1.5
"""The memory, in mean time budgets: what came in that time may still run or wait."""
_MIN_MEMORY_S, _MAX_MEMORY_S = 1.0, 60.0
_MIN_OBSERVED = 0.3
"""Part of the memory over which rates are taken at least: a first request alone is no rate."""
_NEGLIGIBLE = 0.05
"""Faded requests that count as no traffic."""


@dataclass(kw_only=True)
class _Requested:
    """Sums over the requests of one kind that fade with time, as do the seconds over which they came."""

    requests: float = 0.0
    sequences: float = 0.0
    tokens: float = 0.0
    """Of answers."""
    rows: float = 0.0
    """These tokens, counted once for each member."""
    prompt_tokens: float = 0.0
    squares: float = 0.0
    """Of the tokens of each request's answers."""
    budgets_s: float = 0.0
    """Time budgets, counted once for each sequence."""
    seconds: float = 0.0

    def fade(self, kept: float, memory_s: float) -> None:
        for each in fields(self):
            setattr(self, each.name, kept * getattr(self, each.name))
        self.seconds = self.seconds + (1 - kept) * memory_s if self.requests > _NEGLIGIBLE else 0.0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Demand per second. Flexible requests have a time budget and a floor below their tier; all others are fixed."""

    flexible_sequences: float
    flexible_tokens: float
    """Of their answers."""
    budget_s: float
    """Their mean time budget."""
    scatter: float
    """Standard deviation of their tokens in a second, if they come at random."""
    fixed_tokens: float
    """Of the answers of fixed requests."""
    fixed_rows: float
    """The same, counted once for each member."""
    prompt_tokens: float
    """Of all prompts."""

    @property
    def tokens(self) -> float:
        """Of all answers."""
        return self.flexible_tokens + self.fixed_tokens


class Demand:
    """Exponentially weighted means over the last seconds, or since the first request if that is shorter."""

    def __init__(self) -> None:
        self._flexible, self._fixed = _Requested(), _Requested()
        self._memory_s = _MIN_MEMORY_S
        self._updated_at = time.perf_counter()

    def note_flexible(self, size: Size, *, prompt_tokens: float, budget_s: float, now: float) -> None:
        """A request with that much time, whose number of members is the gateway's to choose."""
        self._fade(now)
        tokens = _tokens(size)
        self._flexible.requests += 1
        self._flexible.sequences += size.num_sequences
        self._flexible.tokens += tokens
        self._flexible.squares += tokens**2
        self._flexible.prompt_tokens += prompt_tokens
        self._flexible.budgets_s += size.num_sequences * budget_s
        mean_budget_s = self._flexible.budgets_s / self._flexible.sequences
        self._memory_s = min(_MAX_MEMORY_S, max(_MIN_MEMORY_S, _MEMORY_BUDGETS * mean_budget_s))

    def note_fixed(self, size: Size, *, prompt_tokens: float, members: int, now: float) -> None:
        """A request with a given number of members."""
        self._fade(now)
        self._fixed.requests += 1
        self._fixed.tokens += _tokens(size)
        self._fixed.rows += _tokens(size) * members
        self._fixed.prompt_tokens += prompt_tokens

    def rates(self, now: float) -> Rates | None:
        """The demand; None without flexible requests."""
        self._fade(now)
        if self._flexible.requests < _NEGLIGIBLE:
            return None
        flexible_s = max(self._flexible.seconds, _MIN_OBSERVED * self._memory_s)
        fixed_s = max(self._fixed.seconds, _MIN_OBSERVED * _MIN_MEMORY_S)
        return Rates(
            flexible_sequences=self._flexible.sequences / flexible_s,
            flexible_tokens=self._flexible.tokens / flexible_s,
            budget_s=self._flexible.budgets_s / self._flexible.sequences,
            scatter=math.sqrt(self._flexible.squares / flexible_s),
            fixed_tokens=self._fixed.tokens / fixed_s,
            fixed_rows=self._fixed.rows / fixed_s,
            prompt_tokens=self._flexible.prompt_tokens / flexible_s + self._fixed.prompt_tokens / fixed_s,
        )

    def _fade(self, now: float) -> None:
        kept = math.exp(-max(0.0, now - self._updated_at) / self._memory_s)
        self._updated_at = max(self._updated_at, now)
        self._flexible.fade(kept, self._memory_s)
        self._fixed.fade(kept, self._memory_s)


def _tokens(size: Size) -> int:
    """Of a request's answers. A request that only scores its prompt generates a token all the same."""
    return size.num_sequences * max(1, size.max_tokens)
