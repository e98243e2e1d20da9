"""One life of an engine: from the launch of its process, or from when one that others run began to answer, to its end.

Whatever is known of a process belongs to one life and is forgotten with it.

Slow is not dead. An engine counts as frozen when it has work and gives no sign of life for the stall timeout: nothing is heard of
it, none of its counters moves, and its processes, where they are ours to see, use no processor time. Silence has a reason, and may
last up to `_PATIENCE` times as long, at the first step of a life (it warms up), while the processes are busy, and as far as the
prompts to be read are expected to take so long.
"""

import asyncio
import math
import time
from collections.abc import Mapping

from chorus.serve.gateway.engines.breaker import Breaker

_PATIENCE = 10.0
"""Stall timeouts that may pass in silence for which there is a reason."""
_SLOWER = 10.0
"""Times its expected duration that a step may take: long prompts cost more than in proportion, and other work may be in the way."""
_STIR = 0.03
"""Part of a processor that the busiest of an engine's processes uses at least while it computes, however busy the machine is. A
worker that waits for a core that does not move was seen to use 0.016: vLLM's polls its queue (bench/LOG.md)."""
_WINDOW = 0.1
"""Part of the stall timeout over which that is measured."""


class Processes:
    """The processes of an engine of our own, below its guard."""

    def __init__(self, guard_pid: int) -> None:
        self._guard_pid = guard_pid

    def server_s(self) -> dict[int, float]:
        """Processor time that the API server has used, by process id; empty where that cannot be known."""
        return self._used_s(is_core=False)

    def core_s(self) -> dict[int, float]:
        """Processor time that the processes behind the API server have used; empty where there are none."""
        return self._used_s(is_core=True)

    def _used_s(self, *, is_core: bool) -> dict[int, float]:
        import psutil  # vLLM needs it: it is there where an engine is

        try:
            servers = psutil.Process(self._guard_pid).children()
            seen = [core for server in servers for core in server.children(recursive=True)] if is_core else servers
            times = {process.pid: process.cpu_times() for process in seen}
        except psutil.Error:
            return {}
        return {pid: each.user + each.system for pid, each in times.items()}


class Silence:
    """How long something has given no sign of life, as far as somebody looked: a gateway that was stopped itself blames nobody."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.end()

    def end(self) -> None:
        """There was a sign."""
        self.lasts_s = 0.0
        self._idle_s = 0.0
        self._used_s: Mapping[int, float] = {}
        self._used_at = -math.inf
        self._has_stirred = False
        self._looked_at = time.monotonic()

    @property
    def is_busy(self) -> bool:
        """Whether processor time was used during it, and lately."""
        return self._has_stirred and self._idle_s < self._timeout_s

    def is_too_long(self, used_s: Mapping[int, float], *, patience: float = 1.0) -> bool:
        """Whether it has lasted `patience` timeouts in which no process was busy, or in any case `_PATIENCE`.

        Args:
            used_s: processor time that each process has used so far; empty if nobody looked.
            patience: stall timeouts that may pass.
        """
        now = time.monotonic()
        passed_s = min(now - self._looked_at, self._timeout_s / 3)
        self._looked_at = now
        self.lasts_s += passed_s
        self._idle_s += passed_s
        window_s = now - self._used_at
        if used_s and window_s >= _WINDOW * self._timeout_s:
            busiest_s = max(used - self._used_s.get(pid, 0.0) for pid, used in used_s.items())
            if self._used_s and busiest_s >= _STIR * window_s:
                self._idle_s, self._has_stirred = 0.0, True
            self._used_s, self._used_at = used_s, now
        return self._idle_s >= patience * self._timeout_s or self.lasts_s >= _PATIENCE * self._timeout_s


class Life:
    """One process at one address. Times are those of `time.monotonic`, in seconds."""

    def __init__(self, url: str, *, stall_timeout_s: float, processes: Processes | None = None) -> None:
        self.url = url
        self.breaker = Breaker()
        self.froze = asyncio.Event()
        """Set when it no longer answers though it runs, or answers but does not get on with its work."""
        self.heard_at = time.monotonic()
        """When any request heard from it last."""
        self._stall_timeout_s = stall_timeout_s
        self._processes = processes
        self._has_worked = False
        self._seen_at = self.heard_at
        self._count: float | None = None
        self._work = Silence(stall_timeout_s)
        self._server = Silence(stall_timeout_s)

    @property
    def is_quiet(self) -> bool:
        """Whether it has work and has given no sign of life for a while."""
        return self._work.lasts_s > self._stall_timeout_s / 8

    def heard(self) -> None:
        """A request heard from it."""
        self.heard_at = time.monotonic()
        self._has_worked = True

    def counted(self, count: float | None) -> None:
        """Its counters, which move with every step, add up to `count`; None if it shows none: then its processes must tell."""
        if count is None:
            if self._processes is None:
                self._work.end()
        elif self._count is not None and count != self._count:
            self._work.end()
            self._has_worked = True
        self._count = count

    def rests(self) -> None:
        """It has nothing to do."""
        self._work.end()

    def answered(self) -> None:
        """Its server answered a probe."""
        self._server.end()

    async def is_stuck(self, expected_s: float) -> bool:
        """Whether it has been silent for too long, having work of which a step is expected to take `expected_s` at most."""
        if self.heard_at != self._seen_at:
            self._seen_at = self.heard_at
            self._work.end()
            return False
        used_s = await asyncio.to_thread(self._processes.core_s) if self.is_quiet and self._processes else {}
        return self._work.is_too_long(used_s, patience=self._patience(expected_s))

    async def is_deaf(self) -> bool:
        """Whether its server has not answered for too long."""
        used_s = await asyncio.to_thread(self._processes.server_s) if self._processes else {}
        return self._server.is_too_long(used_s)

    def longest_silence_s(self, expected_s: float) -> float:
        """How long one of its streams may be silent: longer than the stall timeout only where all are."""
        if time.monotonic() - self.heard_at < self._stall_timeout_s / 2:
            return self._stall_timeout_s
        return self._stall_timeout_s * (_PATIENCE if self._work.is_busy else self._patience(expected_s))

    def _patience(self, expected_s: float) -> float:
        if not self._has_worked:
            return _PATIENCE
        return min(_PATIENCE, max(1.0, _SLOWER * expected_s / self._stall_timeout_s))
