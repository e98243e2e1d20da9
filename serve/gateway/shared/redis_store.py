"""The shared store in Redis. While Redis is down, the gateway goes on with its share of every quota.

Values read from Redis are not trusted: a key of the wrong type is removed, a number out of bounds counts as unknown.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from redis.exceptions import RedisClusterException, RedisError, ResponseError

from chorus.population.manifest import LAST_PRIOR_VERSION
from chorus.serve.gateway.shared.redis_client import connect
from chorus.serve.gateway.shared.store import Bucket, MemoryStore

logger = logging.getLogger(__name__)

_TIMEOUT_S = 0.5
"""Redis counts as down if a command takes longer: requests wait for it."""
_RETRY_PAUSE_S = 1.0
_TTL_S = 10.0
_MODEL_TTL_S = 24 * 3600
_MAX_BYTES = 2**24
"""Longest value that is read, in bytes."""
_MAX_ENGINES = 1024

# Begins the scripts below. All times are those of Redis' clock, as gateways' clocks may differ and jump.
_NOW = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1e6
local function finite(text, most)
  local number = tonumber(text)
  if number and number >= -most and number <= most then return number end
end
"""
# Takes from a bucket, atomically. A bucket that is full again expires.
_TAKE = (
    _NOW
    + """
local known = redis.call('HMGET', KEYS[1], 'level', 'at')
local rate, burst, amount = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local level = math.min(burst, finite(known[1], 1e12) or burst)
level = math.min(burst, level + math.max(0, now - (finite(known[2], 1e12) or now)) * rate)
local wait = 0
if ARGV[4] == '1' or level >= amount then level = math.min(burst, level - amount) else wait = (amount - level) / rate end
redis.call('HSET', KEYS[1], 'level', string.format('%.6f', level), 'at', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.min(1e12, math.ceil((burst - level) / rate * 1000) + 1000)))
return string.format('%.6f', wait)
"""
)
# Entries of a set stay while they are renewed. Entries dated in the future are removed, as they would never expire.
_RENEW = _NOW + "redis.call('ZADD', KEYS[1], now, ARGV[1]) return now"
_LIST_FRESH = (
    _NOW
    + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], now + ARGV[1], '+inf')
return redis.call('ZREVRANGE', KEYS[1], 0, ARGV[2] - 1)
"""
)
# Publishes if newer than the stored version (an invalid one counts as none), or to replace an unusable manifest.
_PUBLISH = (
    _NOW
    + """
