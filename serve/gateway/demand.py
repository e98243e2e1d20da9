"""How much is being asked for lately."""

import math
import time

from serve.gateway.terms import Size

_MEMORY_S = 1.5


class Demand:
    """Exponentially weighted means over the last seconds, per second."""

    def __init__(self) -> None:
        self.free_sequences = self.free_tokens = 0.0
        """Of those that have a time budget and may have more members or fewer: answers, and tokens in them."""
        self.fixed_tokens = self.fixed_rows = 0.0
        """Of all others: tokens of answers, and these counted once for each member."""
        self.prompt_tokens = 0.0
        self._budgets_s = 0.0
        self._at = time.perf_counter()

    @property
    def tokens(self) -> float:
        """Of all answers."""
        return self.free_tokens + self.fixed_tokens

    @property
    def budget_s(self) -> float:
        """Mean time budget of those that may have more members or fewer."""
        return self._budgets_s / self.free_sequences

    def note_free(self, size: Size, *, prompt_tokens: float, budget_s: float, now: float) -> None:
        """A request was made that has so many seconds, and may have more members or fewer."""
        self.fade(now)
        self.free_sequences += size.num_sequences / _MEMORY_S
        self.free_tokens += size.total_tokens / _MEMORY_S
        self.prompt_tokens += prompt_tokens / _MEMORY_S
        self._budgets_s += size.num_sequences * budget_s / _MEMORY_S

    def note_fixed(self, size: Size, *, prompt_tokens: float, members: int, now: float) -> None:
        """A request was made that is served by so many members whatever happens."""
        self.fade(now)
        self.fixed_tokens += size.total_tokens / _MEMORY_S
        self.fixed_rows += size.total_tokens * members / _MEMORY_S
        self.prompt_tokens += prompt_tokens / _MEMORY_S

    def fade(self, now: float) -> None:
        """Let the time pass until `now`."""
        kept = math.exp(-max(0.0, now - self._at) / _MEMORY_S)
        self._at = max(self._at, now)
        self.free_sequences *= kept
        self.free_tokens *= kept
        self.fixed_tokens *= kept
        self.fixed_rows *= kept
        self.prompt_tokens *= kept
        self._budgets_s *= kept
