"""Keeping a request's time budget by dropping members from it while it runs: late is worse than slightly less accurate.

Pure decisions: what a step costs (learned from the steps that ran), whether a request will be late, and what it is answered by from
here on. `scheduler` applies them. The rule is Clipper's (Crankshaw et al., NSDI 2017): at the deadline, answer with what is there.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from serve.engine.mixture import Mixture
from serve.least_squares import LeastSquares

BUDGET_ARGUMENT = "chorus_time_budget_ms"
"""Key of a request's `vllm_xargs`: milliseconds from its arrival in which it should finish."""
FLOOR_ARGUMENT = "chorus_floor"
"""Key of a request's `vllm_xargs`: the tier below which no members are dropped; the cheapest by default."""

_FORGETTING = 0.98
_SCALES = (1.0, 1.0, 16.0, 16_384.0)


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """What makes a step long."""

    active_members: int = 0
    """Members that run at all: each costs a forward's fixed overhead."""
    member_rows: int = 0
    """Token rows, counted once for each member that runs them."""
    member_context: int = 0
    """Cached tokens that attention reads, counted once for each member."""

    @classmethod
    def of(cls, requests: Iterable[tuple[Mixture, int, int]]) -> "StepLoad":
        """The load of a step over requests given as (mixture, token rows, context length)."""
        members: set[int] = set()
        rows = context = 0
        for mixture, num_tokens, length in requests:
            members.update(mixture.members)
            rows += num_tokens * len(mixture.members)
            context += length * len(mixture.members)
        return cls(active_members=len(members), member_rows=rows, member_context=context)


class StepCost:
    """Seconds per step as a linear function of its load, learned from the steps that ran.

    Starts from nothing: `predict` gives None until enough steps have run. First steps after a start are left out: they load code
    and warm caches, and what they take must not drop members from every request of the next minute.
    """

    def __init__(self, *, warm_up: int = 4, min_steps: int = 8) -> None:
        self._model = LeastSquares(_SCALES, forgetting=_FORGETTING)
        self._warm_up = warm_up
        self._min_steps = min_steps

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        if self._warm_up:
            self._warm_up -= 1
            return
        self._model.observe(_features(load), seconds)

    def predict(self, load: StepLoad) -> float | None:
        """Seconds that a step of that load takes, never below zero; None while too few steps were seen."""
        return None if self._model.count < self._min_steps else self._model.predict(_features(load))


def _features(load: StepLoad) -> tuple[float, ...]:
    return 1.0, load.active_members, load.member_rows, load.member_context


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
    floor: frozenset[int]
    """Members that are never dropped."""
    drops: list[Drop] = field(default_factory=list)

    def is_kept(self, now: float, remaining_tokens: int, step_s: float | None) -> bool:
        """Whether the request finishes in time at `step_s` per token; while that is unknown, whether there is time left at all."""
        return now + remaining_tokens * (step_s or 0.0) <= self.finish_at


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
