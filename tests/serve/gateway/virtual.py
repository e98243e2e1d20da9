"""Simulation of a gateway and an engine in virtual time: minutes of load in a second, and reproducible.

The virtual engine takes steps like a real one (with a cost per step, per running member and per row), batches what has arrived,
and drops members from requests that would be late. The gateway's decisions come from its real code: admission, placement, the
latency model, the reserve.
"""

import asyncio
import json
import random
import selectors
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from chorus.population.manifest import Population
from chorus.population.wire import StepCosts
from chorus.serve.engine.deadline import Deadline, Scheduled, StepCost, StepLoad, StepTally, keep_deadlines, way_down
from chorus.serve.engine.mixture import Mixture
from chorus.serve.gateway.admission.admission import Admission, Limits
from chorus.serve.gateway.admission.queue import Grant
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.request.call import Call, Kind, read_call
from chorus.serve.gateway.request.errors import ApiError
from chorus.serve.gateway.request.keys import ANYONE, Tenant
from chorus.serve.gateway.request.size import Usage
from chorus.serve.gateway.request.tiers import default_tier, tiers_between


class _Idle(selectors.SelectSelector):
    """A selector without I/O: each wait returns at once and advances the clock by its timeout."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "deadlock: every task waits for another"
        self.now += max(0.0, timeout)
        return []


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, idle: _Idle) -> None:
        self._idle = idle
        super().__init__(idle)

    def time(self) -> float:
        return self._idle.now


def in_virtual_time(monkeypatch: pytest.MonkeyPatch, scenario: Awaitable[Any]) -> Any:
    """Run `scenario` to its end in virtual time."""
    idle = _Idle()
    loop = _Loop(idle)
    with monkeypatch.context() as patch:
        for name in ("perf_counter", "monotonic", "thread_time"):
            patch.setattr(time, name, lambda: idle.now)
        try:
            return loop.run_until_complete(scenario)
        finally:
            loop.close()


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a step costs, in seconds."""

    step_s: float
    member_s: float
    row_s: float
    prompt_row_s: float
    prompt_s: float = 0.0
    """Extra cost of a step that reads prompts."""
    scatter: float = 0.1
    """Standard deviation of the logarithm of a step's time."""
    hiccup: float = 0.0005
    """Probability that a step takes 50 ms longer."""

    def of(self, load: StepLoad) -> float:
        """Typical seconds of a step with that load, without its prompts."""
        return self.step_s + self.member_s * load.active_members + self.row_s * load.member_rows


@dataclass(kw_only=True, eq=False)
class Run:
    """One request on the engine."""

    mixture: Mixture
    prompt_tokens: int
    max_tokens: int
    """Tokens that it generates."""
    token_limit: int
    """Tokens that it may generate at most: when an answer ends is unknown to the engine."""
    deadline: Deadline | None
    members_per_token: list[int] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def tokens_left(self) -> int:
        return self.max_tokens - len(self.members_per_token)

    def scheduled(self) -> Scheduled:
        """The request as `keep_deadlines` takes it."""
        return Scheduled(
            members=self.mixture.members,
            context=0,
            deadline=self.deadline,
            num_tokens=len(self.members_per_token),
            max_tokens=self.token_limit,
        )


def _first_members(num_members: int) -> Mixture:
    """A mixture whose weights fall, so that its last member is dropped first."""
    total = num_members * (num_members + 1) / 2
    weights = tuple((num_members - idx) / total for idx in range(num_members))
    return Mixture(tier="any", members=tuple(range(num_members)), weights=weights, pool="linear", temperature=1.0)


