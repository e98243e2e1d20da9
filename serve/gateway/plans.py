"""Whether a request can begin on an engine now, and at which tier. Pure decisions; `admission` applies them.

With a deadline: of the tiers that are not too large for what is being asked for lately (`demand`), the largest at which the request
is expected in time, with the set probability, and at which everybody else who has a deadline could still be in time if taken down
to a tier of that size. That shares what there is: gains fall with every further member, so several requests at a middling tier are
worth more than one large among small ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from population.manifest import Tier
from serve.gateway.flights import Flights
from serve.gateway.latency import LatencyModel, Load, Work
from serve.gateway.terms import Size

_AT_FLOOR = 0.8
"""Probability with which a request must be expected in time to begin at its floor, where the only choice is to begin or to wait."""


class NotNow(Enum):
    """Why a request cannot begin."""

    FULL = "the engine runs as many sequences as it may"
    LATE_NOW = "it would be late beside what runs, or make others late"
    LATE = "it would be late on an idle engine"


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be planned."""

    tiers: Sequence[Tier]
    """Those that may serve it, from the largest to its floor."""
    size: Size
    finish_by: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a request begins."""

    tier: Tier
    work: Work
    first_s: float
    token_s: float
    """Expected; 0 while nothing is known."""

    @property
    def total_s(self) -> float:
        """Expected time to the last token."""
        return self.first_s + max(0, self.work.max_tokens - 1) * self.token_s


def plan(
    wish: Wish,
    flights: Flights,
    model: LatencyModel,
    *,
    now: float,
    probability: float,
    max_sequences: int,
    pressure: float = 0.0,
    most_members: Callable[[Sequence[int], Work, float], float] = lambda sizes, work, left_s: math.inf,
) -> Plan | NotNow:
    """How `wish` begins now. `pressure`, from 0 to 1, takes away the largest tiers in proportion.

    `most_members` says, for the sizes of the tiers, the work and the time left, how large a tier may be as things go.
    """
    # A request of more sequences than fit at all begins alone: the engine queues what it cannot run.
    if flights.num_sequences and flights.num_sequences + wish.size.num_sequences > max_sequences:
        return NotNow.FULL
    tiers = wish.tiers[min(len(wish.tiers) - 1, round(pressure * (len(wish.tiers) - 1))) :]
    works = [_work(tier, wish.size, model) for tier in tiers]
    if wish.finish_by is None or not model.is_seeded:
        return _expect(tiers[0], works[0], wish, flights, model)
    left_s = wish.finish_by - now
    most = most_members([len(tier.members) for tier in tiers], works[0], left_s)
    for tier, work in zip(tiers, works, strict=True):
        if len(tier.members) > most and tier is not tiers[-1]:
            continue
        found = _expect(tier, work, wish, flights, model)
        if tier is tiers[-1]:
            margin = model.margin(_AT_FLOOR, found.total_s, can_shrink=False)
        else:
            margin = model.margin(probability, found.total_s)
        if found.total_s * margin <= left_s and not _makes_others_late(
            flights, model, tier, wish.size.num_sequences, now, probability
        ):
            return found
    if model.total_s(Load(), _alone(tiers[-1], wish.size), works[-1]) > left_s:
        return NotNow.LATE
    if not flights.running:
        return at_floor(wish, flights, model)  # nothing will be better for waiting
    return NotNow.LATE_NOW


def at_floor(wish: Wish, flights: Flights, model: LatencyModel) -> Plan:
    """The least that can be done for a request that will be late whatever is done."""
    tier = wish.tiers[-1]
    return _expect(tier, _work(tier, wish.size, model), wish, flights, model)


def least_s(wish: Wish, model: LatencyModel) -> float:
    """Expected seconds at its floor on an idle engine; 0 while nothing is known."""
    if not model.is_seeded:
        return 0.0
    tier = wish.tiers[-1]
    return model.total_s(Load(), _alone(tier, wish.size), _work(tier, wish.size, model))


def _expect(tier: Tier, work: Work, wish: Wish, flights: Flights, model: LatencyModel) -> Plan:
    before = flights.load_within(len(tier.members)) if wish.finish_by is not None else flights.load()
    during = _beside(before, tier, wish.size.num_sequences)
    return Plan(tier=tier, work=work, first_s=model.first_s(before, work), token_s=model.token_s(during))


def _beside(load: Load, tier: Tier, num_sequences: int) -> Load:
    added = len(tier.members)
    return Load(members=max(load.members, added), rows=load.rows + added * num_sequences)


def _work(tier: Tier, size: Size, model: LatencyModel) -> Work:
    tokens = model.prompt_tokens(tokens=size.prompt_tokens, characters=size.prompt_characters)
    return Work(members=len(tier.members), prompt_tokens=tokens, max_tokens=size.max_tokens)


def _alone(tier: Tier, size: Size) -> Load:
    return Load(members=len(tier.members), rows=len(tier.members) * size.num_sequences)


def _makes_others_late(
    flights: Flights,
    model: LatencyModel,
    tier: Tier,
    num_sequences: int,
    now: float,
    probability: float,
) -> bool:
    """Whether somebody who could be in time without the new request could not with it, were all as small as `tier`."""
    others = [
        (flight.tokens_left(now), flight.finish_by - now) for flight in flights.running if flight.finish_by is not None
    ]
    if not others:
        return False
    without = flights.load_within(len(tier.members))
    with_it = _beside(without, tier, num_sequences)
    before_s, after_s = model.token_s(without), model.token_s(with_it)
    margin = model.margin(probability, before_s * sum(tokens for tokens, _ in others) / len(others))
    return any(tokens * before_s * margin <= left_s < tokens * after_s * margin for tokens, left_s in others)
