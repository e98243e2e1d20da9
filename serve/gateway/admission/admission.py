"""Admission: when a request is sent, to which engine, and with how many members; which requests wait, and which are refused.

Tenants take turns in proportion to their shares; within a tenant the earliest deadline goes first (`queue`). `placement` decides
how a request begins on an engine, `caps` how many members it may have. Requests that may shrink do so while others wait. One
is refused only if the queue is full or its deadline can no longer be met, with a time to come back.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Container, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from chorus.population.manifest import Tier
from chorus.serve.gateway.admission.caps import MemberCaps
from chorus.serve.gateway.admission.lengths import AnswerLengths
from chorus.serve.gateway.admission.placement import Blocked, Job, Plan, at_floor, min_s, place
from chorus.serve.gateway.admission.queue import FairQueue, Grant, Pending
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.traffic import InFlight
from chorus.serve.gateway.request.call import Call
from chorus.serve.gateway.request.errors import ApiError, bad_request
from chorus.serve.gateway.request.keys import Tenant

logger = logging.getLogger(__name__)

_TICK_S = 0.02
"""Time between two passes over the queue."""
_LONG_PASS_S, _PAUSE_FACTOR = 0.002, 4.0
"""A pass over the queue that took longer is followed by a pause of that many times as long, so that others can run."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is taken on at once."""

    max_sequences: int = 64
    """Sequences that run on one engine; more wait here, where their order can still change."""
    max_queue: int = 256
    """Requests that wait; more are refused with 429."""
    queue_timeout_s: float = 30.0
    """Longest wait of a request without a deadline."""
    probability: float = 0.98
    """With which a request must be expected in time to be admitted at a tier."""


