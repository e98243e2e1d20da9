"""Keeps a request's time budget by dropping members while it runs: a late answer is worse than a slightly less accurate one.

Pure decisions, applied by `scheduler`: what a step costs (learned from past steps), whether a request will be late, and which
members it drops. The rule is Clipper's (Crankshaw et al., NSDI 2017): at the deadline, answer with what is available.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from chorus.population.wire import StepCosts
from chorus.serve.engine.mixture import Mixture
from chorus.serve.least_squares import LeastSquares

_LATENESS_TOLERANCE = 0.05
"""Tolerated lateness, as a share of the expected remaining time: a dropped member never returns, but load may ease."""
_ON_TIME_DROP_COST = 3.0
"""Cost of dropping a member from a request that is on time, relative to one that is late."""
_FORGETTING = 0.998
_PACE_RATE, _MAX_PACE_CHANGE = 0.05, 3.0


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """The quantities that determine how long a step takes."""

    requests: int = 0
    """Sampled rows: one per request and one per verified draft."""
    active_members: float = 0
    """Forward passes: one per member that runs and one per token that it drafts. Each has a fixed overhead."""
    member_rows: float = 0
    """Member rows: token rows, counted once per member that runs them."""
    member_context: int = 0
    """Cached tokens that attention reads, counted once per member."""


class StepTally:
    """Sums up the load of a step over its requests, and updates it when a request drops a member."""

    def __init__(self) -> None:
        self._requests_of: Counter[int] = Counter()
        self._requests = self._rows = self._context = self._draft_passes = 0

    def add(self, members: Sequence[int], *, rows: int, context: int, caught_up: int = 0, drafts: int = 0) -> None:
        """Add a request whose `members` each compute `rows` token rows after `context` cached tokens.

        Args:
            members: members that run for the request.
            rows: token rows per member, those that verify drafts included.
            context: cached tokens that attention reads.
            caught_up: catch-up rows of all members together, in addition to `rows`.
            drafts: how many of `rows` verify drafts.
        """
        self._requests += 1 + drafts
        self._requests_of.update(members)
        self._rows += rows * len(members) + caught_up
        self._context += context * len(members)

    def draft(self, passes: int, *, rows: int) -> None:
        """Add the forward passes of drafting members, with `rows` member rows in total."""
        self._draft_passes += passes
        self._rows += rows

    def drop(self, member: int, *, rows: int, context: int) -> None:
        """Remove `member` from a request that was added with the same `rows` and `context` and without drafts."""
        self._requests_of[member] -= 1
        if not self._requests_of[member]:
            del self._requests_of[member]
        self._rows -= rows
        self._context -= context

    def copy(self) -> "StepTally":
        """An independent copy."""
        other = copy.copy(self)
        other._requests_of = self._requests_of.copy()
        return other

    def load(self) -> StepLoad:
        """The current sums."""
        return StepLoad(
            requests=self._requests,
            active_members=len(self._requests_of) + self._draft_passes,
            member_rows=self._rows,
            member_context=self._context,
        )


class StepCost:
    """Seconds per step as a linear function of its load, learned from past steps.

    The time of members and the overhead of a step are fitted separately. If all steps run the same members, which can last for
    hours, total times cannot separate the cost of a member from that of a step. Dropping members would then seem to save nothing,
    and a request slightly behind would lose all of them (bench/LOG.md). For the same reason the coefficients adapt slowly. A
    machine that slows down does so in all parts, which one fast-adapting factor, the pace, covers.

    `predict` returns None until `min_steps` steps were observed. The first `warm_up` steps are ignored: they load code and warm
    caches, and their durations must not drop members from every request of the next minute.
    """

    def __init__(self, *, warm_up: int = 4, min_steps: int = 8) -> None:
        self._members = LeastSquares((1.0, 16.0, 16_384.0), forgetting=_FORGETTING)
        self._overhead = LeastSquares((1.0, 16.0), forgetting=_FORGETTING)
        self._pace = 1.0
        """Duration of recent steps over what the coefficients predict."""
        self._warm_up = warm_up
        self._min_steps = min_steps

    def observe(self, load: StepLoad, seconds: float, *, members_s: float) -> None:
        """Learn from a step.

        Args:
            load: what the step computed.
            seconds: time until the next step could begin.
            members_s: the part of `seconds` spent in members and mixing.
        """
        if self._warm_up:
            self._warm_up -= 1
            return
        if (expected_s := self.expect(load)) > 0:
            ratio = min(max(seconds / expected_s, self._pace / _MAX_PACE_CHANGE), self._pace * _MAX_PACE_CHANGE)
            self._pace += _PACE_RATE * (ratio - self._pace)
        members_s = min(members_s, seconds)
        self._members.observe(_member_features(load), members_s)
        self._overhead.observe(_overhead_features(load), seconds - members_s)

    @property
    def is_known(self) -> bool:
        """Whether enough steps were observed."""
        return self._members.count >= self._min_steps

    def predict(self, load: StepLoad) -> float | None:
        """Expected seconds of a step with this load, never negative; None until enough steps were observed."""
        if not self.is_known:
            return None
        return self._pace * self.expect(load)

    def parts(self) -> StepCosts | None:
        """Seconds per step, and per unit of each load quantity; None until enough steps were observed."""
        if not self.is_known:
            return None
        seconds = self._members.coefficients() + self._overhead.coefficients()
        member, row, context, step, request = (self._pace * value for value in seconds)
        return StepCosts(step=step, request=request, member=member, row=row, context=context)

    def expect(self, load: StepLoad) -> float:
        """Expected seconds by the coefficients alone, without the pace of recent steps."""
        return self._members.predict(_member_features(load)) + self._overhead.predict(_overhead_features(load))


def _member_features(load: StepLoad) -> tuple[float, ...]:
    return load.active_members, load.member_rows, load.member_context


def _overhead_features(load: StepLoad) -> tuple[float, ...]:
    return 1.0, load.requests


@dataclass(frozen=True, kw_only=True)
class Drop:
    """A member dropped from a request."""

    member: int
    at_token: int
    """Tokens generated before the drop."""
    reason: str


@dataclass(kw_only=True)
class Deadline:
    """A request's deadline, and the members dropped to meet it."""

    finish_at: float
    """In `time.time()` seconds."""
    way_down: tuple[tuple[int, Mixture], ...]
    """The members that may be dropped, in this order, each with the mixture that remains without it."""
    expected_tokens: int | None = None
    """Tokens that the request will probably generate; None for `max_tokens`."""
    drops: list[Drop] = field(default_factory=list)

    @property
    def may_leave(self) -> tuple[tuple[int, Mixture], ...]:
        """The rest of `way_down`."""
        return self.way_down[len(self.drops) :]

    def tokens_left(self, num_tokens: int, max_tokens: int) -> int:
        """Tokens still expected after `num_tokens`. The expected total doubles each time it is reached, up to `max_tokens`."""
        expected = max(1, self.expected_tokens or max_tokens)
        while expected <= num_tokens:
            expected *= 2
        return min(expected, max_tokens) - num_tokens

    def drop(self, *, at_token: int, reason: str) -> tuple[int, Mixture]:
        """Drop the next member after `at_token` tokens. Returns it, and the mixture that remains."""
        member, mixture = self.may_leave[0]
        self.drops.append(Drop(member=member, at_token=at_token, reason=reason))
        return member, mixture


