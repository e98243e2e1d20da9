"""Whether a request can begin on an engine now, and at which tier. Pure decisions; `admission` applies them.

With a deadline: of the numbers of members that everybody may have as things go (`level`), the largest at which the request is
expected in time, with the set probability, and at which everybody else who has a deadline could still be in time if taken down to
as many. That shares what there is: gains fall with every further member, so several requests at a middling number are worth more
than one large among small ones. A number between two tiers is the larger tier, begun without some members.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from chorus.population.manifest import Tier
from chorus.serve.gateway.engines.latency import LatencyModel, Load, Work
from chorus.serve.gateway.engines.traffic import Traffic
from chorus.serve.gateway.request.size import Size

_AT_FLOOR = 0.8
"""Probability with which a request must be expected in time to begin at its floor, where the only choice is to begin or to wait."""


class Blocked(Enum):
    """Why a request cannot begin."""

    FULL = "the engine runs as many sequences as it may"
    LATE_NOW = "it would be late beside what runs, or make others late"
    LATE = "it would be late on an idle engine"


@dataclass(frozen=True, kw_only=True)
class Job:
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
    """Its members may be fewer than the tier's."""
    first_s: float
    token_s: float
    """Expected; 0 while nothing is known."""

    @property
    def total_s(self) -> float:
        """Expected time to the last token."""
        return self.first_s + max(0, self.work.max_tokens - 1) * self.token_s


def plan(
    job: Job,
    traffic: Traffic,
    model: LatencyModel,
    *,
    now: float,
    probability: float,
    max_sequences: int,
    pressure: float = 0.0,
    level: Callable[[], float] = lambda: math.inf,
) -> Plan | Blocked:
    """How `job` begins now. `pressure`, from 0 to 1, takes away the largest tiers in proportion.

    `level` says how many members everybody may have as things go; it is asked only where that matters.
    """
    if traffic.num_sequences + job.size.num_sequences > max_sequences:
        return Blocked.FULL
    tiers = job.tiers[min(len(job.tiers) - 1, round(pressure * (len(job.tiers) - 1))) :]
    if job.finish_by is None or not model.is_seeded:
        return _expect_whole(tiers[0], job, traffic, model)
    left_s = job.finish_by - now
    rungs = _rungs(tiers)
    most = level() if len(rungs) > 1 else math.inf
    for rung in rungs:
        is_floor = rung is rungs[-1]
        if len(rung.members) > most and not is_floor:
            continue
        before, during = _loads(rung, job, traffic)
        found = _expect(rung, job, before, during, model)
        margin = model.margin(_AT_FLOOR if is_floor else probability, found.total_s, can_shrink=not is_floor)
        if found.total_s * margin <= left_s and not _makes_others_late(
            traffic, model, before, during, now, probability
        ):
            return found
    if least_s(job, model) > left_s:
        return Blocked.LATE
    if not traffic.in_flight:
        return at_floor(job, traffic, model)  # nothing will be better for waiting
    return Blocked.LATE_NOW


def at_floor(job: Job, traffic: Traffic, model: LatencyModel) -> Plan:
    """The least that can be done for a request that will be late whatever is done."""
    return _expect_whole(job.tiers[-1], job, traffic, model)


def least_s(job: Job, model: LatencyModel) -> float:
    """Expected seconds at its floor on an idle engine; 0 while nothing is known."""
    return alone_s(job.tiers[-1], job, model)


def alone_s(tier: Tier, job: Job, model: LatencyModel) -> float:
    """Expected seconds at that tier on an idle engine; 0 while nothing is known."""
    if not model.is_seeded:
        return 0.0
    rung = _Rung(tier=tier, members=tier.members)
    alone = Load(members=len(rung.members), rows=len(rung.members) * job.size.num_sequences)
    return model.total_s(Load(), alone, _work(rung, job.size, model))


@dataclass(frozen=True, kw_only=True)
class _Rung:
    """A tier, or as many of its members as are wanted."""

    tier: Tier
    members: Sequence[str]


def _rungs(tiers: Sequence[Tier]) -> list[_Rung]:
    """Every number of members from the largest of `tiers` down to the floor, each from the smallest tier that has so many."""
    found = []
    for tier, below in pairwise([*tiers, None]):
        assert tier is not None, "only the last one is followed by nothing"
        least = len(below.members) + 1 if below is not None else len(tier.members)
        found += [_Rung(tier=tier, members=tier.members[:count]) for count in range(len(tier.members), least - 1, -1)]
    return found


def _loads(rung: _Rung, job: Job, traffic: Traffic) -> tuple[Load, Load]:
    """What runs before it begins and with it. With a deadline: if nobody else who has one had more members than this."""
    within = None if job.finish_by is None else len(rung.members)
    during = traffic.load(adding=rung.members, num_sequences=job.size.num_sequences, within=within)
    return traffic.load(within=within), during


def _expect(rung: _Rung, job: Job, before: Load, during: Load, model: LatencyModel) -> Plan:
    work = _work(rung, job.size, model)
    return Plan(tier=rung.tier, work=work, first_s=model.first_s(before, work), token_s=model.token_s(during))


def _expect_whole(tier: Tier, job: Job, traffic: Traffic, model: LatencyModel) -> Plan:
    rung = _Rung(tier=tier, members=tier.members)
    return _expect(rung, job, *_loads(rung, job, traffic), model)


def _work(rung: _Rung, size: Size, model: LatencyModel) -> Work:
    tokens = model.prompt_tokens(tokens=size.prompt_tokens, characters=size.prompt_characters)
    return Work(members=len(rung.members), prompt_tokens=tokens, max_tokens=size.max_tokens)


def _makes_others_late(
    traffic: Traffic, model: LatencyModel, before: Load, during: Load, now: float, probability: float
) -> bool:
    """Whether somebody who could be in time without the new request could not with it: the load goes from `before` to `during`."""
    others = [
        (in_flight.tokens_left(now), in_flight.finish_by - now)
        for in_flight in traffic.in_flight
        if in_flight.finish_by is not None
    ]
    if not others:
        return False
    before_s, after_s = model.token_s(before), model.token_s(during)
    margin = model.margin(probability, before_s * sum(tokens for tokens, _ in others) / len(others))
    return any(tokens * before_s * margin <= left_s < tokens * after_s * margin for tokens, left_s in others)
