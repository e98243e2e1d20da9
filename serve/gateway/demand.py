"""How much is being asked for lately, and how many members everybody could have if all had the same number.

What runs now says little about the next second: beside an idle engine the largest tier always fits, and whoever comes next pays for
it. Gains fall with every further member, so it is better to serve all with the number that can be kept up or, where that lies
between two numbers, with these in such a proportion that it is the mean.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from serve.gateway.costs import StepCosts
from serve.gateway.latency import LatencyModel, Load, Work
from serve.gateway.terms import Size

_MEMORY_S = 2.0
_FULL = 0.95
"""Part of an engine's time above which nothing can be kept up."""
_BURSTS = 1.15
"""Requests come in bursts: what is kept up must be kept up at so much more than the mean."""
_PROMPT = 256
"""Tokens over which a prompt's cost is taken from the model."""
_HALVINGS = 6
_LEAST_CREDIT, _MOST_CREDIT = -20.0, 4.0


@dataclass(frozen=True, kw_only=True)
class Supply:
    """What there is to serve requests."""

    model: LatencyModel
    costs: StepCosts | None
    """What a step costs, where the engine says so; else that is guessed from the model."""
    num_engines: int
    max_sequences: int
    """That run on each engine at once."""
    probability: float
    """With which a time budget is to be kept."""


class Demand:
    """Rates of tokens asked for, as exponentially weighted means over some seconds."""

    def __init__(self) -> None:
        self._free = self._fixed = self._rows = self._prompt = 0.0
        """Tokens per second that any tier may give, and that only one may; rows per second of the latter; tokens of prompts."""
        self._at = time.perf_counter()
        self._steady = math.inf
        self._credit = 0.0
        """Members that requests had less than could be kept up, summed over them."""

    def note(self, size: Size, *, prompt_tokens: float, members: int | None, now: float) -> None:
        """A request was made. `members` if only a tier of so many may serve it."""
        self._fade(now)
        if members is None:
            self._free += size.total_tokens / _MEMORY_S
        else:
            self._fixed += size.total_tokens / _MEMORY_S
            self._rows += size.total_tokens * members / _MEMORY_S
        self._prompt += prompt_tokens / _MEMORY_S

    def most_members(self, supply: Supply, sizes: Sequence[int], work: Work, left_s: float, now: float) -> float:
        """How many members a request may have that should end in `left_s`, where there are tiers of `sizes`."""
        self._fade(now)
        steady = self._steady_members(supply, sizes, work, left_s)
        self._steady = steady
        above = [size for size in sizes if size > steady]
        return min(above) if above and steady not in sizes and self._credit >= 0 else steady

    def note_granted(self, members: int) -> None:
        """A request that might have had more or fewer got so many."""
        if self._steady < math.inf:
            self._credit = min(_MOST_CREDIT, max(_LEAST_CREDIT, self._credit + self._steady - members))

    def _steady_members(self, supply: Supply, sizes: Sequence[int], work: Work, left_s: float) -> float:
        """The largest size that all could have and, between it and the next one, the largest mean of a mixture of both.

        While anybody has the larger size, each step runs all its members: where members cost more than their rows, there is nothing
        between two sizes.
        """
        most_running = supply.max_sequences * supply.num_engines

        def fits(members: float, active: int) -> bool:
            token_s = self._token_s(supply, work, members, active)
            total_s = work.max_tokens * token_s
            if total_s > left_s or (self._free + self._fixed) * token_s > most_running:
                return False
            return total_s * supply.model.margin(supply.probability, total_s) <= left_s

        kept_up = max((size for size in sizes if fits(size, size)), default=min(sizes))
        above = min((size for size in sizes if size > kept_up), default=kept_up)
        low, high = float(kept_up), float(above)
        for _ in range(_HALVINGS if above > kept_up else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle, above) else (low, middle)
        return low

    def _token_s(self, supply: Supply, work: Work, members: float, active: int) -> float:
        """Seconds per token if those who may had so many members on average, with `active` in all; infinite if too much.

        With a step of a + b rows and sequences that come at a given rate, Little's law gives rows = rate * step, hence
        step = a / (1 - b rate).
        """
        rows, prompt_rows = self._free * members + self._rows, self._prompt * members
        if (costs := supply.costs) is not None:
            base_s = costs.step + costs.member * active
            context = work.prompt_tokens + work.max_tokens / 2
            busy = costs.request * (self._free + self._fixed) + (costs.row + costs.context * context) * rows
            busy += costs.row * prompt_rows
        else:
            base_s, row_s, prompt_s = _guess(supply.model, active)
            busy = row_s * rows + prompt_s * self._prompt
        busy *= _BURSTS / supply.num_engines
        return base_s / (1.0 - busy) if busy < _FULL else math.inf

    def _fade(self, now: float) -> None:
        kept = math.exp(-max(0.0, now - self._at) / _MEMORY_S)
        self._free, self._fixed = self._free * kept, self._fixed * kept
        self._rows, self._prompt = self._rows * kept, self._prompt * kept
        self._at = max(self._at, now)


def _guess(model: LatencyModel, active: int) -> tuple[float, float, float]:
    """Seconds of a step with so many members, of a row in it and of a prompt's token, as whole answers make one think."""
    base_s = model.token_s(Load(members=active))
    row_s = model.token_s(Load(members=active, rows=1)) - base_s
    short, long = (Work(members=active, prompt_tokens=tokens, max_tokens=1) for tokens in (0, _PROMPT))
    return base_s, row_s, (model.first_s(Load(), long) - model.first_s(Load(), short)) / _PROMPT
