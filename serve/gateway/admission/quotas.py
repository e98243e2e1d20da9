"""Rates of a tenant: requests per second and tokens per minute, taken before a request is served and settled after it."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from chorus.serve.gateway.request.errors import ApiError
from chorus.serve.gateway.request.keys import Tenant
from chorus.serve.gateway.request.size import NO_USAGE, Usage
from chorus.serve.gateway.shared.store import Bucket, Store

_LONGEST_WAIT_S = 24 * 3600


@dataclass(kw_only=True)
class Bill:
    """What a request costs, filled in by those who serve it."""

    used: Usage | None = NO_USAGE
    """What the engine computed so far; None while that cannot be known: then the charge stays as it was taken."""


def _request_bucket(tenant: Tenant) -> Bucket | None:
    rate = tenant.requests_per_s
    return None if rate is None else Bucket(name=f"requests:{tenant.name}", rate_per_s=rate, burst=max(1.0, rate))


def _token_bucket(tenant: Tenant) -> Bucket | None:
    rate = tenant.tokens_per_min
    return None if rate is None else Bucket(name=f"tokens:{tenant.name}", rate_per_s=rate / 60, burst=rate)


async def take_request(store: Store, tenant: Tenant) -> None:
    """Take a request from its tenant's rate of requests, before its body is read.

    Raises:
        ApiError: 429 with the time after which there is enough.
    """
    if (requests := _request_bucket(tenant)) and (wait_s := await store.take(requests, 1.0)):
        raise _too_many(f"{tenant.requests_per_s:g} requests per second", wait_s)


@asynccontextmanager
async def charged(store: Store, tenant: Tenant, tokens: float) -> AsyncIterator[Bill]:
    """Take tokens from the tenant's rate, and settle them to the bill's `used` however the request ends.

    A request may ask for more than the burst: it takes the burst, and what it used beyond that is a debt.

    Raises:
        ApiError: 429 with the time after which there is enough.
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
    retry_after_s = max(1, math.ceil(min(wait_s, _LONGEST_WAIT_S)))
    return ApiError(
        429,
        f"this API key's rate of {what} is used up; come back in {retry_after_s} s.",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(retry_after_s)},
    )
