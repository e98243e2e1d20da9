"""The member cap: the most members that requests with a time budget begin with, one number per engine for all of them.

A step runs every member that any of its requests has, so one request with many members costs nearly as much as if all had them.
The cap follows from demand (tokens per second that were requested lately) and from what each step costs. It may exceed what can be
sustained while the backlog is short: the time budgets leave slack, and the cap falls before the backlog has used it up.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from chorus.population.wire import StepCosts
from chorus.serve.expected_loss import expected_loss
from chorus.serve.gateway.admission.demand import Rates
from chorus.serve.gateway.engines.latency import LatencyModel, Load, Work

_MAX_BACKLOG_TO_RISE = 0.5
"""Part of its slack that the backlog may take for the cap to rise to a number of members."""
_HORIZON_S = 1.0
"""Time over which one member less must be sustainable, for a number to be worth its risk."""
_MAX_PROMPT_SHARE = 0.95
"""Most of an engine's time that prompts are taken to need."""
_PROMPT_TOKENS = 256
"""Tokens over which a prompt's cost is taken from the latency model."""


@dataclass(frozen=True, kw_only=True)
class Supply:
    """The engines that serve the demand."""

    model: LatencyModel
    costs: StepCosts | None
    """What the engine reports of its steps; without it they are estimated by the model."""
    num_engines: int
    max_sequences: int
    """On each engine at once."""
    probability: float
    """With which a time budget is to be kept."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What to expect if all flexible requests have a number of members. In tokens of answers."""

    slack: float
    """Tokens that may wait without a request missing its time budget."""
    excess: float
    """Tokens requested beyond those served, per second."""
    scatter: float
    """Standard deviation of the tokens that are requested in a second."""

    @property
    def is_sustainable(self) -> bool:
        """Whether the backlog does not grow."""
        return self.excess <= 0

    def probability_sustained(self, seconds: float) -> float:
        """Probability that no more is requested in that time than is served, if requests come at random."""
        return NormalDist(self.excess * seconds, max(1e-9, self.scatter * math.sqrt(seconds))).cdf(0.0)


class MemberCap:
    """The cap of one engine. It has a state: it falls late and rises early, each by its own rule."""

    def __init__(self) -> None:
        self._members = 0

    def update(
        self,
        rates: Rates | None,
        supply: Supply,
        *,
        max_members: int,
        backlog: float,
        losses: Mapping[int, float] | None = None,
    ) -> int:
        """The cap, from 1 to `max_members`. `backlog` is in tokens of answers; `losses` of mixtures, by their size, in nats.

        It falls to the largest number whose slack still holds the backlog. It rises to the largest sustainable number once the
        backlog takes at most half of that one's slack, and by one more when there is no backlog. Numbers that are not worth their
        risk do not count.
        """
        if rates is None:
            return max_members
        forecasts = {members: forecast(rates, supply, members) for members in range(1, max_members + 1)}
        worthwhile = {
            members: each
            for members, each in forecasts.items()
            if members <= 2
            or forecasts[members - 1].probability_sustained(_HORIZON_S) >= _critical_ratio(members, losses or {})
        }
        highest = max(
            (m for m, f in worthwhile.items() if f.is_sustainable and backlog < _MAX_BACKLOG_TO_RISE * f.slack),
            default=1,
        )
        if not backlog and highest + 1 in worthwhile and worthwhile[highest + 1].slack > 0:
            highest += 1
        kept = (m for m, f in worthwhile.items() if m <= self._members and backlog < f.slack)
        self._members = max(highest, *kept, 1)
        return self._members


def _critical_ratio(members: int, losses: Mapping[int, float]) -> float:
    """Probability with which one member less must be sustainable, for `members` to be worth their risk.

    They fill the backlog, so that the next burst is served with two fewer. This is the critical ratio of the newsvendor (Arrow,
    Harris, Marschak 1951), of what that loses and what they gain. Without losses, gains fall as 1 / members, like the variance of
    a mean.
    """

    def loss(size: int) -> float:
        return expected_loss(size, losses) if losses else 1 / size

    gain, risk = (max(0.0, loss(size - 1) - loss(size)) for size in (members, members - 1))
    return risk / (gain + risk) if gain + risk else 0.5


def forecast(rates: Rates, supply: Supply, members: int) -> Forecast:
    """What to expect if all flexible requests have that number of members."""
    tokens = rates.flexible_tokens / rates.flexible_sequences
    token_s, served = _pace(rates, supply, members)
    total_s = tokens * token_s
    total_s *= supply.model.margin(supply.probability, total_s)
    return Forecast(slack=(rates.budget_s - total_s) * served, excess=rates.tokens - served, scatter=rates.scatter)


def _pace(rates: Rates, supply: Supply, members: int) -> tuple[float, float]:
    """Seconds per token, and the most tokens per second that can be served, if flexible requests have that number of members.

    A step takes a + b n with n sequences in it. If all n places are taken, tokens come at n / (a + b n). Else, by Little's law, n
    is the rate r at which tokens are requested times the length of the step, which is therefore a / (1 - b r).
    """
    rate = rates.tokens / supply.num_engines
    rows = (rates.flexible_tokens * members + rates.fixed_rows) / rates.tokens
    if (costs := supply.costs) is not None:
        step_s = costs.step + costs.member * _active_members(rates, supply, costs, members)
        context = rates.flexible_tokens / rates.flexible_sequences * (rates.prompt_tokens / rates.tokens + 0.5)
        sequence_s = costs.request + (costs.row + costs.context * context) * rows
        prompt_token_s = costs.row * members
    else:
        step_s = supply.model.token_s(Load(members=members))
        sequence_s = rows * (supply.model.token_s(Load(members=members, rows=1)) - step_s)
        prompt_token_s = _prompt_token_s(supply.model, members)
    left = 1 - min(_MAX_PROMPT_SHARE, prompt_token_s * rates.prompt_tokens / supply.num_engines)
    full_s = (step_s + sequence_s * supply.max_sequences) / left
    rest = left - sequence_s * rate
    token_s = min(full_s, step_s / rest) if rest > 0 else full_s
    return token_s, supply.num_engines * supply.max_sequences / full_s


def _active_members(rates: Rates, supply: Supply, costs: StepCosts, members: int) -> float:
    """Expected number of members that a step runs: more than `members` while a request with a fixed, larger number is in flight."""
    if not rates.fixed_tokens:
        return members
    more = max(0.0, rates.fixed_rows / rates.fixed_tokens - members)
    expected = rates.fixed_tokens / supply.num_engines * (costs.step + costs.member * members)
    return members + more * (1 - math.exp(-expected))


def _prompt_token_s(model: LatencyModel, members: int) -> float:
    """Seconds per token of a prompt, by the expected times to a first token."""
    short, long = (Work(members=members, prompt_tokens=tokens, max_tokens=1) for tokens in (0, _PROMPT_TOKENS))
    return (model.first_s(Load(), long) - model.first_s(Load(), short)) / _PROMPT_TOKENS
