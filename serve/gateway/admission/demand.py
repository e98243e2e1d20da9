"""How much is being asked for lately."""

import math
import time
from dataclasses import dataclass, fields

from chorus.serve.gateway.request.size import Size

_BUDGETS = 1.5
"""Time budgets for which a request is remembered: what came in that time is what may still run or wait."""
_SHORTEST_S, _LONGEST_S = 1.0, 60.0
_LEAST = 0.3
"""Part of the memory that must have passed since anybody asked: the first requests alone say nothing of a rate."""
_NOBODY = 0.05
"""Requests that are none, when those that came have faded."""


@dataclass(kw_only=True)
class _Asked:
    """What requests of one kind asked for: sums that fade, like the seconds in which it came."""

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
        self.seconds = self.seconds + (1 - kept) * memory_s if self.requests > _NOBODY else 0.0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What is asked for per second."""

    free_sequences: float
    """Answers to those who have a time budget and may have more members or fewer."""
    free_tokens: float
    """Tokens of these answers."""
    budget_s: float
    """Their mean time budget."""
    scatter: float
    """Standard deviation of the tokens of theirs that are asked for in a second, as they come at random."""
    fixed_tokens: float
    """Tokens of all other answers."""
    fixed_rows: float
    """The same, counted once for each member."""
    prompt_tokens: float
    """Of all prompts."""

    @property
    def tokens(self) -> float:
        """Of all answers."""
        return self.free_tokens + self.fixed_tokens


class Demand:
    """Exponentially weighted means over the last seconds, since anybody asked at all."""

    def __init__(self) -> None:
        self._free, self._fixed = _Asked(), _Asked()
        """Those that have a time budget and may have more members or fewer, and all others."""
        self._memory_s = _SHORTEST_S
        self._at = time.perf_counter()

    def note_free(self, size: Size, *, prompt_tokens: float, budget_s: float, now: float) -> None:
        """A request was made that has so many seconds, and may have more members or fewer."""
        self._fade(now)
        tokens = _tokens(size)
        self._free.requests += 1
        self._free.sequences += size.num_sequences
        self._free.tokens += tokens
        self._free.squares += tokens**2
        self._free.prompt_tokens += prompt_tokens
        self._free.budgets_s += size.num_sequences * budget_s
        self._memory_s = min(_LONGEST_S, max(_SHORTEST_S, _BUDGETS * self._free.budgets_s / self._free.sequences))

    def note_fixed(self, size: Size, *, prompt_tokens: float, members: int, now: float) -> None:
        """A request was made that is served by so many members, as far as time budgets go."""
        self._fade(now)
        self._fixed.requests += 1
        self._fixed.tokens += _tokens(size)
        self._fixed.rows += _tokens(size) * members
        self._fixed.prompt_tokens += prompt_tokens

    def rates(self, now: float) -> Rates | None:
        """What is asked for; None if by nobody who may have more members or fewer."""
        self._fade(now)
        if self._free.requests < _NOBODY:
            return None
        # At first over the time since anybody asked: a mean over the whole memory would be too low.
        free_s, fixed_s = (
            max(self._free.seconds, _LEAST * self._memory_s),
            max(self._fixed.seconds, _LEAST * _SHORTEST_S),
        )
        return Rates(
            free_sequences=self._free.sequences / free_s,
            free_tokens=self._free.tokens / free_s,
            budget_s=self._free.budgets_s / self._free.sequences,
            scatter=math.sqrt(self._free.squares / free_s),
            fixed_tokens=self._fixed.tokens / fixed_s,
            fixed_rows=self._fixed.rows / fixed_s,
            prompt_tokens=self._free.prompt_tokens / free_s + self._fixed.prompt_tokens / fixed_s,
        )

    def _fade(self, now: float) -> None:
        kept = math.exp(-max(0.0, now - self._at) / self._memory_s)
        self._at = max(self._at, now)
        self._free.fade(kept, self._memory_s)
        self._fixed.fade(kept, self._memory_s)


def _tokens(size: Size) -> int:
    """Of a request's answers. Where only the prompt is to be scored a token is generated all the same."""
    return size.num_sequences * max(1, size.max_tokens)
