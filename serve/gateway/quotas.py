"""Rates of a tenant: requests per second and tokens per minute, taken before a request is served and settled after it."""

import math
from dataclasses import dataclass

from chorus.serve.gateway.errors import ApiError
from chorus.serve.gateway.splice import Usage
from chorus.serve.gateway.store import Bucket, Store
from chorus.serve.gateway.tenants import Tenant
from chorus.serve.gateway.terms import Size


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What was taken for a request."""

    bucket: Bucket
    tokens: float


def _request_bucket(tenant: Tenant) -> Bucket | None:
    rate = tenant.requests_per_s
    return None if rate is None else Bucket(name=f"requests:{tenant.name}", rate_per_s=rate, burst=max(1.0, rate))


def _token_bucket(tenant: Tenant) -> Bucket | None:
    rate = tenant.tokens_per_min
    return None if rate is None else Bucket(name=f"tokens:{tenant.name}", rate_per_s=rate / 60, burst=rate)


async def charge(store: Store, tenant: Tenant, size: Size, prompt_tokens: float) -> Charge | None:
    """Take a request's share of its tenant's rates: the prompt, and every token that may be generated.

    Raises:
        ApiError: 429 with the time after which there is enough.
    """
    if (requests := _request_bucket(tenant)) and (wait_s := await store.take(requests, 1.0)):
        raise _too_many(f"{tenant.requests_per_s:g} requests per second", wait_s)
    if (bucket := _token_bucket(tenant)) is None:
        return None
    tokens = min(prompt_tokens + size.total_tokens, bucket.burst)
    if wait_s := await store.take(bucket, tokens):
        if requests:
            await store.settle(requests, -1.0)
        raise _too_many(f"{tenant.tokens_per_min:g} tokens per minute", wait_s)
    return Charge(bucket=bucket, tokens=tokens)


async def settle(store: Store, taken: Charge | None, usage: Usage | None) -> None:
    """Correct what was taken to what was used. Where that is not known (the client left), it stays."""
    if taken is not None and usage is not None:
        await store.settle(taken.bucket, usage.prompt_tokens + usage.completion_tokens - taken.tokens)


def _too_many(what: str, wait_s: float) -> ApiError:
    retry_after_s = max(1, math.ceil(wait_s))
    return ApiError(
        429,
        f"this API key's rate of {what} is used up; come back in {retry_after_s} s.",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(retry_after_s)},
    )