local known = finite(redis.call('HGET', KEYS[1], 'version'), tonumber(ARGV[3])) or -1
local is_useless = ARGV[4] ~= '' and redis.call('HGET', KEYS[1], 'manifest') == ARGV[4]
if tonumber(ARGV[1]) > known or is_useless then redis.call('HSET', KEYS[1], 'version', ARGV[1], 'manifest', ARGV[2]) end
return 1
"""
)
_PRIOR = """
if redis.call('HSTRLEN', KEYS[1], 'manifest') > tonumber(ARGV[1]) then redis.call('DEL', KEYS[1]) end
return redis.call('HMGET', KEYS[1], 'version', 'manifest')
"""


class RedisStore:
    """State shared by all gateways of one population."""

    def __init__(self, url: str, population: str, *, timeout_s: float = _TIMEOUT_S) -> None:
        self._redis, self._close = connect(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            decode_responses=True,
            encoding_errors="replace",
        )
        self._take = self._redis.register_script(_TAKE)
        self._renew = self._redis.register_script(_RENEW)
        self._list_fresh = self._redis.register_script(_LIST_FRESH)
        self._publish = self._redis.register_script(_PUBLISH)
        self._prior = self._redis.register_script(_PRIOR)
        self._prefix = f"chorus:{population}:"
        self._local = MemoryStore()
        self._id = uuid.uuid4().hex
        self._num_gateways = 1
        self._is_up = True
        self._try_again_at = 0.0
        self._last_found_at: dict[str, float] = {}
        """When each engine was last found in Redis, or Redis was down."""

    @property
    def is_up(self) -> bool:
        """Whether Redis answered the last command."""
        return self._is_up

    async def take(self, bucket: Bucket, amount: float) -> float:
        """See `Store`. While Redis is down: from this gateway's share."""
        amount = min(amount, bucket.burst)
        wait_s = await self._run(self._take, f"quota:{bucket.name}", *_rate_and_burst(bucket), amount, 0)
        if wait_s is None:
            share = self._share(bucket)
            return await self._local.take(share, min(amount, share.burst))
        return float(wait_s)

    async def settle(self, bucket: Bucket, amount: float) -> None:
        """See `Store`."""
        if await self._run(self._take, f"quota:{bucket.name}", *_rate_and_burst(bucket), amount, 1) is None:
            await self._local.settle(self._share(bucket), amount)

    async def announce(self, url: str) -> None:
        """See `Store`."""
        await self._run(self._renew, "engines", url)

    async def engines(self) -> list[str]:
        """See `Store`. Known engines stay while Redis is down and, if it returns empty, until they had time to be announced again;
        health checks decide whether they are used."""
        found = await self._run(self._list_fresh, "engines", _TTL_S, _MAX_ENGINES)
        now = time.monotonic()
        for url in self._last_found_at if found is None else filter(_is_address, found):
            self._last_found_at[url] = now
        self._last_found_at = {
            url: found_at for url, found_at in self._last_found_at.items() if now - found_at < _TTL_S
        }
        return list(self._last_found_at)

    async def save_model(self, url: str, state: dict[str, Any]) -> None:
        """See `Store`."""
        key, text = f"model:{url}", json.dumps(state)
        await self._run(lambda keys, args: self._redis.set(keys[0], text, ex=_MODEL_TTL_S), key)

    async def load_model(self, url: str) -> dict[str, Any] | None:
        """See `Store`."""
        found = await self._run(lambda keys, args: self._redis.getrange(keys[0], 0, _MAX_BYTES), f"model:{url}")
        try:
            state = json.loads(found) if found else None
        except (ValueError, RecursionError):
            logger.warning("ignoring the saved times of engine %s: not JSON", url)
            return None
        return state if isinstance(state, dict) else None

    async def publish_prior(self, version: int, manifest: str, *, replacing: str = "") -> None:
        """See `Store`."""
        await self._run(self._publish, "prior", version, manifest, LAST_PRIOR_VERSION, replacing)

    async def live_prior(self) -> tuple[int, str] | None:
        """See `Store`."""
        version, text = await self._run(self._prior, "prior", _MAX_BYTES) or (None, None)
        if text is None or version is None or not (version.isascii() and version.isdecimal() and len(version) < 20):
            return None
        return int(version), text

    async def run(self) -> None:
        """Announce this gateway and count all, to split the quotas among them while Redis is down."""
        while True:
            await self._run(self._renew, "gateways", self._id)
            others = await self._run(self._list_fresh, "gateways", _TTL_S, _MAX_ENGINES)
            self._num_gateways = max(1, len(others)) if others is not None else self._num_gateways
            await asyncio.sleep(_TTL_S / 5)

    async def close(self) -> None:
        """Close all connections."""
        await self._close()

    def _share(self, bucket: Bucket) -> Bucket:
        count = self._num_gateways
        burst = max(1.0, bucket.burst / count)
        return Bucket(name=bucket.name, rate_per_s=bucket.rate_per_s / count, burst=burst)

    async def _run(self, command: Callable[..., Awaitable[Any]], key: str, *args: object) -> Any:
        """Run `command` on this population's `key` and return its result; None while Redis is down (retried once a second)."""
        if time.monotonic() < self._try_again_at:
            return None
        keys = [self._prefix + key]
        try:
            try:
                found = await command(keys=keys, args=args)
            except ResponseError as error:
                if "WRONGTYPE" not in str(error):
                    raise
                logger.warning("removing Redis key %s: it has the wrong type, so no gateway wrote it", *keys)
                await self._redis.delete(*keys)
                found = await command(keys=keys, args=args)
        except (RedisError, RedisClusterException, OSError, TimeoutError, ValueError) as error:
            self._try_again_at = time.monotonic() + _RETRY_PAUSE_S
            if self._is_up:
                logger.warning(
                    "Redis is down; granting 1/%d of each quota until it is up: %s",
                    self._num_gateways,
                    error,
                )
            self._is_up = False
            return None
        if not self._is_up:
            logger.warning("Redis is up again")
        self._is_up, self._try_again_at = True, 0.0
        return found


def _rate_and_burst(bucket: Bucket) -> tuple[float, float]:
    return bucket.rate_per_s, bucket.burst


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname and parts.port) and parts.path in ("", "/")
    except ValueError:
        return False