@dataclass(frozen=True, kw_only=True, slots=True)
class Runner:
    """A running request with a time budget, as input to `choose_drops`."""

    left_s: float
    """Seconds until its deadline."""
    remaining_tokens: int
    num_members: int
    may_leave: tuple[int, ...]
    """Members that may be dropped, in this order."""
    context: int
    """Cached tokens."""

    @property
    def max_step_s(self) -> float:
        """Longest step, in seconds, with which it still meets its deadline."""
        return self.left_s / max(1, self.remaining_tokens) / (1 - _LATENESS_TOLERANCE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheduled:
    """A request in the next step, as input to `keep_deadlines`."""

    members: Sequence[int]
    """The members that run for it."""
    context: int
    """Cached tokens."""
    deadline: Deadline | None
    """None if it drops no members now."""
    num_tokens: int
    """Tokens generated so far."""
    max_tokens: int


def keep_deadlines(scheduled: Sequence[Scheduled], now: float, step_s: Callable[[StepLoad], float]) -> list[int]:
    """How many members each request drops before the next step, so that requests meet their deadlines; see `choose_drops`.

    Args:
        scheduled: all requests of the step.
        now: on the clock of `Deadline.finish_at`.
        step_s: seconds that a step of a given load takes.
    """
    tally, drops = StepTally(), [0] * len(scheduled)
    positions, runners = list[int](), list[Runner]()
    for position, request in enumerate(scheduled):
        tally.add(request.members, rows=1, context=request.context)
        if (deadline := request.deadline) is not None:
            positions.append(position)
            runners.append(
                Runner(
                    left_s=deadline.finish_at - now,
                    remaining_tokens=deadline.tokens_left(request.num_tokens, request.max_tokens),
                    num_members=len(request.members),
                    may_leave=tuple(member for member, _ in deadline.may_leave),
                    context=request.context,
                )
            )
    for position, count in zip(positions, choose_drops(runners, tally, step_s), strict=True):
        drops[position] = count
    return drops


def choose_drops(runners: Sequence[Runner], tally: StepTally, step_s: Callable[[StepLoad], float]) -> list[int]:
    """How many members each runner drops now, so that as many as possible finish on time with as many members as possible.

    Compares two plans: only late requests drop members, or all do, those with the most members first. The plan with more requests
    on time wins; between equals, the one of lower cost, sum over requests of c log(members before / members after), with c = 1
    for late requests and `_ON_TIME_DROP_COST` for others. The logarithm is there because each further member gains less.

    The second plan is needed because a member costs a pass as long as any request needs it. Where passes cost more than rows, late
    requests would drop to their floors beside one on time, and gain nothing (bench/LOG.md).

    Args:
        runners: the requests with a time budget that run in the next step.
        tally: the load of all requests in that step.
        step_s: seconds that a step of a given load takes.
    """
    if not runners or min(runner.max_step_s for runner in runners) >= step_s(tally.load()):
        return [0] * len(runners)
    at_floor = tally.copy()
    for runner in runners:
        for member in runner.may_leave:
            at_floor.drop(member, rows=1, context=runner.context)
    fastest_s = step_s(at_floor.load())
    plans = [_Plan(runners, tally, step_s, fastest_s) for _ in range(2)]
    plans[0].drop_from_late()
    plans[1].drop_from_all()
    return max(plans, key=_Plan.score).drops


class _Plan:
    """A candidate assignment of drops, built up member by member."""

    def __init__(
        self, runners: Sequence[Runner], tally: StepTally, step_s: Callable[[StepLoad], float], fastest_s: float
    ) -> None:
        self.drops = [0] * len(runners)
        self._runners = runners
        self._tally = tally.copy()
        self._predict = step_s
        self._step_s = self._initial_step_s = step_s(tally.load())
        # The most urgent first. Requests that are late even with all at their floors go to theirs, and delay no others.
        order = sorted(range(len(runners)), key=lambda idx: runners[idx].max_step_s)
        self._order = [idx for idx in order if runners[idx].max_step_s >= fastest_s]
        for idx in order[: len(order) - len(self._order)]:
            while self._can_drop(idx):
                self._drop(idx)

    def drop_from_late(self) -> None:
        """Drop members of late requests, from the largest requests first, until each is on time."""
        self._drop_largest(lambda runner: runner.max_step_s)

    def drop_from_all(self) -> None:
        """Drop members of all requests, from the largest first, until the most urgent is on time."""
        tightest_s = min((self._runners[idx].max_step_s for idx in self._order), default=math.inf)
        self._drop_largest(lambda runner: tightest_s)

    def score(self) -> tuple[int, float]:
        """Requests on time, then the negative cost of the drops; higher is better. See `choose_drops`."""
        in_time = sum(runner.max_step_s >= self._step_s for runner in self._runners)
        cost = 0.0
        for runner, drops in zip(self._runners, self.drops, strict=True):
            weight = 1.0 if runner.max_step_s < self._initial_step_s else _ON_TIME_DROP_COST
            cost += weight * math.log(runner.num_members / (runner.num_members - drops))
        return in_time, -cost

    def _drop_largest(self, max_step_s: Callable[[Runner], float]) -> None:
        largest = max((self._runners[idx].num_members for idx in self._order), default=0)
        for size in range(largest, 1, -1):
            for idx in self._order:
                runner = self._runners[idx]
                has_size = runner.num_members - self.drops[idx] == size
                if has_size and self._can_drop(idx) and max_step_s(runner) < self._step_s:
                    self._drop(idx)

    def _can_drop(self, idx: int) -> bool:
        return self.drops[idx] < len(self._runners[idx].may_leave)

    def _drop(self, idx: int) -> None:
        runner = self._runners[idx]
        self._tally.drop(runner.may_leave[self.drops[idx]], rows=1, context=runner.context)
        self.drops[idx] += 1
        self._step_s = self._predict(self._tally.load())


@lru_cache(maxsize=256)
def way_down(mixture: Mixture, floor: frozenset[int], fitted: tuple[Mixture, ...]) -> tuple[tuple[int, Mixture], ...]:
    """The members that can be dropped down to `floor`, in order, each with the mixture that remains without it."""
    steps: list[tuple[int, Mixture]] = []
    while (step := without_member(mixture, floor, fitted)) is not None:
        steps.append(step)
        mixture = step[1]
    return tuple(steps)


def without_member(mixture: Mixture, floor: frozenset[int], fitted: Iterable[Mixture]) -> tuple[int, Mixture] | None:
    """The member of smallest weight outside `floor`, and the mixture without it.

    If a tier in `fitted` has exactly the remaining members, its weights apply; otherwise the remaining weights are renormalised.
    Returns None if only members of the floor, or only one member, remain.
    """
    candidates = [
        (weight, member) for member, weight in zip(mixture.members, mixture.weights, strict=True) if member not in floor
    ]
    if not candidates or len(mixture.members) == 1:
        return None
    _, dropped = min(candidates)
    kept = [
        (member, weight) for member, weight in zip(mixture.members, mixture.weights, strict=True) if member != dropped
    ]
    members = tuple(member for member, _ in kept)
    for tier in fitted:
        if tier.members == members:
            return dropped, replace(tier, tier=mixture.tier)
    total = sum(weight for _, weight in kept)
    return dropped, replace(mixture, members=members, weights=tuple(weight / total for _, weight in kept))
