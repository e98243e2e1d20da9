"""Which way of decoding yields most tokens per second, for the batch as it is.

Steps of every way are compared by what they are expected to cost (`deadline.StepCost`). That is linear in a step's load, and off by
a few tenths, or several times, for one way or another: rows that verify drafts are no rows of prompts, one row of a member costs
more than one of sixteen, and members run together only up to some number of rows. So each way has factors of its own, one for each
size of batch, learned from its own steps. They serve the comparison alone. Steps with drafts teach nothing else: what they take
more would go to the cost of a row, and be multiplied by the rows of longer drafts.
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
"""What a step is: some request of it verifies drafts, or else samples a member, or else all members of all requests run."""

_FIRST_ACCEPTANCE = 0.7
"""What is expected of drafts before any was verified."""
_DRAFTED_BY_MEMBERS_RATE = 0.05
_MAX_SAMPLED_SHARE = 0.75
"""Before the cost of steps is known: the part of the members below which they are sampled."""
_PACE_RATE, _NEW_PACE_RATE, _MAX_PACE_CHANGE = 0.15, 0.5, 3.0
"""How fast a way's factor follows its steps, and the first of them after steps of another way; the most that one step may say."""
_FADE_RATE, _MIN_PACE = 0.002, 0.3
"""How fast, and how far, the factors of ways that are not taken fall: each is tried again some day."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A running request, as far as the choice goes."""

    mixture: Mixture
    context: int
    """Cached tokens."""
    can_be_sampled: bool
    is_sampled: bool
    """Whether it is sampled whatever is chosen."""
    acceptance: Acceptance | None
    """Of its drafts; None if nothing is drafted for it."""


class DecodingChooser:
    """Chooses the way, and learns what the ways are worth."""

    def __init__(self, step_cost: StepCost) -> None:
        self.current = DecodingChoice()
        self.acceptance = Acceptance()
        """Of all requests: what is expected of the next one."""
        self._step_cost = step_cost
        self._drafted_by_members = 1.0
        """Part of the drafts that members made lately; the others were looked up and cost nothing."""
        self._paces: dict[int, dict[Kind, float]] = {}
        """The factors, by the size of the batch."""
        self._last: tuple[int, Kind] = (0, "plain")
        self._current_pace = self._pace(0)

    def observe_step(self, kind: Kind, load: StepLoad, seconds: float, *, num_requests: int) -> None:
        """A step of that kind and load, without prompts, took so long until the next could begin."""
        if not self._step_cost.is_known or (expected_s := self._step_cost.expect(load)) <= 0:
            return
        size = _size(num_requests)
        pace = self._pace(size)
        previous, rate = pace[kind], _PACE_RATE if (size, kind) == self._last else _NEW_PACE_RATE
        ratio = min(max(seconds / expected_s, previous / _MAX_PACE_CHANGE), previous * _MAX_PACE_CHANGE)
        faded = {each: max(_MIN_PACE, factor * (1 - _FADE_RATE)) for each, factor in pace.items()}
        self._paces[size], self._last = {**faded, kind: previous + rate * (ratio - previous)}, (size, kind)

    def _pace(self, size: int) -> dict[Kind, float]:
        """The factors for batches of that size; those of the nearest size until one was seen."""
        nearest = min(self._paces, key=lambda other: abs(other - size), default=None)
        return {"plain": 1.0, "sampled": 1.0, "drafts": 1.0} if nearest is None else self._paces[nearest]

    def observe_drafters(self, rows: int, drafts: int) -> None:
        """A step drafted up to so many tokens, for which members ran so many rows."""
        self._drafted_by_members += _DRAFTED_BY_MEMBERS_RATE * (min(rows / drafts, 1.0) - self._drafted_by_members)

    def choose(self, candidates: Sequence[Candidate]) -> None:
        """Choose for these requests, at least one."""
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
        """See `best_length`; `load` is that of a step without drafts."""
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
    """A class of batches: sizes that double."""
    return num_requests.bit_length()
