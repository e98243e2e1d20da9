"""Chooses the decoding that yields most tokens per second for the current batch.

Steps are compared by expected cost (`deadline.StepCost`), which is linear in the load and off by tens of percent, or several times,
for some decodings: draft rows do not cost what prompt rows do, a single row costs more than one of sixteen, and members run
together only up to some number of rows. So each decoding has a correction factor per batch size, used only in this comparison.
Steps with drafts train only these factors: as row cost, their extra time would be multiplied by the rows of longer drafts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from chorus.serve.engine.deadline import StepCost, StepLoad, StepTally
from chorus.serve.engine.decoding import (
    MIN_GAIN,
    Acceptance,
    DecodingChoice,
    best_draft_length,
    expected_num_members,
    heaviest,
)
from chorus.serve.engine.mixture import Mixture

Kind = Literal["plain", "sampled", "drafts"]
"""Kind of a step: `drafts` if some request drafts or verifies drafts, else `sampled` if some request samples a member."""

_FIRST_ACCEPTANCE = 0.7
"""Assumed acceptance rate before any draft was verified."""
_DRAFTED_BY_MEMBERS_RATE = 0.05
"""Learning rate of the share of drafts that members make."""
_MAX_SAMPLED_SHARE = 0.75
"""While step costs are unknown, members are sampled if that is expected to run at most this share of them."""
_PACE_RATE, _NEW_PACE_RATE, _MAX_PACE_CHANGE = 0.15, 0.5, 3.0
"""Learning rates of a factor: in general, and for the first step after one of another kind or size. One step counts as at most
`_MAX_PACE_CHANGE` times the factor, or that part of it."""
_FADE_RATE, _MIN_PACE = 0.002, 0.3
"""Factors of decodings not in use fall at this rate per step, down to this minimum, so that each is tried again eventually."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A running request, as input to `DecodingChooser.choose`."""

    mixture: Mixture
    context: int
    """Cached tokens."""
    can_be_sampled: bool
    is_sampled: bool
    """Whether it is sampled regardless of the choice."""
    acceptance: Acceptance | None
    """Acceptance of its drafts; None if nothing is drafted for it."""


class DecodingChooser:
    """Chooses the decoding of `auto` requests, and learns correction factors from the steps that ran."""

    def __init__(self, step_cost: StepCost) -> None:
        self.current = DecodingChoice()
        self.acceptance = Acceptance()
        """Acceptance over all requests, the prior for each new one."""
        self._step_cost = step_cost
        self._drafted_by_members = 1.0
        """Share of recent drafts made by members; the others were looked up and cost nothing."""
        self._paces: dict[int, dict[Kind, float]] = {}
        """Correction factors by batch size class, then by kind of step."""
        self._last: tuple[int, Kind] = (0, "plain")
        self._current_pace = self._pace(0)

    def observe_step(self, kind: Kind, load: StepLoad, seconds: float, *, num_requests: int) -> None:
        """Learn from a step without prompts that took `seconds` until the next could begin."""
        if not self._step_cost.is_known or (expected_s := self._step_cost.expect(load)) <= 0:
            return
        size = _size(num_requests)
        pace = self._pace(size)
        previous, rate = pace[kind], _PACE_RATE if (size, kind) == self._last else _NEW_PACE_RATE
        ratio = min(max(seconds / expected_s, previous / _MAX_PACE_CHANGE), previous * _MAX_PACE_CHANGE)
        faded = {each: max(_MIN_PACE, factor * (1 - _FADE_RATE)) for each, factor in pace.items()}
        self._paces[size], self._last = {**faded, kind: previous + rate * (ratio - previous)}, (size, kind)

    def _pace(self, size: int) -> dict[Kind, float]:
        """The factors for a batch size class; those of the nearest class until one of this class was observed."""
        nearest = min(self._paces, key=lambda other: abs(other - size), default=None)
        return {"plain": 1.0, "sampled": 1.0, "drafts": 1.0} if nearest is None else self._paces[nearest]

    def observe_drafters(self, rows: int, drafts: int) -> None:
        """Learn that of up to `drafts` drafts in a step, members computed `rows`."""
        self._drafted_by_members += _DRAFTED_BY_MEMBERS_RATE * (min(rows / drafts, 1.0) - self._drafted_by_members)

    def choose(self, candidates: Sequence[Candidate]) -> None:
        """Set `current` for a batch of at least one request."""
        tally = StepTally()
        for each in candidates:
            tally.add(each.mixture.members, rows=1, context=each.context)
        load = tally.load()
        undecided = [each.mixture for each in candidates if each.can_be_sampled and not each.is_sampled]
        certain = [each.mixture.members for each in candidates if not each.can_be_sampled]
        expected, plain = expected_num_members(undecided, certain)
        if not self._step_cost.is_known:
            self.current = DecodingChoice(samples=bool(undecided) and expected <= _MAX_SAMPLED_SHARE * plain)
            return
        drafting = [(each.acceptance, each.mixture) for each in candidates if each.acceptance is not None]
        self._current_pace = self._pace(_size(len(candidates)))
        drafts, tokens_per_s = self._best_draft_length(load, drafting, len(candidates))
        plain_s = self._predict("plain", load)
        samples = False
        if undecided:
            sampled_s = self._predict("sampled", replace(load, active_members=expected))
            if samples := MIN_GAIN * tokens_per_s * sampled_s <= len(candidates):
                rest = [
                    (each.acceptance, each.mixture)
                    for each in candidates
                    if each.acceptance is not None and not each.can_be_sampled
                ]
                drafts, tokens_per_s = self._best_draft_length(load, rest, len(candidates))
        self.current = DecodingChoice(samples=samples, drafts=drafts, gain=tokens_per_s * plain_s / len(candidates))

    def _predict(self, kind: Kind, load: StepLoad) -> float:
        return self._current_pace[kind] * self._step_cost.expect(load)

    def _best_draft_length(
        self, load: StepLoad, drafting: Sequence[tuple[Acceptance, Mixture]], num_requests: int
    ) -> tuple[int, float]:
        """See `decoding.best_draft_length`. `load` is that of a step without drafts."""
        drafters = len({heaviest(mixture) for _, mixture in drafting}) * self._drafted_by_members
        verified = sum(len(mixture.members) for _, mixture in drafting)
        rows = verified + len(drafting) * self._drafted_by_members

        def step_s(drafts: int) -> float:
            with_drafts = replace(
                load,
                requests=load.requests + drafts * len(drafting),
                active_members=load.active_members + drafts * drafters,
                member_rows=load.member_rows + drafts * rows,
            )
            return self._predict("drafts" if drafts else "plain", with_drafts) or 1.0

        expected = self.acceptance.rate(_FIRST_ACCEPTANCE)
        rates = [acceptance.rate(expected) for acceptance, _ in drafting]
        return best_draft_length(rates, num_requests - len(drafting), step_s)


def _size(num_requests: int) -> int:
    """The size class of a batch: bounds double from class to class."""
    return num_requests.bit_length()
