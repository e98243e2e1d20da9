"""One life of an engine, and all state that ends with it: from its launch, or its first answer if others run it, to its end.

Slow is not dead. An engine with work counts as frozen after a stall timeout without output, without counters that move and (if
its processes are visible) without processor use. Up to `_MAX_TIMEOUTS` timeouts are allowed at the first step of a life (warm-up),
while its processes are busy, and if reading its prompts is expected to take that long.
"""

import asyncio
import math
import time
from collections.abc import Mapping

from chorus.serve.gateway.engines.breaker import Breaker

_MAX_TIMEOUTS = 10.0
"""Most stall timeouts that may pass in silence for one of these reasons."""
_MAX_SLOWDOWN = 10.0
"""Multiple of its expected duration that a step may take: long prompts cost more than in proportion; other work may interfere."""
_MIN_BUSY_SHARE = 0.03
"""Least share of a processor that an engine's busiest process uses while it computes, however busy the machine is. A worker
that waits for a hung core was seen to use 0.016: vLLM's worker polls its queue (bench/LOG.md)."""
_WINDOW_SHARE = 0.1
"""Share of the stall timeout over which processor use is measured."""


class Processes:
    """The processes of a supervised engine, below its guard."""

    def __init__(self, guard_pid: int) -> None:
        self._guard_pid = guard_pid

    def server_s(self) -> dict[int, float]:
        """Processor seconds used by the API server, by process id; empty if they cannot be read."""
        return self._used_s(is_core=False)

    def core_s(self) -> dict[int, float]:
        """Processor seconds used by the processes behind the API server, by process id; empty if there are none."""
        return self._used_s(is_core=True)

    def _used_s(self, *, is_core: bool) -> dict[int, float]:
        import psutil  # a dependency of vLLM, so it is installed wherever an engine is

        try:
            servers = psutil.Process(self._guard_pid).children()
            found = [core for server in servers for core in server.children(recursive=True)] if is_core else servers
            times = {process.pid: process.cpu_times() for process in found}
        except psutil.Error:
            return {}
        return {pid: each.user + each.system for pid, each in times.items()}


class Silence:
    """Time without a sign of life. A gap between two checks counts for a third of the timeout at most: the gateway may have been
    stopped itself."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.reset()

    def reset(self) -> None:
        """There was a sign of life: start again from zero."""
        self.duration_s = 0.0
        self._idle_s = 0.0
        self._used_s: Mapping[int, float] = {}
        self._used_at = -math.inf
        self._was_busy = False
        self._checked_at = time.monotonic()

    @property
    def is_busy(self) -> bool:
        """Whether processor time was used during the silence, and recently."""
        return self._was_busy and self._idle_s < self._timeout_s

    def is_too_long(self, used_s: Mapping[int, float], *, max_timeouts: float = 1.0) -> bool:
        """Whether it has lasted `max_timeouts` timeouts without a busy process, or `_MAX_TIMEOUTS` timeouts in any case.

        Args:
            used_s: processor seconds used so far by each process id; empty if not measured.
            patience: stall timeouts that may pass.
        """
        now = time.monotonic()
        passed_s = min(now - self._checked_at, self._timeout_s / 3)
        self._checked_at = now
        self.duration_s += passed_s
        self._idle_s += passed_s
        window_s = now - self._used_at
        if used_s and window_s >= _WINDOW_SHARE * self._timeout_s:
            busiest_s = max(used - self._used_s.get(pid, 0.0) for pid, used in used_s.items())
            if self._used_s and busiest_s >= _MIN_BUSY_SHARE * window_s:
                self._idle_s, self._was_busy = 0.0, True
            self._used_s, self._used_at = used_s, now
        return self._idle_s >= max_timeouts * self._timeout_s or self.duration_s >= _MAX_TIMEOUTS * self._timeout_s


class Life:
    """One process at one address. Times are those of `time.monotonic`, in seconds."""

    def __init__(self, url: str, *, stall_timeout_s: float, processes: Processes | None = None) -> None:
        self.url = url
        self.breaker = Breaker()
        self.frozen = asyncio.Event()
        """Set when the process runs but no longer answers, or answers but makes no progress."""
        self.last_output_at = time.monotonic()
        """When any request last received output from it."""
        self._stall_timeout_s = stall_timeout_s
        self._processes = processes
        self._has_worked = False
        self._last_seen_output_at = self.last_output_at
        self._progress: float | None = None
        self._work_silence = Silence(stall_timeout_s)
        self._server_silence = Silence(stall_timeout_s)

    @property
    def is_quiet(self) -> bool:
        """Whether it has work and has given no sign of life for an eighth of the stall timeout."""
        return self._work_silence.duration_s > self._stall_timeout_s / 8

    def note_output(self) -> None:
        """A request received output from it."""
        self.last_output_at = time.monotonic()
        self._has_worked = True

    def note_progress(self, count: float | None) -> None:
        """Record the sum of its progress counters; None if it has none: then only its processes can show that it is stuck."""
        if count is None:
            if self._processes is None:
                self._work_silence.reset()
        elif self._progress is not None and count != self._progress:
            self._work_silence.reset()
            self._has_worked = True
        self._progress = count

    def note_idle(self) -> None:
        """It has no work."""
        self._work_silence.reset()

    def note_probe_answered(self) -> None:
        """Its server answered a probe."""
        self._server_silence.reset()

    async def is_stuck(self, expected_s: float) -> bool:
        """Whether it has been silent for too long with work. Its longest step is expected to take `expected_s`."""
        if self.last_output_at != self._last_seen_output_at:
            self._last_seen_output_at = self.last_output_at
            self._work_silence.reset()
            return False
        used_s = await asyncio.to_thread(self._processes.core_s) if self.is_quiet and self._processes else {}
        return self._work_silence.is_too_long(used_s, max_timeouts=self._max_timeouts(expected_s))

    async def is_unresponsive(self) -> bool:
        """Whether its server has not answered for too long."""
        used_s = await asyncio.to_thread(self._processes.server_s) if self._processes else {}
        return self._server_silence.is_too_long(used_s)

    def longest_silence_s(self, expected_s: float) -> float:
        """How long one of its streams may be silent, in seconds: more than the stall timeout only if all streams are."""
        if time.monotonic() - self.last_output_at < self._stall_timeout_s / 2:
            return self._stall_timeout_s
        return self._stall_timeout_s * (_MAX_TIMEOUTS if self._work_silence.is_busy else self._max_timeouts(expected_s))

    def _max_timeouts(self, expected_s: float) -> float:
        if not self._has_worked:
            return _MAX_TIMEOUTS
        return min(_MAX_TIMEOUTS, max(1.0, _MAX_SLOWDOWN * expected_s / self._stall_timeout_s))
