"""How many members everybody may have as things go: one number for all who may have more or fewer, not for each what is idle.

What runs now says little about the next second: beside an idle engine all members always fit, and whoever comes next pays for it.
Gains fall with every further member, so it is better to serve all with the same number. Where what can be kept up lies between two
numbers, these take turns. While anybody has the larger one, each step runs all its members, so that serving some with more and some
with fewer costs nearly as much as serving all with more; but time budgets are a store. The larger number runs while it fills the
queue, the smaller one while that drains. A full store is nothing to fall back on, though: where the next number down costs much
more than this one brings, less is risked.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from chorus.serve.expected_loss import expected_loss
from chorus.serve.gateway.admission.demand import Rates
from chorus.serve.gateway.engines.costs import StepCosts
from chorus.serve.gateway.engines.latency import LatencyModel, Load, Work

_STORE = 0.9
"""Part of what time budgets leave that a queue may take: the rest is for what nobody expects."""
_AGAIN = 2.0
"""A number is taken again, while requests wait, where it could be kept up with so many times as many."""
_BEGIN_S = 0.5
"""A number that cannot be kept up is begun only if it lasts for so long: in less, those who had another one are not even gone."""
_TAKE_S = 0.2
"""And gone down to only if it lasts for so long beside the queue that stands."""
_BURSTS = 1.0
"""Standard deviations by which more may come than on average."""
_RISK_S = 1.0
"""For so long the number below must be kept up with, for a number to be worth its risk."""
_LEAST_RISK = 0.05
"""And not with less than this probability, or more than 1 less this, whatever is lost or gained."""
_MOST_PROMPTS = 0.95
"""Part of an engine's time that prompts may seem to take: with more, nothing could be said."""
_PROMPT = 256
"""Tokens over which a prompt's cost is taken from the model."""


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


class Level:
    """The number of members that everybody may have."""

    def __init__(self) -> None:
        self._members = 0

    def choose(
        self,
        rates: Rates | None,
        supply: Supply,
        *,
        most: int,
        waiting_tokens: float,
        losses: Mapping[int, float] | None = None,
    ) -> int:
        """From 1 to `most`, while requests of so many tokens of answers wait. `losses` are those of mixtures, by their size.

        It goes down once the queue takes more than it may of the time budgets, as far as it has to. It goes up to what can be kept
        up when little is left of the queue, and to one more when nothing is. It is never more than what is worth its risk.
        """
        if rates is None:
            return most
        prospects = {members: prospect(rates, supply, members) for members in range(1, most + 1)}
        known = frozenset((losses or {}).items())
        worth = [
            members
            for members in prospects
            if members <= 2 or prospects[members - 1].probability_kept_up(_RISK_S) >= _enough(members, known)
        ]
        held = [
            members
            for members, each in prospects.items()
            if members in worth and each.lasts_s(waiting_tokens) > (0.0 if members == self._members else _TAKE_S)
        ]
        kept_up = [members for members in held if prospects[members].lasts_s(_AGAIN * waiting_tokens) == math.inf]
        highest = max(kept_up, default=1)
        if not waiting_tokens and highest + 1 in worth and prospects[highest + 1].lasts_s(0.0) > _BEGIN_S:
            highest += 1
        self._members = max([highest, *(members for members in held if members <= self._members)])
        return self._members


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """What becomes of the queue if all have so many members. In tokens of answers."""

    store: float
    """That may wait without too much being taken of the time budgets."""
    excess: float
    """Per second, by which more come than are served."""
    scatter: float
    """Standard deviation of those that come in a second."""

    def lasts_s(self, waiting: float) -> float:
        """Seconds until more wait than may, if so many wait now.

        After a time t there are e t more on average, with a standard deviation of d sqrt(t) where requests come at random: the s
        that may still come to wait are reached at e t + d sqrt(t) = s, or never.
        """
        store = self.store - waiting
        if store <= 0:
            return 0.0
        bursts = _BURSTS * self.scatter
        under_root = bursts**2 + 4 * self.excess * store
        return (2 * store / (bursts + math.sqrt(under_root))) ** 2 if under_root >= 0 else math.inf

    def probability_kept_up(self, seconds: float) -> float:
        """That no more come in so many seconds than are served."""
        return NormalDist(self.excess * seconds, max(1e-9, self.scatter * math.sqrt(seconds))).cdf(0.0)


