"""The shared store in Redis. Redis may go away at any time: service goes on, with this gateway's share of every quota."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError

from chorus.serve.gateway.store import Bucket, MemoryStore

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TIMEOUT_S = 0.5
_PAUSE_S = 1.0
_FRESH_S = 10.0
_MODEL_S = 24 * 3600
# Atomic, and by Redis' own clock: gateways need not agree on the time. A bucket that is full again is forgotten.
_TAKE = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1e6
local known = redis.call('HMGET', KEYS[1], 'level', 'at')
local rate, burst, amount = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local level = math.min(burst, (tonumber(known[1]) or burst) + math.max(0, now - (tonumber(known[2]) or now)) * rate)
local wait = 0
if ARGV[4] == '1' or level >= amount then level = math.min(burst, level - amount) else wait = (amount - level) / rate end
redis.call('HSET', KEYS[1], 'level', string.format('%.6f', level), 'at', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[1], math.ceil((burst - level) / rate * 1000) + 1000)
return string.format('%.6f', wait)
"""
_PUBLISH = """
local known = tonumber(redis.call('HGET', KEYS[1], 'version')) or -1
if tonumber(ARGV[1]) > known then redis.call('HSET', KEYS[1], 'version', ARGV[1], 'manifest', ARGV[2]) end
return known
"""


class RedisStore:
    """State that all gateways of one population share."""

    def __init__(self, url: str, population: str) -> None:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=32,
            timeout=_TIMEOUT_S,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            decode_responses=True,
        )
        self._redis = Redis.from_pool(pool)
        self._take = self._redis.register_script(_TAKE)
        self._publish = self._redis.register_script(_PUBLISH)
        self._prefix = f"chorus:{population}:"
        self._local = MemoryStore()
        self._id = uuid.uuid4().hex
        self._num_gateways = 1
        self._is_up = True
        self._try_again_at = 0.0
        self._seen_engines: dict[str, float] = {}
        """When each was last found there, or could not be looked for."""

    @property
    def is_up(self) -> bool:
        """Whether Redis answered when last asked."""
        return self._is_up

    async def take(self, bucket: Bucket, amount: float) -> float:
        """See `Store`. Without Redis: from this gateway's share."""
        amount = min(amount, bucket.burst)
        wait_s = await self._ask(lambda: self._take(**self._bucket(bucket, amount, forced=False)))
        if wait_s is None:
            share = self._share(bucket)
            return await self._local.take(share, min(amount, share.burst))
        return float(wait_s)

    async def settle(self, bucket: Bucket, amount: float) -> None:
        """See `Store`."""
        if await self._ask(lambda: self._take(**self._bucket(bucket, amount, forced=True))) is None:
            await self._local.settle(self._share(bucket), amount)

    async def announce(self, url: str) -> None:
        """See `Store`."""
        await self._ask(lambda: self._redis.zadd(self._prefix + "engines", {url: time.time()}))

    async def engines(self) -> list[str]:
        """See `Store`. Those known before stay while Redis is away, and until they had time to announce themselves to one that
        comes back empty; their own health says whether they live."""
        found = await self._ask(
            lambda: self._redis.zrangebyscore(self._prefix + "engines", time.time() - _FRESH_S, "+inf")
        )
        now = time.monotonic()
        for url in self._seen_engines if found is None else map(str, found):
            self._seen_engines[url] = now
        self._seen_engines = {url: seen for url, seen in self._seen_engines.items() if now - seen < _FRESH_S}
        return list(self._seen_engines)

    async def save_model(self, url: str, state: dict[str, Any]) -> None:
        """See `Store`."""
        await self._ask(lambda: self._redis.set(f"{self._prefix}model:{url}", json.dumps(state), ex=_MODEL_S))

    async def load_model(self, url: str) -> dict[str, Any] | None:
        """See `Store`."""
        found = await self._ask(lambda: self._redis.get(f"{self._prefix}model:{url}"))
        state = json.loads(found) if found else None
        return state if isinstance(state, dict) else None

    async def publish_prior(self, version: int, manifest: str) -> None:
        """See `Store`."""
        await self._ask(lambda: self._publish(keys=[self._prefix + "prior"], args=[version, manifest]))

    async def live_prior(self) -> tuple[int, str] | None:
        """See `Store`."""
        found = await self._ask(lambda: self._redis.hmget(self._prefix + "prior", ["version", "manifest"]))
        if not found or found[0] is None:
            return None
        return int(found[0]), str(found[1])

    async def keep(self) -> None:
        """Say that this gateway lives, and count the others, whose shares of a quota it would have to leave to them."""
        key = self._prefix + "gateways"
        while True:
            now = time.time()
            await self._ask(lambda now=now: self._redis.zadd(key, {self._id: now}))  # type: ignore[misc]
            await self._ask(lambda now=now: self._redis.zremrangebyscore(key, 0, now - _FRESH_S))  # type: ignore[misc]
            count = await self._ask(lambda: self._redis.zcard(key))
            self._num_gateways = max(1, count or self._num_gateways)
            await asyncio.sleep(_FRESH_S / 5)

    async def close(self) -> None:
        """Let go of all connections."""
        await self._redis.aclose()

    def _bucket(self, bucket: Bucket, amount: float, *, forced: bool) -> dict[str, Any]:
        args = [bucket.rate_per_s, bucket.burst, amount, int(forced)]
        return {"keys": [f"{self._prefix}quota:{bucket.name}"], "args": args}

    def _share(self, bucket: Bucket) -> Bucket:
        count = self._num_gateways
        burst = max(1.0, bucket.burst / count)
        return Bucket(name=bucket.name, rate_per_s=bucket.rate_per_s / count, burst=burst)

    async def _ask(self, command: Callable[[], Awaitable[T]]) -> T | None:
        """Its answer; None while Redis is away, which is found out at most once a second."""
        if time.monotonic() < self._try_again_at:
            return None
        try:
            found = await command()
        except (RedisError, OSError, TimeoutError, ValueError) as error:
            self._try_again_at = time.monotonic() + _PAUSE_S
            if self._is_up:
                logger.warning("Redis is away; quotas fall back to a share of %d: %s", self._num_gateways, error)
            self._is_up = False
            return None
        if not self._is_up:
            logger.warning("Redis is back")
        self._is_up, self._try_again_at = True, 0.0
        return found
