"""The backlog: a bounded queue in which tenants take turns, and within a tenant the earliest deadline goes first."""

import asyncio
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from chorus.population.manifest import Tier
from chorus.serve.gateway.admission.placement import Job, Plan
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.traffic import InFlight
from chorus.serve.gateway.request.call import Call
from chorus.serve.gateway.request.keys import ANYONE, Tenant

_PER_TENANT = 8
"""Waiting requests of a tenant that are considered at once."""
_MAX_TENANTS = 4096


@dataclass(frozen=True, kw_only=True)
class Grant:
    """Permission to begin on an engine."""

    engine: Engine
    in_flight: InFlight
    waited_s: float
    is_promised: bool
    """Whether it was expected to be in time."""
    tenant: Tenant = ANYONE

    @property
    def tier(self) -> Tier:
        """The tier it begins with."""
        return self.in_flight.tier


@dataclass(kw_only=True, eq=False)
class Pending:
    """A request that asks for admission. Times are those of `time.perf_counter`."""

    call: Call
    tenant: Tenant
    job: Job
    arrived_at: float
    give_up_at: float
    order: float
    """Earliest first, within a tenant."""
    avoid: Container[Engine]
    granted: "asyncio.Future[Grant]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def grant_if_any(self) -> Grant | None:
        """The grant, if one was given."""
        has_one = self.granted.done() and not self.granted.cancelled() and self.granted.exception() is None
        return self.granted.result() if has_one else None

    def fail(self, error: Exception) -> None:
        """End the wait with an error."""
        if not self.granted.done():
            self.granted.set_exception(error)


class FairQueue:
    """Start-time fair queueing (Goyal, Vin, Cheng 1996) over tenants, by member tokens and shares."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._waiting: dict[str, list[Pending]] = {}
        self._length = 0
        self._used: dict[str, float] = {}
        """Member tokens granted to each tenant that waits or has run lately, over its share."""
        self._clock = 0.0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Pending]:
        return (pending for own in self._waiting.values() for pending in own)

    @property
    def is_full(self) -> bool:
        """Whether another request needs another's place."""
        return self._length >= self._max_length

    @property
    def pressure(self) -> float:
        """From 0 to 1, which is reached at half of the length: requests that may shrink are then at their floors."""
        return min(1.0, 2 * self._length / max(1, self._max_length))

    @property
    def backlog(self) -> int:
        """Tokens that the waiting requests with a deadline may generate."""
        return sum(pending.job.size.total_tokens for pending in self if pending.job.finish_by is not None)

    def in_turn(self) -> list[Pending]:
        """The first requests of each tenant, the one that used least of its share first."""
        tenants = sorted(self._waiting, key=lambda name: max(self._used.get(name, 0.0), self._clock))
        return [pending for name in tenants for pending in self._waiting[name][:_PER_TENANT]]

    def displaced_by(self, pending: Pending) -> Pending | None:
        """The request whose place a new one takes in a full queue: the last of the tenant with most, which may be the new one."""
        if not self.is_full:
            return None
        if not self._waiting:
            return pending
        largest = max(self._waiting, key=lambda name: len(self._waiting[name]))
        own = len(self._waiting.get(pending.tenant.name, ()))
        return pending if own + 1 >= len(self._waiting[largest]) else self._waiting[largest][-1]

    def add(self, pending: Pending) -> None:
        """Append, in its tenant's order."""
        own = self._waiting.setdefault(pending.tenant.name, [])
        own.append(pending)
        own.sort(key=lambda each: each.order)
        self._length += 1

    def remove(self, pending: Pending) -> None:
        """Take out, if it is there."""
        own = self._waiting.get(pending.tenant.name, [])
        with suppress(ValueError):
            own.remove(pending)
            self._length -= 1
        if not own:
            self._waiting.pop(pending.tenant.name, None)

    def charge(self, pending: Pending, plan: Plan) -> None:
        """Count what a granted request may generate. A tenant that returns begins at the clock, so that idling saves nothing up."""
        tenant = pending.tenant
        self._clock = max(self._used.get(tenant.name, 0.0), self._clock)
        self._used[tenant.name] = self._clock + plan.work.members * pending.job.size.total_tokens / tenant.share
        if len(self._used) > _MAX_TENANTS:
            self._used = {name: used for name, used in self._used.items() if used > self._clock}

    def settle(self, grant: Grant) -> None:
        """Give back what a request did not generate, if that is known."""
        request, tenant = grant.in_flight, grant.tenant
        if request.num_generated is not None and tenant.name in self._used:
            unused = request.num_sequences * request.work.max_tokens - request.num_generated
            self._used[tenant.name] -= request.work.members * unused / tenant.share
