"""The requests in flight on one engine, and the load they put on it: now, and on average over a stretch of time.

`Traffic` is the only writer of `InFlight`. Times are those of `time.perf_counter`, in seconds.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from chorus.population.manifest import Tier
from chorus.serve.gateway.engines.latency import Load, Work


def _now() -> float:
    return time.perf_counter()  # looked up at each call: tests replace the clock


@dataclass(kw_only=True, eq=False)
class InFlight:
    """One request on an engine."""

    tier: Tier
    floor: Tier
    num_sequences: int
    work: Work
    finish_by: float | None
    """Its deadline, if it has one."""
    began_at: float = field(default_factory=_now)
    expected_first_s: float = 0.0
    expected_token_s: float = 0.0
    """Expected times when it was admitted; 0 if unknown."""
    tokens_per_event: int = 1
    """Of a stream, after the first token of each sequence, which comes alone."""

    before: Load = field(default_factory=Load)
    """The engine's load when it began, without it."""
    first_at: float | None = None
    """When its first token came."""
    num_tokens: int = 0
    """Tokens received so far, of all sequences."""
    num_ended: int = 0
    """Sequences that are complete."""
    num_generated: int | None = None
    """Tokens that the engine generated in all, once that is known."""
    integrals: tuple[float, float] = (0.0, 0.0)
    """`Traffic`'s integrals of members and rows when it began or, later, at its first token."""

    @property
    def members(self) -> Sequence[str]:
        """The members it began with."""
        return self.tier.members[: self.work.members]

    @property
    def num_running(self) -> int:
        """Sequences that are not complete."""
        return self.num_sequences - self.num_ended

    @property
    def max_members(self) -> int | None:
        """How many of the tier's members it began with; None if with all."""
        return self.work.members if self.work.members < len(self.tier.members) else None

    @property
    def expected_s(self) -> float:
        """Expected time to the last of `work.max_tokens`."""
        return self.expected_first_s + max(0, self.work.max_tokens - 1) * self.expected_token_s

    def tokens_left(self, now: float) -> float:
        """Tokens of each sequence still to come: counted for a stream, else estimated from the time that passed."""
        if self.num_tokens:
            return max(0.0, self.work.max_tokens - self.num_tokens / self.num_sequences)
        share = (now - self.began_at) / self.expected_s if self.expected_s else 0.0
        return self.work.max_tokens * max(0.0, 1.0 - share)


class Traffic:
    """All requests in flight on one engine."""

    def __init__(self) -> None:
        self.in_flight: set[InFlight] = set()
        self.num_sequences = 0
        self._rows = 0
        self._members: Counter[str] = Counter()
        self._integrals = (0.0, 0.0)
        """Integrals over time of the number of members, and of member rows, that ran."""
        self._advanced_at = _now()

    def load(self, *, adding: Sequence[str] = (), num_sequences: int = 1, within: int | None = None) -> Load:
        """The load of each step, with another request of `num_sequences` by the members `adding`.

        With `within`, every request that has a deadline counts with at most that many members, or its floor: the engine takes
        them all down that far when one of them is behind.
        """
        if within is None:
            members, rows = set(self._members), self._rows
        else:
            members, rows = set[str](), 0
            for each in self.in_flight:
                count = each.work.members
                if each.finish_by is not None:
                    count = min(count, max(within, len(each.floor.members)))
                members.update(each.tier.members[:count])
                rows += count * each.num_running
        return Load(members=len(members.union(adding)), rows=rows + len(adding) * num_sequences)

    def begin(self, request: InFlight) -> None:
        """A request was sent to the engine."""
        self._advance()
        request.before = self.load()
        request.integrals = self._integrals
        self.in_flight.add(request)
        self._add(request, request.num_sequences)
        self._members.update(request.members)

    def note_events(self, request: InFlight, num_events: int) -> None:
        """A stream brought `num_events` events with tokens."""
        if request.first_at is None:
            self._advance()
            request.first_at = _now()
            request.integrals = self._integrals
        num_first = min(num_events, max(0, request.num_sequences - request.num_tokens))
        request.num_tokens += num_first + (num_events - num_first) * request.tokens_per_event

    def end_sequences(self, request: InFlight, count: int) -> None:
        """`count` of its sequences are complete: their places are free, though the others still run."""
        count = min(count, request.num_running)
        if request in self.in_flight and count:
            self._advance()
            request.num_ended += count
            self._add(request, -count)

    def note_generated(self, request: InFlight, num_tokens: int | None) -> None:
        """How many tokens the engine generated for it; None if that is unknown."""
        request.num_generated = num_tokens

    def end(self, request: InFlight) -> None:
        """It was answered, or broken off."""
        if request not in self.in_flight:
            return
        self._advance()
        self.in_flight.remove(request)
        self._add(request, -request.num_running)
        self._members.subtract(request.members)
        self._members = +self._members

    def mean_load(self, request: InFlight, now: float) -> Load | None:
        """The mean load since its first token, or since it began if no token was seen; None if that was just now."""
        self._advance()
        passed_s = now - (request.first_at or request.began_at)
        if passed_s < 1e-4:
            return None
        members, rows = (after - before for after, before in zip(self._integrals, request.integrals, strict=True))
        return Load(members=members / passed_s, rows=rows / passed_s)

    def _add(self, request: InFlight, num_sequences: int) -> None:
        self.num_sequences += num_sequences
        self._rows += request.work.members * num_sequences

    def _advance(self) -> None:
        now = _now()
        passed_s = now - self._advanced_at
        self._integrals = (
            self._integrals[0] + len(self._members) * passed_s,
            self._integrals[1] + self._rows * passed_s,
        )
        self._advanced_at = now
