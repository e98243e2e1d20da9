"""Who is served now, who waits, and who is turned away: a bounded queue before the engines.

Tenants take turns in proportion to their shares (by the member tokens that they were granted); within a tenant the earliest
deadline goes first. While a queue stands, requests that may shrink do; only when it is full, or a deadline can no longer be met, is
anybody refused, with the time after which it is worth coming back.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Container, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

from chorus.population.manifest import Tier
from chorus.serve.gateway.admission.demand import Demand
from chorus.serve.gateway.admission.lengths import AnswerLengths
from chorus.serve.gateway.admission.member_cap import Level, Supply
from chorus.serve.gateway.admission.placement import Blocked, Job, Plan, alone_s, at_floor, least_s, plan
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.traffic import InFlight
from chorus.serve.gateway.request.call import Call
from chorus.serve.gateway.request.errors import ApiError, bad_request
from chorus.serve.gateway.request.keys import ANYONE, Tenant

logger = logging.getLogger(__name__)

_TICK_S = 0.02
_LOOK_AT = 8  # waiting requests that are looked at in one go, for each tenant
_LONG_S, _REST = 0.002, 4.0
"""After a look that took longer, so many times as long passes before the next: a long queue must not keep us from answering."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is taken on at once."""

    max_sequences: int = 64
    """Sequences that run on one engine; more wait here, where their order can still be chosen."""
    max_queue: int = 256
    """Requests that wait; more are refused with 429."""
    queue_timeout_s: float = 30.0
    """Longest wait of a request without a deadline."""
    probability: float = 0.98
    """With which a request must be expected in time to be admitted at a tier."""


@dataclass(kw_only=True, eq=False)
class Ask:
    """A request at the door."""

    call: Call
    tenant: Tenant
    job: Job
    arrived_at: float
    give_up_at: float
    order: float
    """Earliest first, within a tenant."""
    avoid: Container[Engine]
    is_hopeless: bool = False
    """Whether even an idle engine would have been too slow: it is served as well as can be."""
    granted: "asyncio.Future[Grant]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(frozen=True, kw_only=True)
class Grant:
    """Leave to begin."""

    engine: Engine
    in_flight: InFlight
    waited_s: float
    is_promised: bool
    """Whether it was expected to be in time."""
    tenant: Tenant = ANYONE
    """Who is charged for it."""

    @property
    def tier(self) -> Tier:
        return self.in_flight.tier


