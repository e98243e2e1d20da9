"""Keeping a request's time budget by dropping members from it while it runs: late is worse than slightly less accurate.

Pure decisions: what a step costs (learned from the steps that ran), whether a request will be late, and what it is answered by from
here on. `scheduler` applies them. The rule is Clipper's (Crankshaw et al., NSDI 2017): at the deadline, answer with what is there.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from chorus.serve.engine.mixture import Mixture
from chorus.serve.least_squares import LeastSquares

BUDGET_ARGUMENT = "chorus_time_budget_ms"
"""Key of a request's `vllm_xargs`: milliseconds from its arrival in which it should finish."""
FLOOR_ARGUMENT = "chorus_floor"
"""Key of a request's `vllm_xargs`: the tier below which no members are dropped; the cheapest by default."""
MOST_ARGUMENT = "chorus_most_members"
"""Key of a request's `vllm_xargs`: with a time budget, it begins with no more members than this."""
EXPECTED_ARGUMENT = "chorus_expected_tokens"
"""Key of a request's `vllm_xargs`: with a time budget, how many tokens it will probably generate, if fewer than it may."""
REPORT_ARGUMENT = "chorus_report_in_stop_reason"
"""Key of a request's `vllm_xargs`: asks for a report of what was computed, in the answer's `kv_transfer_params`.

A text that is not empty asks for it as the `stop_reason` as well: the text, then JSON with the real reason. vLLM's streams have no
other field for it. A request with a time budget is reported without being asked for.
"""

_LATENESS_TOLERANCE = 0.05
"""Part of what is still to come by which it may be expected late: a member that left does not come back, but a crowd goes away."""
_ON_TIME_DROP_COST = 3.0
"""How much more a member counts that leaves a request which is in time, for the sake of others."""
_FORGETTING = 0.998
_PACE_RATE, _MAX_PACE_CHANGE = 0.05, 3.0


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """What makes a step long."""

    requests: int = 0
    """Rows that are sampled from: one for each request, and one for each draft that is verified."""
    active_members: float = 0
    """Forwards of members, one for each that runs at all and one for each token that it drafts: each has a fixed overhead."""
    member_rows: float = 0
    """Token rows, counted once for each member that runs them."""
    member_context: int = 0
    """Cached tokens that attention reads, counted once for each member."""


class StepTally:
    """The load of a step, request by request, and without a member once it leaves one."""

    def __init__(self) -> None:
        self._requests_of: Counter[int] = Counter()
        self._requests = self._rows = self._context = self._draft_passes = 0

    def add(self, members: Sequence[int], *, rows: int, context: int, caught_up: int = 0, drafts: int = 0) -> None:
        """A request of these members computes so many token rows after a context of so many tokens.

        Args:
            caught_up: rows that single members run beside them, for tokens of steps that left them out.
            drafts: rows among `rows` that verify drafts.
        """
        self._requests += 1 + drafts
        self._requests_of.update(members)
        self._rows += rows * len(members) + caught_up
        self._context += context * len(members)

    def draft(self, passes: int, *, rows: int) -> None:
        """Beside the step, drafting members run so many forwards with so many rows in all."""
        self._draft_passes += passes
        self._rows += rows

    def drop(self, member: int, *, rows: int, context: int) -> None:
        """The member leaves a request that was added with these rows, this context and no drafts."""
        self._requests_of[member] -= 1
        if not self._requests_of[member]:
            del self._requests_of[member]
        self._rows -= rows
        self._context -= context

    def copy(self) -> "StepTally":
        """One that can be changed by itself."""
        other = copy.copy(self)
        other._requests_of = self._requests_of.copy()
        return other

    def load(self) -> StepLoad:
        """The load as it is now."""
        return StepLoad(
            requests=self._requests,
            active_members=len(self._requests_of) + self._draft_passes,
            member_rows=self._rows,
            member_context=self._context,
        )


class StepCost:
    """Seconds per step as a linear function of its load, learned from the steps that ran.

    What members take and what is left of a step are learned apart. Steps of one set of members, all there may be for hours,
    cannot tell a member's cost from a step's, and then nothing would seem to be gained by running fewer: whoever is a little
    behind would lose all (bench/LOG.md). For the same reason proportions are forgotten slowly. A machine that is slower now is
    so in all parts: one factor follows that fast.

    Starts from nothing: `predict` gives None until enough steps have run. First steps after a start are left out: they load code
    and warm caches, and what they take must not drop members from every request of the next minute.
    """

    def __init__(self, *, warm_up: int = 4, min_steps: int = 8) -> None:
        self._members = LeastSquares((1.0, 16.0, 16_384.0), forgetting=_FORGETTING)
        self._overhead = LeastSquares((1.0, 16.0), forgetting=_FORGETTING)
        self._pace = 1.0
        """How slow the last steps were, as a multiple of what is learned."""
        self._warm_up = warm_up
        self._min_steps = min_steps

    def observe(self, load: StepLoad, seconds: float, *, members_s: float) -> None:
        """Learn from a step: `seconds` until the next could begin, and those of them that members and mixing took."""
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
        """Whether enough steps were seen."""
        return self._members.count >= self._min_steps

    def predict(self, load: StepLoad) -> float | None:
        """Seconds that a step of that load takes, never below zero; None while too few steps were seen."""
        if not self.is_known:
            return None
        return self._pace * self.expect(load)

    def parts(self) -> dict[str, float]:
        """Seconds by what they are for, once enough steps were seen: a step at all, and each thing that its load counts."""
        if not self.is_known:
            return {}
        names = ("member", "row", "context", "step", "request")
        seconds = self._members.coefficients() + self._overhead.coefficients()
        return {name: self._pace * value for name, value in zip(names, seconds, strict=True)}

    def expect(self, load: StepLoad) -> float:
        """Seconds by what is learned, whatever the pace of the last steps."""
        return self._members.predict(_member_features(load)) + self._overhead.predict(_overhead_features(load))


