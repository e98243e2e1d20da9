"""One engine: its address, whether it answers health probes, and when it is expected back if it does not.

`traffic` holds its requests in flight, `model` its expected times, and `life` what belongs to its current process.
"""

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace

import aiohttp

from chorus.population.wire import StepCosts
from chorus.serve.gateway.engines.breaker import Breaker
from chorus.serve.gateway.engines.costs import read_costs
from chorus.serve.gateway.engines.latency import LatencyModel, Work
from chorus.serve.gateway.engines.life import Life, Processes
from chorus.serve.gateway.engines.reserve import Reserve
from chorus.serve.gateway.engines.traffic import InFlight, Traffic
from chorus.serve.gateway.request.size import Usage

logger = logging.getLogger(__name__)

_FIRST_START_S = 30.0
"""Assumed start time until one was measured; a small population on two cores needs about this."""

_PROGRESS = re.compile(
    rb"^(?:vllm:(?:prompt|generation)_tokens|chorus_engine_steps)_total(?:\{[^}]*\})? ([0-9.e+]+)$", re.MULTILINE
)
"""Counters that show progress. vLLM counts a prompt only once its last chunk has been read; the plugin counts every step."""

_METRICS_INTERVAL_S = 2.0

_LATENESS_SHARE = 0.25
"""A late engine is expected after a further wait of this share of its lateness so far."""
_EXIT_DELAY_S = 5.0
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
        self.is_supervised = is_supervised
        self.stall_timeout_s = stall_timeout_s
        self.life = Life(url, stall_timeout_s=stall_timeout_s)
        self.num_restarts = 0
        self.on_restart: Callable[[], None] = lambda: None
        self.traffic = Traffic()
        self.model = LatencyModel()
        self.costs: StepCosts | None = None
        """Step costs that the engine reports; None if it has reported none."""
        self.context_length: int | None = None
        """Most tokens of prompt and answer together, as the engine reports; it may be started with less than its members support.
        None if it has reported none."""
        self.reserve = Reserve()
        self.output_timeouts: set[asyncio.Timeout] = set()
        """Timeouts of waits for its output; all expire at once when it goes down."""
        self._session = session
        self._probe_interval_s = probe_interval_s
        self._probe_timeout = aiohttp.ClientTimeout(total=probe_timeout_s)
        self._is_up = False
        self._expected_at: float | None = None
        self._last_start_s = _FIRST_START_S
        self._check_now = asyncio.Event()
        self._metrics_at = -math.inf

    @property
    def url(self) -> str:
        """Its address, without a path. A supervised engine has a new one in each life."""
        return self.life.url

    @property
    def breaker(self) -> Breaker:
        """The circuit breaker of its current life."""
        return self.life.breaker

    @property
    def is_up(self) -> bool:
        """Whether it answered at the last check."""
        return self._is_up

    def begin_life(self, url: str, processes: Processes | None = None) -> Life:
        """Start a new life: a process was launched that will answer at `url`."""
        self.life = Life(url, stall_timeout_s=self.stall_timeout_s, processes=processes)
        return self.life

    def mark_up(self, *, start_s: float | None = None) -> None:
        """It answers. `start_s` is how long it took to start, if measured."""
        if not self._is_up and not self.is_supervised:
            self.begin_life(self.url)
        self._is_up = True
        self._expected_at = None
        if start_s is not None:
            self._last_start_s = start_s

    def mark_down(self, *, launch_in_s: float | None = None) -> None:
        """It does not answer. `launch_in_s` is the time until its launch, if known."""
        if self._is_up:
            self._is_up = False
            now = asyncio.get_running_loop().time()
            for wait in [wait for wait in self.output_timeouts if not wait.expired()]:
                wait.reschedule(now)
        if launch_in_s is None and self.is_supervised:
            launch_in_s = _EXIT_DELAY_S
        self._expected_at = None if launch_in_s is None else time.monotonic() + launch_in_s + self._last_start_s

    def retry_after_s(self) -> int:
        """Whole seconds until it should answer again, at least 1.

        The time until its launch plus that of its last start; once that is over, a share of its lateness. Nothing is known of an
        engine that others run: three probe intervals.
        """
        if self._expected_at is None:
            return max(1, math.ceil(3 * self._probe_interval_s))
        left_s = self._expected_at - time.monotonic()
        return max(1, math.ceil(left_s if left_s > 0 else _LATENESS_SHARE * -left_s))

    def check_soon(self) -> None:
        """A request to it failed: check its health now, not at the next interval."""
        self._check_now.set()

    def learn(self, request: InFlight, usage: Usage, *, streamed: bool, prompt_characters: int) -> None:
        """Fit the expected times to a complete answer. `prompt_characters` is its prompt's length in text, 0 if it came as tokens.

        Answers with dropped members count like all others: leaving them out was no better (bench/LOG.md).
        """
        now = time.perf_counter()
        if request.num_sequences == 1:
            self.model.observe_prompt(characters=prompt_characters, tokens=usage.prompt_tokens)
        tokens = max(1.0, usage.completion_tokens / request.num_sequences)
        work = replace(request.work, prompt_tokens=usage.prompt_tokens)
        total_s = now - request.began_at
        expected_s = request.expected_first_s + (tokens - 1) * request.expected_token_s
        self.model.observe_total(expected_s=expected_s, seconds=total_s)
        load = self.traffic.mean_load(request, now)
        if streamed and request.first_at is not None:
            self.model.observe_first(request.before, work, request.first_at - request.began_at)
            if load is not None and tokens >= 4:
                self.model.observe_tokens(load, (now - request.first_at) / (tokens - 1))
        elif load is not None:
            self.model.observe_whole(request.before, load, work, tokens, total_s)

    async def answers_probe(self) -> bool:
        """Whether it answers a health probe with status 200."""
        try:
            async with self._session.get(
                f"{self.url}/health", timeout=self._probe_timeout, allow_redirects=False
            ) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    def longest_silence_s(self) -> float:
        """How long one of its streams may be silent now, in seconds."""
        return self.life.longest_silence_s(self._longest_step_s())

    async def check(self) -> bool:
        """Probe its health; record and return the result."""
        life = self.life
        is_healthy = await self._is_healthy(life)
        if life is not self.life:  # a new life began meanwhile, and its state is newer
            return self._is_up
        if is_healthy != self._is_up:
            level = logging.INFO if is_healthy else logging.WARNING
            logger.log(level, "engine %s is %s", life.url, "up" if is_healthy else "down")
            self.mark_up() if is_healthy else self.mark_down()
        return is_healthy

    async def _is_healthy(self, life: Life) -> bool:
        if await self.answers_probe():
            life.note_probe_answered()
            return await self._makes_progress(life)
        if self.is_supervised and await life.is_unresponsive():
            logger.warning("engine %s answers no health probes; restarting it", life.url)
            life.frozen.set()
        return False

    async def _makes_progress(self, life: Life) -> bool:
        """Whether it makes progress if it has work: a process behind the one that answers probes may hang."""
        if life.frozen.is_set():
            if self.is_supervised or not await self._can_generate():
                return False
            life.frozen.clear()
            life.note_idle()
            return True
        has_work = bool(self.traffic.in_flight)
        if life.is_quiet or (
            time.monotonic() - self._metrics_at >= _METRICS_INTERVAL_S and (has_work or self.costs is None)
        ):
            await self._read_metrics(life)
        if not has_work:
            life.note_idle()
        elif await life.is_stuck(self._longest_step_s()):
            action = (
                "restarting it" if self.is_supervised else "sending it no requests until it completes a test request"
            )
            logger.warning("engine %s has work but makes no progress; %s", life.url, action)
            life.frozen.set()
        return not life.frozen.is_set()

    async def _read_metrics(self, life: Life) -> None:
        """Read its step costs, which change slowly, and its progress counters."""
        self._metrics_at = time.monotonic()
        try:
            async with self._session.get(
                f"{self.url}/metrics", timeout=self._probe_timeout, allow_redirects=False
            ) as response:
                metrics = await response.read()
        except (aiohttp.ClientError, TimeoutError):
            metrics = b""
        try:
            self.costs = read_costs(metrics) or self.costs
            counts = [float(count) for count in _PROGRESS.findall(metrics)]
        except ValueError:
            logger.warning("cannot parse the metrics of engine %s", life.url)
            counts = []
        life.note_progress(sum(counts) if counts else None)

    def _longest_step_s(self) -> float:
        """Expected seconds of its longest possible step, which reads all prompts still without a first token; 0 if unknown."""
        reading = [in_flight for in_flight in self.traffic.in_flight if in_flight.first_at is None]
        rows = sum(in_flight.work.members * in_flight.work.prompt_tokens for in_flight in reading)
        load = self.traffic.load()
        members = max(1, round(load.members))
        expected_s = self.model.first_s(load, Work(members=members, prompt_tokens=rows / members, max_tokens=1))
        if (costs := self.costs) is not None:
            by_costs_s = costs.step + costs.request * len(self.traffic.in_flight) + costs.member * members
            expected_s = max(expected_s, by_costs_s + costs.row * (rows + load.rows))
        return expected_s

    async def read_context_length(self) -> None:
        """Read the context length it was started with. If it reports none, the last known one stays."""
        try:
            async with self._session.get(
                f"{self.url}/v1/models", timeout=self._probe_timeout, allow_redirects=False
            ) as response:
                lengths = [card["max_model_len"] for card in json.loads(await response.read())["data"]]
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError):
            return
        lengths = [length for length in lengths if type(length) is int and length > 0]
        self.context_length = min(lengths, default=self.context_length)

    async def _can_generate(self) -> bool:
        """Whether it can generate a token."""
        body = {"prompt": [0], "max_tokens": 1}
        try:
            url = f"{self.url}/v1/completions"
            async with self._session.post(
                url, json=body, timeout=self._probe_timeout, allow_redirects=False
            ) as response:
                await response.read()
                return response.status < 500
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def watch(self, on_up: Callable[[], None] = lambda: None) -> None:
        """Check its health forever, calling `on_up` whenever it begins to answer."""
        while True:
            was_up = self._is_up
            if await self.check() and not was_up:
                on_up()
            self._check_now.clear()
            try:
                async with asyncio.timeout(self._probe_interval_s):
                    await self._check_now.wait()
            except TimeoutError:
                pass
