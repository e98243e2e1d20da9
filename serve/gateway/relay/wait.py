"""How long the gateway waits for an engine's words, and what a finished answer teaches about the engine."""

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from chorus.serve.gateway.admission.admission import Grant
from chorus.serve.gateway.engines.latency import Work
from chorus.serve.gateway.request.size import Usage

LEAD_S = 0.01
"""What is cut at a deadline is cut so much before it, so that it arrives in time."""
_NOTICEABLE_S = 0.05
_MOMENT_S = 1.0


class Stop(Enum):
    """Why the wait ended before the answer did."""

    DEADLINE = "the time budget is spent"
    LOST = "the engine went away"
    STALLED = "the engine has sent nothing for too long"
    STUCK = "the client takes nothing"


class StoppedError(Exception):
    """The wait is over."""

    def __init__(self, why: Stop) -> None:
        super().__init__(why.value)
        self.why = why


class Wait:
    """One request on one engine: the wait for it, and the notes for the model."""

    def __init__(self, grant: Grant, *, deadline: float | None, stall_s: float) -> None:
        self.grant = grant
        self._deadline = deadline
        self._stall_s = stall_s
        self._patience = asyncio.Timeout(None)
        self._life = grant.engine.life
        self._is_sending = False
        self._heard_at = 0.0
        self._is_silent = False
        self._silence: asyncio.TimerHandle | None = None
        self._blocked_s = 0.0
        self._blocked_at = -math.inf

    @property
    def is_behind(self) -> bool:
        """Whether the client is slow to take words, or was a moment ago: a send that waits ends when the client leaves."""
        return self._is_sending or time.perf_counter() - self._blocked_at < _MOMENT_S

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Around handing words to the client, who may be slow to take them: that says nothing about the engine."""
        began_at, self._is_sending = time.perf_counter(), True
        yield
        self._is_sending = False
        now = time.perf_counter()
        self._blocked_s += now - began_at
        if now - began_at > _NOTICEABLE_S:
            self._blocked_at = now

    async def __aenter__(self) -> "Wait":
        self._patience = asyncio.timeout(None)
        await self._patience.__aenter__()
        if self._deadline is not None:
            loop = asyncio.get_running_loop()
            self._patience.reschedule(loop.time() + self._deadline - LEAD_S - time.perf_counter())
        self.grant.engine.waiting.add(self._patience)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.grant.engine.waiting.discard(self._patience)
        if self._silence is not None:
            self._silence.cancel()
        try:
            await self._patience.__aexit__(kind, error, trace)  # type: ignore[arg-type]
        except TimeoutError:
            raise StoppedError(self._why()) from None

    def heard(self, num_events: int) -> None:
        """The engine sent so many events: the wait begins anew."""
        in_flight = self.grant.in_flight
        if in_flight.first_at is None:
            self.grant.engine.traffic.note_first(in_flight)
        # Each sequence's first token comes alone.
        num_first = min(num_events, max(0, in_flight.num_sequences - in_flight.num_tokens))
        in_flight.num_tokens += num_first + (num_events - num_first) * in_flight.tokens_per_event
        self._life.heard()
        self._heard_at = self._life.heard_at
        if self._silence is None:
            self._silence = asyncio.get_running_loop().call_later(self._stall_s, self._look_at_silence)

    def teach(self, usage: Usage | None, *, streamed: bool, characters: int) -> None:
        """The answer is complete: its times go into the engine's model.

        `characters` of its prompt came as text, 0 if it came as tokens. An answer that members left on the way teaches as any
        other: to leave those out, or to count them as late, was tried and was no better (bench/LOG.md).
        """
        now = time.perf_counter()
        engine, in_flight = self.grant.engine, self.grant.in_flight
        self._life.heard()
        if usage is None or self._blocked_s > _NOTICEABLE_S:
            return
        if in_flight.num_sequences == 1:
            engine.model.observe_prompt(characters=characters, tokens=usage.prompt_tokens)
        tokens = max(1.0, usage.completion_tokens / in_flight.num_sequences)
        work = Work(
            members=in_flight.work.members, prompt_tokens=usage.prompt_tokens, max_tokens=in_flight.work.max_tokens
        )
        total_s = now - in_flight.began_at
        expected_s = in_flight.expected_first_s + (tokens - 1) * in_flight.expected_token_s
        engine.model.observe_total(expected_s=expected_s, seconds=total_s)
        load = engine.traffic.mean_load(in_flight, now)
        if streamed and in_flight.first_at is not None:
            engine.model.observe_first(in_flight.before, work, in_flight.first_at - in_flight.began_at)
            if load is not None and tokens >= 4:
                engine.model.observe_tokens(load, (now - in_flight.first_at) / (tokens - 1))
        elif load is not None:
            engine.model.observe_whole(in_flight.before, load, work, tokens, now - in_flight.began_at)

    def _look_at_silence(self) -> None:
        """End the wait if it has been silent for too long; where the whole engine is silent, it may be at a long step."""
        longest_s = self._stall_s if self._is_sending else self.grant.engine.longest_silence_s()
        left_s = self._heard_at + longest_s - time.monotonic()
        loop = asyncio.get_running_loop()
        if left_s > 0:
            # Soon again, as the reason for a longer silence may go.
            self._silence = loop.call_later(min(left_s, self._stall_s), self._look_at_silence)
        elif not self._patience.expired():
            self._is_silent = True
            self._patience.reschedule(loop.time())

    def _why(self) -> Stop:
        if not self.grant.engine.is_up or self.grant.engine.life is not self._life:
            return Stop.LOST
        # Not by the clock: uvloop's timers have whole milliseconds, so a wait may end more than one before its time.
        if not self._is_silent:
            return Stop.DEADLINE
        return Stop.STUCK if self._is_sending else Stop.STALLED
