"""An engine as the gateway sees it: where it listens, whether it answers, and when one that does not will be back.

What it runs (`flights`), how long it takes (`model`) and whether it keeps failing (`breaker`) are noted beside it.
"""

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable

import aiohttp

from chorus.serve.gateway.breaker import Breaker
from chorus.serve.gateway.costs import StepCosts, read_costs
from chorus.serve.gateway.flights import Flights
from chorus.serve.gateway.latency import LatencyModel
from chorus.serve.gateway.squeeze import Squeeze

logger = logging.getLogger(__name__)

_FIRST_START_S = 30.0
"""What a start is taken to need before one was measured; a small population on two cores needs about this."""

_TOKENS = re.compile(rb"^vllm:(?:prompt|generation)_tokens_total(?:\{[^}]*\})? (\S+)$", re.MULTILINE)

_COSTS_EVERY_S = 2.0

_SHARE_OF_LATENESS = 0.25
"""An engine that is late is expected after so much of the time by which it is late already."""
_NOTICE_S = 5.0
"""An engine whose core died answers "unhealthy" for up to this long (vLLM's watchdog) before its process ends."""


class Engine:
    """One engine's address and health. Times are those of `time.monotonic`, in seconds."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        url: str,
        is_supervised: bool,
        probe_interval_s: float,
        probe_timeout_s: float,
        stall_timeout_s: float = 60.0,
    ) -> None:
        self.url = url
        """Without a path. A supervised engine listens elsewhere after each start."""
        self.is_supervised = is_supervised
        self.on_restart: Callable[[], None] = lambda: None
        self.flights = Flights()
        self.model = LatencyModel()
        self.costs: StepCosts | None = None
        """What its steps cost by its own account, as far as it says so."""
        self.squeeze = Squeeze()
        self.breaker = Breaker()
        self.waiting: set[asyncio.Timeout] = set()
        """Waits for its words, which end when it goes down."""
        self._session = session
        self._probe_interval_s = probe_interval_s
        self._probe_timeout = aiohttp.ClientTimeout(total=probe_timeout_s)
        self._stall_timeout_s = stall_timeout_s
        self.heard_at = time.monotonic()
        """When any request heard from it last."""
        self.froze = asyncio.Event()
        """Set when it answers its probe but no longer gets on with its work."""
        self._progress: tuple[float, float] | None = None
        self._is_up = False
        self._expected_at: float | None = None
        self._last_start_s = _FIRST_START_S
        self._look_now = asyncio.Event()
        self._asked_costs_at = -math.inf

    @property
    def is_up(self) -> bool:
        """Whether it answered when last looked at."""
        return self._is_up

    def mark_up(self, *, start_s: float | None = None) -> None:
        """It answers; it took `start_s` to start, where that was measured."""
        self._is_up = True
        self._expected_at = None
        if start_s is not None:
            self._last_start_s = start_s

    def mark_down(self, *, launch_in_s: float | None = None) -> None:
        """It does not answer; it will be launched in `launch_in_s`, where that is known."""
        if self._is_up:
            self._is_up = False
            now = asyncio.get_running_loop().time()
            for wait in [wait for wait in self.waiting if not wait.expired()]:
                wait.reschedule(now)
        if launch_in_s is None and self.is_supervised:
            launch_in_s = _NOTICE_S
        self._expected_at = None if launch_in_s is None else time.monotonic() + launch_in_s + self._last_start_s

    def retry_after_s(self) -> int:
        """Whole seconds until it should answer again, at least one: from when it is launched and how long its last start took; when
        that has passed, the longer the later it is.

        For an engine that others run nothing is known, and the answer is a few of our looks at it.
        """
        if self._expected_at is None:
            return max(1, math.ceil(3 * self._probe_interval_s))
        left_s = self._expected_at - time.monotonic()
        return max(1, math.ceil(left_s if left_s > 0 else _SHARE_OF_LATENESS * -left_s))

    def suspect(self) -> None:
        """A request to it failed: look at its health now, not at the next turn."""
        self._look_now.set()

    async def answers(self) -> bool:
        """Ask for its health, and wait for the answer."""
        try:
            async with self._session.get(f"{self.url}/health", timeout=self._probe_timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def check(self) -> bool:
        """Ask for its health and note the answer."""
        url = self.url
        answered = await self.answers() and await self._gets_on()
        if url != self.url:  # it was started anew meanwhile, and whoever did that knows better
            return self._is_up
        if answered != self._is_up:
            level = logging.INFO if answered else logging.WARNING
            logger.log(level, "engine %s %s", url, "answers" if answered else "does not answer")
            self.mark_up() if answered else self.mark_down()
        return answered

    async def _gets_on(self) -> bool:
        """Whether its counters of tokens move, where it has work: a process behind the one that answers the probe may hang."""
        now = time.monotonic()
        if self.froze.is_set():
            if await self._completes():
                self.froze.clear()
                self._progress = None
            return not self.froze.is_set()
        if not self.flights.running or now - self.heard_at < self._stall_timeout_s / 2:
            self._progress = None
            return True
        count = await self._count_tokens()
        if count is None or self._progress is None or self._progress[0] != count:
            self._progress = None if count is None else (count, now)
            return True
        if now - self._progress[1] >= self._stall_timeout_s / 2:
            logger.warning(
                "engine %s has work and computes nothing: it counts as gone until it completes a request", self.url
            )
            self.froze.set()
        return not self.froze.is_set()

    async def _count_tokens(self) -> float | None:
        """Tokens that it read and generated since its start; None where it does not say."""
        found = _TOKENS.findall(await self._read_metrics())
        return sum(map(float, found)) if found else None

    async def _read_metrics(self) -> bytes:
        try:
            async with self._session.get(f"{self.url}/metrics", timeout=self._probe_timeout) as response:
                return await response.read()
        except (aiohttp.ClientError, TimeoutError):
            return b""

    async def _learn_costs(self) -> None:
        """Ask what its steps cost: now and then, as that changes slowly, and while it works, as else nothing is learned there."""
        now = time.monotonic()
        if now - self._asked_costs_at < _COSTS_EVERY_S or (self.costs is not None and not self.flights.running):
            return
        self._asked_costs_at = now
        self.costs = read_costs(await self._read_metrics()) or self.costs

    async def _completes(self) -> bool:
        """Whether it can generate a token."""
        body = {"prompt": [0], "max_tokens": 1}
        try:
            url = f"{self.url}/v1/completions"
            async with self._session.post(url, json=body, timeout=self._probe_timeout) as response:
                await response.read()
                return response.status < 500
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def watch(self, on_up: Callable[[], None] = lambda: None) -> None:
        """Look at its health forever, calling `on_up` whenever it begins to answer."""
        while True:
            was_up = self._is_up
            if await self.check():
                if not was_up:
                    on_up()
                await self._learn_costs()
            self._look_now.clear()
            try:
                async with asyncio.timeout(self._probe_interval_s):
                    await self._look_now.wait()
            except TimeoutError:
                pass