def _member_features(load: StepLoad) -> tuple[float, ...]:
    return load.active_members, load.member_rows, load.member_context


def _overhead_features(load: StepLoad) -> tuple[float, ...]:
    return 1.0, load.requests


@dataclass(frozen=True, kw_only=True)
class Drop:
    """One member leaving a request."""

    member: int
    at_token: int
    """Tokens generated before it left."""
    reason: str


@dataclass(kw_only=True)
class Deadline:
    """A request's time budget, and what was done to keep it."""

    finish_at: float
    """In `time.time()` seconds."""
    way_down: tuple[tuple[int, Mixture], ...]
    """The members that may leave, in their order, each with the mixture that is left."""
    expected_tokens: int | None = None
    """How many it will probably generate; None if all that it may."""
    drops: list[Drop] = field(default_factory=list)

    @property
    def may_leave(self) -> tuple[tuple[int, Mixture], ...]:
        """What of `way_down` is still ahead."""
        return self.way_down[len(self.drops) :]

    def tokens_left(self, num_tokens: int, max_tokens: int) -> int:
        """How many are still to come after `num_tokens`. Beyond what was expected, twice as many are expected, and so on."""
        expected = max(1, self.expected_tokens or max_tokens)
        while expected <= num_tokens:
            expected *= 2
        return min(expected, max_tokens) - num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Runner:
    """A request with a time budget, as far as keeping it goes."""

    left_s: float
    """Until its deadline."""
    remaining_tokens: int
    num_members: int
    may_leave: tuple[int, ...]
    """Members, in the order in which they would leave."""
    context: int
    """Cached tokens."""

    @property
    def max_step_s(self) -> float:
        """Seconds of a step with which it still ends in time."""
        return self.left_s / max(1, self.remaining_tokens) / (1 - _LATENESS_TOLERANCE)


def choose_drops(runners: Sequence[Runner], tally: StepTally, step_s: Callable[[StepLoad], float]) -> list[int]:
    """How many members each runner drops now, so that as many as possible end in time with as many members as possible.

    A step is no shorter while anybody needs its last members. Where members cost more than their rows, those who are behind would
    go to their floors for nothing beside one who is not (bench/LOG.md). So two ways are weighed: only those who are behind drop, or
    all do, those with most members first. Better is the one that keeps more in time, and then the one that costs less: the sum of
    what each loses in the logarithm of its members (gains fall with every further one), more for those who are not behind.

    Args:
        runners: requests that have a time budget and run in the next step.
        tally: everything that runs in it.
        step_s: seconds of a step of that load.
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
    """Drops under consideration."""

    def __init__(
        self, runners: Sequence[Runner], tally: StepTally, step_s: Callable[[StepLoad], float], fastest_s: float
    ) -> None:
        self.drops = [0] * len(runners)
        self._runners = runners
        self._tally = tally.copy()
        self._predict = step_s
        self._step_s = self._initial_step_s = step_s(tally.load())
        # From the most urgent on. Who would be late even if everybody were at the floor goes there, and holds nobody else up.
        order = sorted(range(len(runners)), key=lambda idx: runners[idx].max_step_s)
        self._order = [idx for idx in order if runners[idx].max_step_s >= fastest_s]
        for idx in order[: len(order) - len(self._order)]:
            while self._can_drop(idx):
                self._drop(idx)

    def drop_from_late(self) -> None:
        """Those who are behind drop, level by level, each until it is in time."""
        self._drop_largest(lambda runner: runner.max_step_s)

    def drop_from_all(self) -> None:
        """All drop, level by level, until the most urgent is in time."""
        tightest_s = min((self._runners[idx].max_step_s for idx in self._order), default=math.inf)
        self._drop_largest(lambda runner: tightest_s)

    def score(self) -> tuple[int, float]:
        """How many end in time, and less for what is lost for that."""
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
    """The members that can leave one after the other down to `floor`, each with the mixture that is left without it."""
    steps: list[tuple[int, Mixture]] = []
    while (step := without_member(mixture, floor, fitted)) is not None:
        steps.append(step)
        mixture = step[1]
    return tuple(steps)


def without_member(mixture: Mixture, floor: frozenset[int], fitted: Iterable[Mixture]) -> tuple[int, Mixture] | None:
    """The member of smallest weight outside `floor`, and the mixture without it; None when only the floor is left.

    Where a tier consists of exactly the members that remain, its fitted weights are taken; otherwise the weights are renormalised.
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
