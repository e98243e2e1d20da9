"""What runs on one engine now, and what it ran on average over a stretch of time. Times are those of `time.perf_counter`."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from chorus.population.manifest import Tier
from chorus.serve.gateway.engines.latency import Load, Work


@dataclass(kw_only=True, eq=False)
class InFlight:
    """One request on an engine."""

    tier: Tier
    floor: Tier
    num_sequences: int
    work: Work
    finish_by: float | None
    """When it should be complete."""
    began_at: float = field(
        default_factory=lambda: time.perf_counter()
    )  # the clock that is in force then: tests have their own
    before: Load = field(default_factory=Load)
    """What ran when it came."""
    expected_first_s: float = 0.0
    expected_token_s: float = 0.0
    """As they were when it was admitted; 0 while nothing was known."""
    first_at: float | None = None
    tokens_per_event: int = 1
    """Of a stream, after the first."""
    num_tokens: int = 0
    """Tokens seen so far, of all sequences."""
    num_ended: int = 0
    """Sequences that are complete."""
    generated: int | None = None
    """Tokens that the engine generated in all, once that is known."""
    area: tuple[float, float] = (0.0, 0.0)
    """Members and rows times seconds that the engine had run when it began or, once known, at its first token."""

    @property
    def members(self) -> Sequence[str]:
        """Names of those that it began with."""
        return self.tier.members[: self.work.members]

    @property
    def num_running(self) -> int:
        """Sequences that are not complete."""
        return self.num_sequences - self.num_ended

    @property
    def most_members(self) -> int | None:
        """How many of the tier's members it began with; None if with all."""
        return self.work.members if self.work.members < len(self.tier.members) else None

    @property
    def expected_s(self) -> float:
        """Expected time to its last token, should it generate all that it may."""
        return self.expected_first_s + max(0, self.work.max_tokens - 1) * self.expected_token_s

    def tokens_left(self, now: float) -> float:
        """Tokens of each sequence still to come: counted where the answer is a stream, else guessed from the time that passed."""
        if self.num_tokens:
            return max(0.0, self.work.max_tokens - self.num_tokens / self.num_sequences)
        share = (now - self.began_at) / self.expected_s if self.expected_s else 0.0
        return self.work.max_tokens * max(0.0, 1.0 - share)


class Traffic:
    """All requests on one engine."""

    def __init__(self) -> None:
        self.in_flight: set[InFlight] = set()
        self.num_sequences = 0
        self._rows = 0
        self._members: Counter[str] = Counter()
        self._area = (0.0, 0.0)
        self._looked_at = time.perf_counter()

    def load(self, *, adding: Sequence[str] = (), num_sequences: int = 1, within: int | None = None) -> Load:
        """What runs at each step, with a request of the members `adding` beside it.

        With `within`, as if every request that has a deadline had at most so many members, or its floor: so far down the engine
        takes them all when one of them is behind.
        """
        if within is None:
            members, rows = set(self._members), self._rows
        else:
            members, rows = set[str](), 0
            for in_flight in self.in_flight:
                count = in_flight.work.members
                if in_flight.finish_by is not None:
                    count = min(count, max(within, len(in_flight.floor.members)))
                members.update(in_flight.tier.members[:count])
                rows += count * in_flight.num_running
        return Load(members=len(members.union(adding)), rows=rows + len(adding) * num_sequences)

    def begin(self, in_flight: InFlight) -> None:
        """A request goes to the engine."""
        self._advance()
        in_flight.before = self.load()
        in_flight.area = self._area
        self.in_flight.add(in_flight)
        self._add(in_flight, in_flight.num_sequences)
        self._members.update(in_flight.members)

    def note_first(self, in_flight: InFlight) -> None:
        """Its first token is there."""
        self._advance()
        in_flight.first_at = time.perf_counter()
        in_flight.area = self._area

    def end_sequences(self, in_flight: InFlight, count: int) -> None:
        """So many of its sequences are complete: their places are free, though the others still run."""
        count = min(count, in_flight.num_running)
        if in_flight in self.in_flight and count:
            self._advance()
            in_flight.num_ended += count
            self._add(in_flight, -count)

    def end(self, in_flight: InFlight) -> None:
        """It is answered, or broken off."""
        if in_flight not in self.in_flight:
            return
        self._advance()
        self.in_flight.remove(in_flight)
        self._add(in_flight, -in_flight.num_running)
        self._members.subtract(in_flight.members)
        self._members = +self._members

    def _add(self, in_flight: InFlight, num_sequences: int) -> None:
        self.num_sequences += num_sequences
        self._rows += in_flight.work.members * num_sequences

    def mean_load(self, in_flight: InFlight, now: float) -> Load | None:
        """What ran on average since its first token, or since it began where no token was seen; None if that was just now."""
        self._advance()
        passed_s = now - (in_flight.first_at or in_flight.began_at)
        if passed_s < 1e-4:
            return None
        members, rows = (after - before for after, before in zip(self._area, in_flight.area, strict=True))
        return Load(members=members / passed_s, rows=rows / passed_s)

    def _advance(self) -> None:
        now = time.perf_counter()
        passed_s = now - self._looked_at
        self._area = (self._area[0] + len(self._members) * passed_s, self._area[1] + self._rows * passed_s)
        self._looked_at = now
