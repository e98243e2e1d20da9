"""Slots for auxiliary requests, which cost an engine's server time rather than its members': a few at once, fewer per tenant."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from chorus.serve.gateway.request.errors import ApiError
from chorus.serve.gateway.request.keys import Tenant

_MAX_RUNNING, _MAX_RUNNING_PER_TENANT, _MAX_PER_TENANT = 4, 2, 32


@dataclass(kw_only=True)
class _TenantSlots:
    running: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_MAX_RUNNING_PER_TENANT))
    num_requests: int = 0
    """Running and waiting."""


class Slots:
    """First come, first served, within each tenant's own limit."""

    def __init__(self) -> None:
        self._running = asyncio.Semaphore(_MAX_RUNNING)
        self._tenants: dict[str, _TenantSlots] = {}

    @asynccontextmanager
    async def slot(self, tenant: Tenant) -> AsyncIterator[None]:
        """Wait for a slot, and free it at the end.

        Raises:
            ApiError: 429 if the tenant has too many requests of this kind already.
        """
        own = self._tenants.setdefault(tenant.name, _TenantSlots())
        if own.num_requests >= _MAX_PER_TENANT:
            message = f"this API key has {own.num_requests} such requests running or waiting, the maximum; try again in about 1 s."
            raise ApiError(429, message, code="overloaded", headers={"Retry-After": "1"})
        own.num_requests += 1
        try:
            async with own.running, self._running:
                yield
        finally:
            own.num_requests -= 1
            if not own.num_requests:
                del self._tenants[tenant.name]