class Admission:
    """The gateway's admission. `candidates` gives the engines worth a try for a call, best first."""

    def __init__(self, limits: Limits, candidates: Callable[[Call, Container[Engine]], Sequence[Engine]]) -> None:
        self.limits = limits
        self.lengths = AnswerLengths()
        self._candidates = candidates
        self._queue = FairQueue(limits.max_queue)
        self._caps = MemberCaps(
            max_sequences=limits.max_sequences, probability=limits.probability, queue_timeout_s=limits.queue_timeout_s
        )
        self._ended_at: deque[float] = deque(maxlen=32)
        self._next_pass_at = 0.0
        self._next_pass: asyncio.TimerHandle | None = None

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @asynccontextmanager
    async def admitted(
        self, call: Call, tenant: Tenant, tiers: Sequence[Tier], *, arrived_at: float, avoid: Container[Engine] = ()
    ) -> AsyncIterator[Grant]:
        """A grant, as from `admit`, which is released however the request ends."""
        grant = await self.admit(call, tenant, tiers, arrived_at=arrived_at, avoid=avoid)
        try:
            yield grant
        finally:
            self.release(grant)

    async def admit(
        self, call: Call, tenant: Tenant, tiers: Sequence[Tier], *, arrived_at: float, avoid: Container[Engine] = ()
    ) -> Grant:
        """Wait for a grant. `tiers` may serve the call, from the largest to the floor; the caller must `release` it.

        Raises:
            ApiError: 429 with a time to come back; 504 if the request asked to fail at its deadline; 503 if there is no engine;
                400 for more sequences than run at once.
        """
        candidates = self._candidates(call, avoid)
        pending = self._pending(call, tenant, tiers, arrived_at, avoid, candidates)
        self._caps.note_request(pending.job, candidates[0])
        if not self._queue and (grant := self._place(pending, candidates)):
            return grant
        self._enqueue(pending)
        try:
            return await self._wait_for_grant(pending)
        finally:
            self._queue.remove(pending)

    def release(self, grant: Grant) -> None:
        """The request ended."""
        grant.engine.traffic.end(grant.in_flight)
        self._ended_at.append(time.perf_counter())
        self._queue.settle(grant)
        self.admit_waiting()

    def end_sequences(self, grant: Grant, count: int) -> None:
        """`count` of the request's sequences are complete: others may begin in their places."""
        if grant.in_flight.num_sequences > 1:
            grant.engine.traffic.end_sequences(grant.in_flight, count)
            self.admit_waiting()

    async def run(self) -> None:
        """Pass over the queue until cancelled: time alone may make a place, or a request hopeless."""
        while True:
            await asyncio.sleep(_TICK_S)
            if self._queue:
                self.admit_waiting()

    def admit_waiting(self) -> None:
        """Admit every waiting request that can begin now; a little later, if the last pass took long."""
        began_at = time.perf_counter()
        if began_at < self._next_pass_at:
            if self._next_pass is None:
                loop = asyncio.get_running_loop()
                self._next_pass = loop.call_later(self._next_pass_at - began_at, self._delayed_pass)
            return
        worked_s = time.thread_time()  # without the time that other processes took
        self._pass_over_queue()
        took_s = time.thread_time() - worked_s
        self._next_pass_at = began_at + (1 + _PAUSE_FACTOR) * took_s if took_s > _LONG_PASS_S else 0.0

    def retry_after_s(self) -> int:
        """Whole seconds until the present queue is worked off, at the rate at which requests ended lately."""
        now = time.perf_counter()
        ended_at = [each for each in self._ended_at if now - each < 30]
        if len(ended_at) < 2:
            return max(1, min(30, len(self._queue)))
        per_request_s = max(now - ended_at[0], 1e-3) / len(ended_at)
        return max(1, min(60, math.ceil(per_request_s * (len(self._queue) + 1))))

    def _pending(
        self,
        call: Call,
        tenant: Tenant,
        tiers: Sequence[Tier],
        arrived_at: float,
        avoid: Container[Engine],
        candidates: Sequence[Engine],
    ) -> Pending:
        """The request, with the time at which waiting is over.

        Raises:
            ApiError: it can never be served as it wants.
        """
        if (num_sequences := call.size.num_sequences) > self.limits.max_sequences:
            raise bad_request(
                f"the request has {num_sequences} sequences (prompts times the larger of n and best_of); "
                f"at most {self.limits.max_sequences} are allowed. Split it into several requests.",
                code="too_many_sequences",
            )
        now, budget_s = time.perf_counter(), call.time_budget.budget_s
        finish_by = None if budget_s is None else arrived_at + budget_s
        job = Job(tiers=tiers, size=self.lengths.planned(call.size, tenant.name), finish_by=finish_by)
        give_up_at = now + self.limits.queue_timeout_s
        if finish_by is not None and budget_s is not None:
            min_seconds = min(min_s(job, engine.model) for engine in candidates)
            if now + min_seconds <= finish_by:
                give_up_at = min(give_up_at, finish_by - min_seconds)
            elif call.time_budget.on_deadline == "fail":
                raise deadline_exceeded(
                    f"latency_budget_ms {1000 * budget_s:.0f} is too short: "
                    f"even tier {tiers[-1].name!r} is expected to take {1000 * min_seconds:.0f} ms. Raise it or lower max_tokens."
                )
            else:
                job = replace(job, is_unattainable=True)
        return Pending(
            call=call,
            tenant=tenant,
            job=job,
            arrived_at=arrived_at,
            give_up_at=max(give_up_at, now + 0.001),
            order=give_up_at if finish_by is None else finish_by,
            avoid=avoid,
        )

    def _place(self, pending: Pending, candidates: Sequence[Engine], *, pressure: float = 0.0) -> Grant | None:
        """Begin on the best engine that has a place; None if none has now.

        Raises:
            ApiError: its deadline can no longer be met.
        """
        now, job = time.perf_counter(), pending.job
        verdicts = []
        for engine in candidates:
            found = place(
                job,
                engine.traffic,
                engine.model,
                now=now,
                probability=self.limits.probability,
                max_sequences=self.limits.max_sequences,
                pressure=pressure,
                member_cap=self._caps.of(engine, len(candidates), self._queue, now) if job.is_flexible else None,
            )
            if isinstance(found, Plan):
                return self._grant(pending, engine, found, now, is_promised=not job.is_unattainable)
            verdicts.append(found)
        if any(verdict is not Blocked.LATE for verdict in verdicts):
            return None
        if now - pending.arrived_at >= _TICK_S:
            raise self._refusal(pending)
        engine = candidates[0]  # it has just come, and waiting would not help either
        return self._grant(pending, engine, at_floor(job, engine.traffic, engine.model), now, is_promised=False)

    def _grant(self, pending: Pending, engine: Engine, plan: Plan, now: float, *, is_promised: bool) -> Grant:
        job = pending.job
        request = InFlight(
            tier=plan.tier,
            floor=job.tiers[-1],
            num_sequences=job.size.num_sequences,
            work=plan.work,
            finish_by=job.finish_by,
            expected_first_s=plan.first_s,
            expected_token_s=plan.token_s,
            tokens_per_event=pending.call.event_size(plan.token_s),
        )
        waited_s = now - pending.arrived_at
        grant = Grant(
            engine=engine, in_flight=request, waited_s=waited_s, is_promised=is_promised, tenant=pending.tenant
        )
        self._queue.charge(pending, plan)
        engine.traffic.begin(request)
        return grant

    def _enqueue(self, pending: Pending) -> None:
        """Wait in the queue; if that is full, in the place of another.

        Raises:
            ApiError: 429, if it is this request that has to go.
        """
        if (displaced := self._queue.displaced_by(pending)) is pending:
            raise self._refusal(pending)
        if displaced is not None:
            self._queue.remove(displaced)
            displaced.fail(self._refusal(displaced))
        self._queue.add(pending)

    async def _wait_for_grant(self, pending: Pending) -> Grant:
        """Wait for the request's turn."""
        try:
            async with asyncio.timeout(pending.give_up_at - time.perf_counter()):
                return await asyncio.shield(pending.granted)
        except TimeoutError:
            if (grant := pending.grant_if_any()) is not None:
                return grant
            raise self._refusal(pending) from None
        except asyncio.CancelledError:  # the client left; a grant that was given meanwhile goes back
            if (grant := pending.grant_if_any()) is not None:
                self.release(grant)
            raise

    def _delayed_pass(self) -> None:
        self._next_pass = None
        self.admit_waiting()

    def _pass_over_queue(self) -> None:
        for pending in self._queue.in_turn():
            try:
                candidates = self._candidates(pending.call, pending.avoid)
                grant = self._place(pending, candidates, pressure=self._queue.pressure)
            except ApiError as error:
                self._queue.remove(pending)
                pending.fail(error)
            except Exception as error:  # of this request alone: the ones behind it go on
                logger.exception("could not place a waiting request")
                self._queue.remove(pending)
                pending.fail(error)
            else:
                if grant is not None:
                    self._queue.remove(pending)
                    pending.granted.set_result(grant)

    def _refusal(self, pending: Pending) -> ApiError:
        has_deadline = pending.job.finish_by is not None
        if has_deadline and pending.call.time_budget.on_deadline == "fail":
            return deadline_exceeded(
                "every engine is busy, so the answer would miss latency_budget_ms; raise it or try again later."
            )
        retry_after_s = self.retry_after_s()
        if has_deadline:
            message = "every engine is busy, so the answer would miss latency_budget_ms"
        elif self._queue.is_full:
            message = f"every engine is busy and the queue is full ({len(self._queue)} requests)"
        else:
            message = f"no engine was free within {self.limits.queue_timeout_s:g} s"
        return ApiError(
            429,
            f"{message}; try again in about {retry_after_s} s or send a smaller request.",
            code="overloaded",
            headers={"Retry-After": str(retry_after_s)},
        )


def deadline_exceeded(message: str) -> ApiError:
    """A 504: the request asked to fail rather than be late."""
    return ApiError(504, message, code="deadline_exceeded", param="latency_budget_ms")