class Admission:
    """The door. `engines` gives those that are worth a try, best first for a call."""

    def __init__(self, limits: Limits, engines: Callable[[Call, Container[Engine]], Sequence[Engine]]) -> None:
        self.limits = limits
        self.lengths = AnswerLengths()
        self._engines = engines
        self._waiting: dict[str, list[Ask]] = {}
        self._num_waiting = 0
        self._used: dict[str, float] = {}
        """Member tokens granted to each tenant that waits or has run lately, over its share."""
        self._clock = 0.0
        self._ends: deque[float] = deque(maxlen=32)
        self._demand = Demand()
        self._levels: WeakKeyDictionary[Engine, Level] = WeakKeyDictionary()
        self._most_members = 1
        self._losses: dict[int, float] = {}
        """Of the tiers that were asked for, by their number of members."""
        self._look_again_at = 0.0
        self._later: asyncio.TimerHandle | None = None

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return self._num_waiting

    @asynccontextmanager
    async def admitted(
        self, call: Call, tenant: Tenant, tiers: Sequence[Tier], *, arrived_at: float, avoid: Container[Engine] = ()
    ) -> AsyncIterator[Grant]:
        """Leave to begin, as `admit` gives it, and given back however the request ends."""
        grant = await self.admit(call, tenant, tiers, arrived_at=arrived_at, avoid=avoid)
        try:
            yield grant
        finally:
            self.release(grant)

    async def admit(
        self, call: Call, tenant: Tenant, tiers: Sequence[Tier], *, arrived_at: float, avoid: Container[Engine] = ()
    ) -> Grant:
        """Wait for leave to begin. `tiers` may serve the call, from the largest to the floor; the caller must `release`.

        Raises:
            ApiError: 429 with the time after which it is worth coming back; 504 if the request wants failure at its deadline;
                503 if there is no engine; 400 for more sequences than run at once.
        """
        ask = self._ask(call, tenant, tiers, arrived_at, avoid)
        self._note(ask)
        if not self._num_waiting and (grant := self._try(ask, pressure=0.0)):
            return grant
        self._enqueue(ask)
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + ask.give_up_at - time.perf_counter()):
                return await asyncio.shield(ask.granted)
        except TimeoutError:
            if ask.granted.done() and not ask.granted.cancelled() and ask.granted.exception() is None:
                return ask.granted.result()
            raise self._refusal(ask) from None
        except asyncio.CancelledError:  # the client left; leave that was given meanwhile is given back
            if ask.granted.done() and not ask.granted.cancelled() and ask.granted.exception() is None:
                self.release(ask.granted.result())
            raise
        finally:
            self._dequeue(ask)

    def release(self, grant: Grant) -> None:
        """The request ended, however it did."""
        grant.engine.traffic.end(grant.in_flight)
        self._ends.append(time.perf_counter())
        self._settle(grant)
        self.look()

    def end_sequences(self, grant: Grant, count: int) -> None:
        """So many of the request's sequences are complete: others may begin in their places."""
        if grant.in_flight.num_sequences > 1:
            grant.engine.traffic.end_sequences(grant.in_flight, count)
            self.look()

    async def keep(self) -> None:
        """Look at the queue forever: time alone may let somebody in, or show that there is no hope."""
        while True:
            await asyncio.sleep(_TICK_S)
            if self._num_waiting:
                self.look()

    def look(self) -> None:
        """Let in whoever can begin now; a little later, if looking took long just before."""
        began_at = time.perf_counter()
        if began_at < self._look_again_at:
            if self._later is None:
                self._later = asyncio.get_running_loop().call_later(self._look_again_at - began_at, self._look_again)
            return
        worked_s = time.thread_time()  # not what others on the processor took
        self._look_at_all()
        took_s = time.thread_time() - worked_s
        self._look_again_at = began_at + (1 + _REST) * took_s if took_s > _LONG_S else 0.0

    def _look_again(self) -> None:
        self._later = None
        self.look()

    def _look_at_all(self) -> None:
        for ask in self._in_turn():
            try:
                grant = self._try(ask, pressure=self._pressure())
            except ApiError as error:
                self._dequeue(ask)
                ask.granted.set_exception(error)
                continue
            except Exception as error:  # its own fault alone: whoever comes behind is let in
                logger.exception("a waiting request could not be planned")
                self._dequeue(ask)
                ask.granted.set_exception(error)
                continue
            if grant is not None:
                self._dequeue(ask)
                ask.granted.set_result(grant)

    def retry_after_s(self) -> int:
        """Whole seconds in which the queue as it stands will have been worked off, by how fast requests ended lately."""
        now = time.perf_counter()
        ends = [end for end in self._ends if now - end < 30]
        if len(ends) < 2:
            return max(1, min(30, self._num_waiting))
        per_request_s = max(now - ends[0], 1e-3) / len(ends)
        return max(1, min(60, math.ceil(per_request_s * (self._num_waiting + 1))))

    def _ask(
        self, call: Call, tenant: Tenant, tiers: Sequence[Tier], arrived_at: float, avoid: Container[Engine]
    ) -> Ask:
        if (num_sequences := call.size.num_sequences) > self.limits.max_sequences:
            raise bad_request(
                f"this request asks for {num_sequences} sequences (prompts times the larger of n and best_of); "
                f"at most {self.limits.max_sequences} run at once here. Send several requests.",
                code="too_many_sequences",
            )
        budget_s = call.terms.budget_s
        finish_by = None if budget_s is None else arrived_at + budget_s
        job = Job(tiers=tiers, size=self.lengths.planned(call.size, tenant.name), finish_by=finish_by)
        now = time.perf_counter()
        give_up_at = now + self.limits.queue_timeout_s
        is_hopeless = False
        if finish_by is not None:
            least = min((least_s(job, engine.model) for engine in self._engines(call, avoid)), default=0.0)
            is_hopeless = now + least > finish_by
            if is_hopeless and call.terms.on_deadline == "fail":
                raise deadline_exceeded(
                    f"a time budget of {1000 * call.terms.budget_s:.0f} ms cannot be kept: "  # type: ignore[operator]
                    f"tier {tiers[-1].name!r} alone is expected to take {1000 * least:.0f} ms for this request."
                )
            if not is_hopeless:
                give_up_at = min(give_up_at, finish_by - least)
        order = give_up_at if finish_by is None else finish_by
        return Ask(
            call=call,
            tenant=tenant,
            job=job,
            arrived_at=arrived_at,
            give_up_at=max(give_up_at, now + 0.001),
            order=order,
            avoid=avoid,
            is_hopeless=is_hopeless,
        )

    def _note(self, ask: Ask) -> None:
        now, tiers, engines = time.perf_counter(), ask.job.tiers, self._engines(ask.call, ask.avoid)
        size = ask.job.size
        prompt_tokens = engines[0].model.prompt_tokens(tokens=size.prompt_tokens, characters=size.prompt_characters)
        self._most_members = max(self._most_members, len(tiers[0].members))
        self._losses |= {tier.budget: tier.test_loss.nats for tier in tiers if tier.test_loss is not None}
        if ask.job.finish_by is None or len(tiers) == 1 or ask.is_hopeless:
            members = len(tiers[-1 if ask.is_hopeless else 0].members)
            self._demand.note_fixed(size, prompt_tokens=prompt_tokens, members=members, now=now)
        else:
            # Nobody waits longer than that, however much time there is.
            most_s = alone_s(tiers[0], ask.job, engines[0].model) + self.limits.queue_timeout_s
            budget_s = min(most_s, max(0.0, ask.job.finish_by - now))
            self._demand.note_free(size, prompt_tokens=prompt_tokens, budget_s=budget_s, now=now)

    def _choose_level(self, engine: Engine, num_engines: int, now: float) -> int:
        supply = Supply(
            model=engine.model,
            costs=engine.costs,
            num_engines=num_engines,
            max_sequences=self.limits.max_sequences,
            probability=self.limits.probability,
        )
        waiting = (ask.job for asks in self._waiting.values() for ask in asks if ask.job.finish_by is not None)
        waiting_tokens = sum(job.size.total_tokens for job in waiting)
        level = self._levels.setdefault(engine, Level())
        return level.choose(
            self._demand.rates(now),
            supply,
            most=self._most_members,
            waiting_tokens=waiting_tokens,
            losses=self._losses,
        )

    def _try(self, ask: Ask, *, pressure: float) -> Grant | None:
        """Begin on the best engine that takes it; None if none does now.

        Raises:
            ApiError: there is no engine, or no hope any more.
        """
        now = time.perf_counter()
        engines = self._engines(ask.call, ask.avoid)
        verdicts = []
        for engine in engines:
            found = plan(
                ask.job if not ask.is_hopeless else Job(tiers=ask.job.tiers[-1:], size=ask.job.size, finish_by=None),
                engine.traffic,
                engine.model,
                now=now,
                probability=self.limits.probability,
                max_sequences=self.limits.max_sequences,
                pressure=pressure,
                level=partial(self._choose_level, engine, len(engines), now),
            )
            if isinstance(found, Plan):
                return self._grant(ask, engine, found, now, is_promised=not ask.is_hopeless)
            verdicts.append(found)
        if all(verdict is Blocked.LATE for verdict in verdicts):
            if now - ask.arrived_at < _TICK_S:  # it has not waited: a wait would not help either
                engine = engines[0]
                return self._grant(ask, engine, at_floor(ask.job, engine.traffic, engine.model), now, is_promised=False)
            raise self._refusal(ask)
        return None

    def _grant(self, ask: Ask, engine: Engine, found: Plan, now: float, *, is_promised: bool) -> Grant:
        in_flight = InFlight(
            tier=found.tier,
            floor=ask.job.tiers[-1],
            num_sequences=ask.job.size.num_sequences,
            work=found.work,
            finish_by=ask.job.finish_by,
            expected_first_s=found.first_s,
            expected_token_s=found.token_s,
            tokens_per_event=ask.call.event_size(found.token_s),
        )
        grant = Grant(
            engine=engine,
            in_flight=in_flight,
            waited_s=now - ask.arrived_at,
            is_promised=is_promised,
            tenant=ask.tenant,
        )
        self._charge(ask, found)
        engine.traffic.begin(in_flight)
        return grant

    def _charge(self, ask: Ask, found: Plan) -> None:
        # Start-time fair queueing (Goyal, Vin, Cheng 1996): who comes back begins at the clock, so that idling saves nothing up.
        self._clock = max(self._used.get(ask.tenant.name, 0.0), self._clock)
        cost = found.work.members * ask.job.size.total_tokens / ask.tenant.share
        self._used[ask.tenant.name] = self._clock + cost
        if len(self._used) > 4096:
            self._used = {name: used for name, used in self._used.items() if used > self._clock}

    def _settle(self, grant: Grant) -> None:
        """What was generated counts for whose turn it is, where that is known, not what might have been."""
        in_flight, tenant = grant.in_flight, grant.tenant
        if in_flight.num_generated is not None and tenant.name in self._used:
            too_many = in_flight.num_sequences * in_flight.work.max_tokens - in_flight.num_generated
            self._used[tenant.name] -= in_flight.work.members * too_many / tenant.share

    def _pressure(self) -> float:
        """From 0 to 1: at half a queue, whoever may shrink is at the floor."""
        return min(1.0, 2 * self._num_waiting / max(1, self.limits.max_queue))

    def _in_turn(self) -> Iterator[Ask]:
        turns = sorted(self._waiting, key=lambda name: max(self._used.get(name, 0.0), self._clock))
        for name in turns:
            yield from list(self._waiting.get(name, ()))[:_LOOK_AT]

    def _enqueue(self, ask: Ask) -> None:
        """Into the queue; if that is full, the tenant who fills it most gives a place.

        Raises:
            ApiError: 429, if that is the request's own tenant.
        """
        if self._num_waiting >= self.limits.max_queue:
            if not self._waiting:
                raise self._refusal(ask)
            greedy = max(self._waiting, key=lambda name: len(self._waiting[name]))
            own = len(self._waiting.get(ask.tenant.name, ()))
            if own + 1 >= len(self._waiting[greedy]):
                raise self._refusal(ask)
            last = self._waiting[greedy][-1]
            self._dequeue(last)
            if not last.granted.done():
                last.granted.set_exception(self._refusal(last))
        queue = self._waiting.setdefault(ask.tenant.name, [])
        queue.append(ask)
        queue.sort(key=lambda each: each.order)
        self._num_waiting += 1

    def _dequeue(self, ask: Ask) -> None:
        queue = self._waiting.get(ask.tenant.name, [])
        with suppress(ValueError):
            queue.remove(ask)
            self._num_waiting -= 1
        if not queue:
            self._waiting.pop(ask.tenant.name, None)

    def _refusal(self, ask: Ask) -> ApiError:
        if ask.call.terms.on_deadline == "fail" and ask.job.finish_by is not None:
            return deadline_exceeded("the time budget would have been missed: every engine is busy.")
        retry_after_s = self.retry_after_s()
        if ask.job.finish_by is not None:
            message = "every engine is busy and this request's time budget cannot be kept"
        elif self._num_waiting >= self.limits.max_queue:
            message = f"every engine is busy and {self._num_waiting} requests wait already"
        else:
            message = f"every engine has been busy for {self.limits.queue_timeout_s:g} s"
        return ApiError(
            429,
            f"{message}; come back in about {retry_after_s} s, or ask for less.",
            code="overloaded",
            headers={"Retry-After": str(retry_after_s)},
        )


def deadline_exceeded(message: str) -> ApiError:
    """A 504: the request wanted to fail rather than be late."""
    return ApiError(504, message, code="deadline_exceeded", param="latency_budget_ms")
