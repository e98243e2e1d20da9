"""Requests beside completions, which cost an engine's server time rather than its members': tokens cut and joined, a text compared.

A few at once, of each tenant fewer, within its rates and a time limit. A client that leaves takes its request with it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.types import Receive

from chorus.serve.gateway import quotas
from chorus.serve.gateway.errors import ApiError
from chorus.serve.gateway.presence import while_connected
from chorus.serve.gateway.proxy import Passage
from chorus.serve.gateway.quotas import Bill
from chorus.serve.gateway.tenants import Tenant

T = TypeVar("T")

_AT_ONCE, _AT_ONCE_EACH, _MOST_EACH = 4, 2, 32
_LONGEST_S = 60.0


@dataclass(kw_only=True)
class _Line:
    """One tenant's requests."""

    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE_EACH))
    num: int = 0
    """Running and waiting."""


class Turns:
    """Who may work now. The others wait, first come first served, each behind its own tenant's."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._lines: dict[str, _Line] = {}

    @asynccontextmanager
    async def turn(self, tenant: Tenant) -> AsyncIterator[None]:
        """Wait for a turn, and give it back at the end.

        Raises:
            ApiError: 429 if too many of the tenant's wait.
        """
        line = self._lines.setdefault(tenant.name, _Line())
        if line.num >= _MOST_EACH:
            message = (
                f"{line.num} requests of this kind are running or waiting for this API key; come back in about 1 s."
            )
            raise ApiError(429, message, code="overloaded", headers={"Retry-After": "1"})
        line.num += 1
        try:
            async with line.turns, self._turns:
                yield
        finally:
            line.num -= 1
            if not line.num:
                del self._lines[tenant.name]


async def serve(
    receive: Receive,
    turns: Turns,
    passage: Passage,
    tokens: float,
    work: Callable[[Bill], Coroutine[Any, Any, T]],
    *,
    longest_s: float = _LONGEST_S,
) -> T:
    """What `work` returns, in its turn. `tokens` are taken from the tenant's rates, and settled to what `work` puts on the bill.

    Raises:
        ApiError: 429; 504 after `longest_s`; or as `work`.
        ClientDisconnect: the client left before.
    """
    return await while_connected(receive, _work(turns, passage, tokens, work, longest_s))


async def _work(
    turns: Turns, passage: Passage, tokens: float, work: Callable[[Bill], Coroutine[Any, Any, T]], longest_s: float
) -> T:
    async with quotas.charged(passage.store, passage.tenant, tokens) as bill:
        try:
            async with asyncio.timeout(longest_s), turns.turn(passage.tenant):
                return await work(bill)
        except TimeoutError:
            raise ApiError(504, f"this took longer than {longest_s:g} s; send less at once.", code="timeout") from None
