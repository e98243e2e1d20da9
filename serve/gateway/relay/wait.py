"""How long the gateway waits for an engine's answer: until its deadline, the loss of the engine, or a silence that is too long."""

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.traffic import InFlight

LEAD_S = 0.01
"""An answer that is cut at its deadline is cut this much earlier, so that it arrives in time."""
_BLOCKED_S = 0.05
"""A client that takes an event no faster is slow: the times of its request say little about the engine."""
_RECENT_S = 1.0


class Stop(Enum):
    """Why the wait ended before the answer did."""

    DEADLINE = "the deadline passed"
    LOST = "the connection to the engine was lost"
    STALLED = "the engine sent nothing for too long"
    STUCK = "the client stopped reading"


class StoppedError(Exception):
    """The wait is over."""

    def __init__(self, reason: Stop) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Wait:
    """The wait for one answer, as a context around everything that is done with it.

    Raises:
        StoppedError: on leaving, with the reason.
    """

    def __init__(self, engine: Engine, request: InFlight, *, deadline: float | None, stall_s: float) -> None:
        self._engine, self._request = engine, request
        self._deadline = deadline
        self._stall_s = stall_s
        self._timeout = asyncio.Timeout(None)
        self._life = engine.life
        self._is_sending = False
        self._last_output_at = 0.0
        self._is_silent = False
        self._silence: asyncio.TimerHandle | None = None
        self._blocked_s = 0.0
        self._blocked_at = -math.inf

    @property
    def is_behind(self) -> bool:
        """Whether the client is slow to take events, or was a moment ago: a send that waits ends when the client leaves."""
        return self._is_sending or time.perf_counter() - self._blocked_at < _RECENT_S

    @property
    def was_blocked(self) -> bool:
        """Whether the client held the answer up for a noticeable time."""
        return self._blocked_s > _BLOCKED_S

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Around passing events on: a client that is slow to take them says nothing about the engine."""
        began_at, self._is_sending = time.perf_counter(), True
        yield
        self._is_sending = False
        now = time.perf_counter()
        self._blocked_s += now - began_at
        if now - began_at > _BLOCKED_S:
            self._blocked_at = now

    async def __aenter__(self) -> "Wait":
        self._timeout = asyncio.timeout(None)
        await self._timeout.__aenter__()
        if self._deadline is not None:
            loop = asyncio.get_running_loop()
            self._timeout.reschedule(loop.time() + self._deadline - LEAD_S - time.perf_counter())
        self._engine.output_timeouts.add(self._timeout)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._engine.output_timeouts.discard(self._timeout)
        if self._silence is not None:
            self._silence.cancel()
        try:
            await self._timeout.__aexit__(kind, error, trace)  # type: ignore[arg-type]
        except TimeoutError:
            raise StoppedError(self._stop_reason()) from None

    def note_events(self, num_events: int) -> None:
        """The engine sent `num_events` events: its silence ends."""
        self._engine.traffic.note_events(self._request, num_events)
        self._life.note_output()
        self._last_output_at = self._life.last_output_at
        if self._silence is None:
            self._silence = asyncio.get_running_loop().call_later(self._stall_s, self._check_silence)

    def note_complete(self) -> None:
        """The whole answer came."""
        self._life.note_output()

    def _check_silence(self) -> None:
        """End the wait after too long a silence; longer if the whole engine is silent, which may be in a long step."""
        longest_s = self._stall_s if self._is_sending else self._engine.longest_silence_s()
        left_s = self._last_output_at + longest_s - time.monotonic()
        loop = asyncio.get_running_loop()
        if left_s > 0:
            # Checked again soon, as the reason for a longer silence may go.
            self._silence = loop.call_later(min(left_s, self._stall_s), self._check_silence)
        elif not self._timeout.expired():
            self._is_silent = True
            self._timeout.reschedule(loop.time())

    def _stop_reason(self) -> Stop:
        if not self._engine.is_up or self._engine.life is not self._life:
            return Stop.LOST
        # Not by the clock: uvloop's timers have whole milliseconds, so a wait may end a millisecond before its time.
        if not self._is_silent:
            return Stop.DEADLINE
        return Stop.STUCK if self._is_sending else Stop.STALLED