@lru_cache
def _enough(members: int, losses: frozenset[tuple[int, float]]) -> float:
    """Probability with which one member less must be kept up for `members` to be worth their risk.

    They fill the queue, so that in the next burst there are two fewer. The critical ratio of the newsvendor (Arrow, Harris,
    Marschak 1951), of what that costs and what they bring. Where no losses are known, they are taken to fall with 1 / members,
    like the variance of a mean.
    """

    def loss(size: int) -> float:
        return expected_loss(size, dict(losses)) if losses else 1 / size

    brings, costs = (max(0.0, loss(size - 1) - loss(size)) for size in (members, members - 1))
    ratio = costs / (brings + costs) if brings + costs else 0.5
    return min(1 - _LEAST_RISK, max(_LEAST_RISK, ratio))


def prospect(rates: Rates, supply: Supply, members: int) -> Prospect:
    """What to expect if all who may have more members or fewer have so many."""
    tokens = rates.free_tokens / rates.free_sequences
    token_s, rate = _pace(rates, supply, members)
    total_s = tokens * token_s
    total_s *= supply.model.margin(supply.probability, total_s)
    return Prospect(
        store=_STORE * (rates.budget_s - total_s) * rate,
        excess=rates.tokens - rate,
        scatter=rates.scatter,
    )


def _pace(rates: Rates, supply: Supply, members: int) -> tuple[float, float]:
    """Seconds per token if those who may had so many members, and the most tokens per second that would be served.

    A step takes a + b n with n sequences in it. Where all n places are taken, tokens come at n / (a + b n). Else, by Little's law,
    n is the rate at which tokens are asked for, r, times the step's length, which is therefore a / (1 - b r).
    """
    rate = rates.tokens / supply.num_engines
    rows = (rates.free_tokens * members + rates.fixed_rows) / rates.tokens
    if (costs := supply.costs) is not None:
        step_s = costs.step + costs.member * _active(rates, supply, costs, members)
        context = rates.free_tokens / rates.free_sequences * (rates.prompt_tokens / rates.tokens + 0.5)
        sequence_s = costs.request + (costs.row + costs.context * context) * rows
        prompt_token_s = costs.row * members
    else:
        step_s = supply.model.token_s(Load(members=members))
        sequence_s = rows * (supply.model.token_s(Load(members=members, rows=1)) - step_s)
        prompt_token_s = _prompt_token_s(supply.model, members)
    left = 1 - min(_MOST_PROMPTS, prompt_token_s * rates.prompt_tokens / supply.num_engines)
    full_s = (step_s + sequence_s * supply.max_sequences) / left
    rest = left - sequence_s * rate
    token_s = min(full_s, step_s / rest) if rest > 0 else full_s
    return token_s, supply.num_engines * supply.max_sequences / full_s


def _active(rates: Rates, supply: Supply, costs: StepCosts, members: int) -> float:
    """Members that run at all: more than `members` while a request is there that is served by more whatever happens."""
    if not rates.fixed_tokens:
        return members
    more = max(0.0, rates.fixed_rows / rates.fixed_tokens - members)
    expected = rates.fixed_tokens / supply.num_engines * (costs.step + costs.member * members)
    return members + more * (1 - math.exp(-expected))


def _prompt_token_s(model: LatencyModel, members: int) -> float:
    """Seconds that a prompt's token takes, as first tokens make one think."""
    short, long = (Work(members=members, prompt_tokens=tokens, max_tokens=1) for tokens in (0, _PROMPT))
    return (model.first_s(Load(), long) - model.first_s(Load(), short)) / _PROMPT
