"""Placement: whether a request can begin on an engine now, at which tier and with how many members. Pure decisions.

A request with a deadline gets the largest number of members, up to the member cap, at which it is expected in time and at which
every other request with a deadline can still be in time if taken down to as many. Gains fall with every further member, so several
requests with a middling number are worth more than one with many among others with few. A number between two tiers is the larger
tier, begun without its lightest members.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from chorus.population.manifest import Tier
from chorus.serve.gateway.engines.latency import LatencyModel, Load, Work
from chorus.serve.gateway.engines.traffic import Traffic
from chorus.serve.gateway.request.size import Size

_FLOOR_PROBABILITY = 0.8
"""Probability with which a request must be expected in time to begin at its floor, where the alternative is to wait."""


class Blocked(Enum):
    """Why a request cannot begin."""

    FULL = "the engine is at its limit of sequences"
    LATE_NOW = "it would be late beside the running requests, or make one of them late"
    LATE = "it would be late even on an idle engine"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request to place."""

    tiers: Sequence[Tier]
    """Tiers that may serve it, from the largest to its floor."""
    size: Size
    finish_by: float | None
    """Its deadline, on the clock of `time.perf_counter`."""
    is_unattainable: bool = False
    """Whether even an idle engine would have been too slow when it came: it runs at its floor, without a deadline."""

    @property
    def has_deadline(self) -> bool:
        """Whether it can be in time."""
        return self.finish_by is not None and not self.is_unattainable

    @property
    def is_flexible(self) -> bool:
        """Whether its number of members is the gateway's to choose."""
        return self.has_deadline and len(self.tiers) > 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a request begins."""

    tier: Tier
    work: Work
    """Its members may be fewer than the tier's."""
    first_s: float
    token_s: float
    """Expected times; 0 if unknown."""

    @property
    def total_s(self) -> float:
        """Expected time to the last token."""
        return self.first_s + max(0, self.work.max_tokens - 1) * self.token_s


def place(
    job: Job,
    traffic: Traffic,
    model: LatencyModel,
    *,
    now: float,
    probability: float,
    max_sequences: int,
    pressure: float = 0.0,
    member_cap: int | None = None,
) -> Plan | Blocked:
    """How `job` begins now. `pressure`, from 0 to 1, takes away the largest tiers in proportion."""
    if traffic.num_sequences + job.size.num_sequences > max_sequences:
        return Blocked.FULL
    tiers = job.tiers[-1:] if job.is_unattainable else job.tiers[round(pressure * (len(job.tiers) - 1)) :]
    if not job.has_deadline or not model.is_seeded:
        return _expect_whole(tiers[0], job, traffic, model)
    assert job.finish_by is not None, "it has a deadline"
    left_s = job.finish_by - now
    candidates = _candidates(tiers)
    for candidate in candidates:
        is_floor = candidate is candidates[-1]
        if member_cap is not None and len(candidate.members) > member_cap and not is_floor:
            continue
        before, during = _loads(candidate, job, traffic)
        plan = _expect(candidate, job, before, during, model)
        margin = model.margin(_FLOOR_PROBABILITY if is_floor else probability, plan.total_s, can_shrink=not is_floor)
        if plan.total_s * margin > left_s:
            continue
        if not _makes_others_late(traffic, model, before, during, now, probability):
            return plan
    if min_s(job, model) > left_s:
        return Blocked.LATE
    return Blocked.LATE_NOW if traffic.in_flight else at_floor(job, traffic, model)  # waiting would not help


def at_floor(job: Job, traffic: Traffic, model: LatencyModel) -> Plan:
    """The smallest plan, for a request that will be late in any case."""
    return _expect_whole(job.tiers[-1], job, traffic, model)


def min_s(job: Job, model: LatencyModel) -> float:
    """Expected seconds at its floor on an idle engine; 0 if unknown."""
    return alone_s(job.tiers[-1], job, model)


def alone_s(tier: Tier, job: Job, model: LatencyModel) -> float:
    """Expected seconds at that tier on an idle engine; 0 if unknown."""
    if not model.is_seeded:
        return 0.0
    candidate = _Candidate(tier=tier, members=tier.members)
    alone = Load(members=len(candidate.members), rows=len(candidate.members) * job.size.num_sequences)
    return model.total_s(Load(), alone, _work(candidate, job.size, model))


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A tier, or the first members of one."""

    tier: Tier
    members: Sequence[str]


def _candidates(tiers: Sequence[Tier]) -> list[_Candidate]:
    """Every number of members from the largest of `tiers` down to the floor, each from the smallest tier that has so many."""
    found = []
    for tier, below in pairwise([*tiers, None]):
        assert tier is not None, "only the last one is followed by nothing"
        min_count = len(below.members) + 1 if below is not None else len(tier.members)
        found += [
            _Candidate(tier=tier, members=tier.members[:count]) for count in range(len(tier.members), min_count - 1, -1)
        ]
    return found


def _loads(candidate: _Candidate, job: Job, traffic: Traffic) -> tuple[Load, Load]:
    """The load before it begins and with it. With a deadline: if no other request that has one had more members than this one."""
    within = None if not job.has_deadline else len(candidate.members)
    during = traffic.load(adding=candidate.members, num_sequences=job.size.num_sequences, within=within)
    return traffic.load(within=within), during


def _expect(candidate: _Candidate, job: Job, before: Load, during: Load, model: LatencyModel) -> Plan:
    work = _work(candidate, job.size, model)
    return Plan(tier=candidate.tier, work=work, first_s=model.first_s(before, work), token_s=model.token_s(during))


def _expect_whole(tier: Tier, job: Job, traffic: Traffic, model: LatencyModel) -> Plan:
    candidate = _Candidate(tier=tier, members=tier.members)
    return _expect(candidate, job, *_loads(candidate, job, traffic), model)


def _work(candidate: _Candidate, size: Size, model: LatencyModel) -> Work:
    tokens = model.prompt_tokens(tokens=size.prompt_tokens, characters=size.prompt_characters)
    return Work(members=len(candidate.members), prompt_tokens=tokens, max_tokens=size.max_tokens)


def _makes_others_late(
    traffic: Traffic, model: LatencyModel, before: Load, during: Load, now: float, probability: float
) -> bool:
    """Whether a request that could be in time at the load `before` could not be at the load `during`."""
    others = [(each.tokens_left(now), each.finish_by - now) for each in traffic.in_flight if each.finish_by is not None]
    if not others:
        return False
    before_s, after_s = model.token_s(before), model.token_s(during)
    margin = model.margin(probability, before_s * sum(tokens for tokens, _ in others) / len(others))
    return any(tokens * before_s * margin <= left_s < tokens * after_s * margin for tokens, left_s in others)
