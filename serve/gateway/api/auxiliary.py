"""Auxiliary requests, which cost an engine's server time rather than its members': tokens cut and joined, a text compared.

They are served within the tenant's rates, a few at once, and within a time limit. A client that leaves ends its request.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from chorus.serve.gateway.admission import quotas
from chorus.serve.gateway.admission.quotas import Bill
from chorus.serve.gateway.admission.slots import Slots
from chorus.serve.gateway.relay.context import RequestContext
from chorus.serve.gateway.request.errors import ApiError
from chorus.serve.gateway.transport.disconnects import while_connected

T = TypeVar("T")

_TIMEOUT_S = 60.0


async def serve(
    receive: Receive,
    slots: Slots,
    context: RequestContext,
    tokens: float,
    work: Callable[[Bill], Coroutine[Any, Any, T]],
    *,
    timeout_s: float = _TIMEOUT_S,
) -> T:
    """The result of `work`, run in a slot. `tokens` are taken from the tenant's rates and settled to what `work` puts on the bill.

    Raises:
        ApiError: 429; 504 after `timeout_s`; or as `work`.
        ClientDisconnect: the client left before the end.
    """

    async def charged() -> T:
        async with quotas.charged(context.store, context.tenant, tokens) as bill:
            try:
                async with asyncio.timeout(timeout_s), slots.slot(context.tenant):
                    return await work(bill)
            except TimeoutError:
                message = f"the request took longer than {timeout_s:g} s; send a smaller one."
                raise ApiError(504, message, code="timeout") from None

    return await while_connected(receive, charged())