class VirtualEngine:
    """An engine whose steps take `costs` in virtual time. It learns and reports these costs as a real one does."""

    def __init__(self, costs: Costs, rng: random.Random) -> None:
        self._learned = StepCost()
        self._costs = costs
        self._rng = rng
        self._running: list[Run] = []
        self._work = asyncio.Event()

    async def answer(self, run: Run) -> None:
        self._running.append(run)
        self._work.set()
        await run.done.wait()

    async def steps(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            self._keep_deadlines(loop.time())
            batch = list(self._running)
            prompts = sum(run.prompt_tokens * len(run.mixture.members) for run in batch if not run.members_per_token)
            seconds = (
                self._costs.of(self._load()) + self._costs.prompt_row_s * prompts + self._costs.prompt_s * (prompts > 0)
            )
            seconds *= self._rng.lognormvariate(0, self._costs.scatter)
            self._learned.observe(self._load(prompts), seconds, members_s=seconds - self._costs.step_s)
            await asyncio.sleep(seconds + 0.05 * (self._rng.random() < self._costs.hiccup))
            for run in batch:
                run.members_per_token.append(len(run.mixture.members))
                if not run.tokens_left:
                    self._running.remove(run)
                    run.done.set()
            if not self._running:
                self._work.clear()

    def _keep_deadlines(self, now: float) -> None:
        drops = keep_deadlines([run.scheduled() for run in self._running], now, self._costs.of)
        for run, count in zip(self._running, drops, strict=True):
            for _ in range(count):
                assert run.deadline is not None
                _, run.mixture = run.deadline.drop(at_token=len(run.members_per_token), reason="forecast")

    def _load(self, prompt_rows: int = 0) -> StepLoad:
        tally = StepTally()
        for run in self._running:
            tally.add(run.mixture.members, rows=1, context=0)
        load = tally.load()
        return replace(load, member_rows=load.member_rows + prompt_rows)

    def reported_costs(self) -> StepCosts | None:
        """The step costs that it reports, as learned so far."""
        return self._learned.parts()


@dataclass(kw_only=True)
class Outcome:
    """The outcome of a request."""

    is_refused: bool = False
    seconds: float = 0.0
    budget_s: float
    members: float = 0.0
    """Mean number of members over its tokens."""

    @property
    def is_in_time(self) -> bool:
        return not self.is_refused and self.seconds <= self.budget_s


class World:
    """A gateway's admission in front of one virtual engine."""

    def __init__(
        self, population: Population, *, costs: Costs, limits: Limits, reports_costs: bool = True, seed: int = 0
    ) -> None:
        self._population = population
        self.rng = random.Random(seed)
        self.engine = VirtualEngine(costs, self.rng)
        session: Any = None
        self.known = Engine(session, url="virtual", is_supervised=False, probe_interval_s=1, probe_timeout_s=1)
        self.known.mark_up()
        self._reports_costs = reports_costs
        self.admission = Admission(limits, lambda call, avoid: [self.known])

    async def send(
        self,
        *,
        budget_s: float | None,
        tier: str | None = None,
        max_tokens: int = 48,
        with_budget: bool = True,
        is_open: bool = False,
        tenant: Tenant = ANYONE,
    ) -> Outcome:
        """Send one request, as the relay would. With `is_open` it is a chat without `max_tokens`."""
        now = time.perf_counter
        prompt = "def x " * self.rng.randint(8, 16)
        fields: dict[str, Any] = {"prompt": prompt, "max_tokens": max_tokens}
        if is_open:
            fields = {"messages": [{"role": "user", "content": prompt}]}
        if tier is not None:
            fields["budget"] = tier
        if budget_s is not None and with_budget:
            fields["latency_budget_ms"] = 1000 * budget_s
        population = self._population
        kind: Kind = "chat" if is_open else "completion"
        call = read_call(json.dumps(fields).encode(), kind, population, default_tier(population))
        arrived_at, outcome = now(), Outcome(budget_s=budget_s or 1e9)
        tiers = tiers_between(population, call.floor, call.choice.tier)
        try:
            grant = await self.admission.admit(call, tenant, tiers, arrived_at=arrived_at)
        except ApiError:
            outcome.is_refused, outcome.seconds = True, now() - arrived_at
            return outcome
        run = self._run(grant, len(prompt), max_tokens, call)
        await self.engine.answer(run)
        outcome.seconds, outcome.members = now() - arrived_at, sum(run.members_per_token) / max_tokens
        self._learn(grant, run, is_met=outcome.is_in_time, had_budget="latency_budget_ms" in fields)
        self.admission.lengths.observe(call.size, tenant.name, max_tokens)
        self.admission.release(grant)
        return outcome

    def _run(self, grant: Grant, characters: int, max_tokens: int, call: Call) -> Run:
        in_flight, deadline = grant.in_flight, None
        mixture = _first_members(in_flight.work.members)
        if in_flight.finish_by is not None:
            left_s = in_flight.finish_by - time.perf_counter()
            deadline = Deadline(
                finish_at=time.perf_counter() + self.known.reserve.after_reserve_s(left_s),
                way_down=way_down(mixture, frozenset(range(in_flight.floor.budget)), fitted=()),
                expected_tokens=in_flight.work.max_tokens if call.size.is_open else None,
            )
        return Run(
            mixture=mixture,
            prompt_tokens=characters // 2,
            max_tokens=max_tokens,
            token_limit=max(max_tokens, call.size.max_tokens),
            deadline=deadline,
        )

    def _learn(self, grant: Grant, run: Run, *, is_met: bool, had_budget: bool) -> None:
        if had_budget and grant.is_promised:
            self.known.reserve.observe(late=not is_met)
            self.known.model.observe_promise(kept=is_met, probability=self.admission.limits.probability)
        usage = Usage(prompt_tokens=run.prompt_tokens, completion_tokens=run.max_tokens)
        self.known.learn(grant.in_flight, usage, streamed=False, prompt_characters=2 * run.prompt_tokens)

    async def closed_loop(self, num_streams: int, seconds: float, **request: Any) -> list[Outcome]:
        """A closed loop of `num_streams` streams for `seconds`, each sending one request after another."""
        end_at, found = time.perf_counter() + seconds, list[Outcome]()

        async def stream() -> None:
            while time.perf_counter() < end_at:
                found.append(await self.send(**request))

        await asyncio.gather(*(stream() for _ in range(num_streams)))
        return found

    async def arrivals(self, rate_per_s: float, seconds: float, **request: Any) -> list[Outcome]:
        """Poisson arrivals for `seconds`."""
        end_at, tasks = time.perf_counter() + seconds, []
        while True:
            await asyncio.sleep(self.rng.expovariate(rate_per_s))
            if time.perf_counter() >= end_at:
                return list(await asyncio.gather(*tasks))
            tasks.append(asyncio.create_task(self.send(**request)))

    def working(self) -> list["asyncio.Task[None]"]:
        """Start the background tasks: the engine's steps, the queue, and the polling of step costs."""
        return [asyncio.create_task(each) for each in (self.engine.steps(), self.admission.run(), self._poll_costs())]

    async def _poll_costs(self) -> None:
        while self._reports_costs:
            await asyncio.sleep(2.0)
            self.known.costs = self.engine.reported_costs()
