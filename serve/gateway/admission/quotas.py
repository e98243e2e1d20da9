"""A tenant's rate limits: requests per second and tokens per minute, charged before a request is served and settled after it."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from chorus.serve.gateway.request.errors import ApiError
from chorus.serve.gateway.request.keys import Tenant
from chorus.serve.gateway.request.size import NO_USAGE, Usage
from chorus.serve.gateway.shared.store import Bucket, Store

_MAX_WAIT_S = 24 * 3600


@dataclass(kw_only=True)
class Bill:
    """What a request used, filled in while it is served."""

    used: Usage | None = NO_USAGE
    """What the engine computed so far; None while that is unknown: the charge then stays as it was taken."""


def _request_bucket(tenant: Tenant) -> Bucket | None:
    rate = tenant.requests_per_s
    return None if rate is None else Bucket(name=f"requests:{tenant.name}", rate_per_s=rate, burst=max(1.0, rate))


def _token_bucket(tenant: Tenant) -> Bucket | None:
    rate = tenant.tokens_per_min
    return None if rate is None else Bucket(name=f"tokens:{tenant.name}", rate_per_s=rate / 60, burst=rate)


async def take_request(store: Store, tenant: Tenant) -> None:
    """Charge one request to its tenant's request rate, before its body is read.

    Raises:
        ApiError: 429 with the seconds to wait, if the rate is used up.
    """
    if (requests := _request_bucket(tenant)) and (wait_s := await store.take(requests, 1.0)):
        raise _too_many(f"{tenant.requests_per_s:g} requests per second", wait_s)


@asynccontextmanager
async def charged(store: Store, tenant: Tenant, tokens: float) -> AsyncIterator[Bill]:
    """Charge `tokens` to the tenant's token rate, and settle them to the bill's `used`, however the request ends.

    A request with more tokens than the burst is charged the burst; what it uses beyond that becomes a debt.

    Raises:
        ApiError: 429 with the seconds to wait, if the rate is used up.
    """
    bucket, taken = _token_bucket(tenant), 0.0
    if bucket:
        taken = min(tokens, bucket.burst)
        if wait_s := await store.take(bucket, taken):
            if requests := _request_bucket(tenant):
                await store.settle(requests, -1.0)
            raise _too_many(f"{tenant.tokens_per_min:g} tokens per minute", wait_s)
    bill = Bill()
    try:
        yield bill
    finally:
        if bucket and bill.used is not None:
            used = bill.used.prompt_tokens + bill.used.completion_tokens
            await asyncio.shield(store.settle(bucket, used - taken))


def _too_many(what: str, wait_s: float) -> ApiError:
    retry_after_s = max(1, math.ceil(min(wait_s, _MAX_WAIT_S)))
    return ApiError(
        429,
        f"this API key exceeded its limit of {what}; try again in {retry_after_s} s.",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(retry_after_s)},
    )
