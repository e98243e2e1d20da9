"""The interface of the state that gateway replicas share, and its in-memory version for a single gateway."""

import time
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A token bucket: holds at most `burst`, refilled at `rate_per_s`."""

    name: str
    rate_per_s: float
    burst: float


class Store(Protocol):
    """Shared state. No method raises: what cannot be shared is kept locally until it can be."""

    @property
    def is_up(self) -> bool:
        """Whether the shared state was reachable at the last access."""

    async def take(self, bucket: Bucket, amount: float) -> float:
        """Take `amount` (capped at the burst) and return 0, or take nothing and return the seconds until it is available."""

    async def settle(self, bucket: Bucket, amount: float) -> None:
        """Take `amount` unconditionally; a negative amount is given back."""

    async def announce(self, url: str) -> None:
        """Offer this gateway's engine at `url` to all gateways; to be repeated every few seconds."""

    async def engines(self) -> list[str]:
        """Addresses announced recently."""

    async def save_model(self, url: str, state: dict[str, Any]) -> None:
        """Save the state of the latency model of the engine at `url`."""

    async def load_model(self, url: str) -> dict[str, Any] | None:
        """The state that any gateway saved last for this engine; None if there is none."""

    async def publish_prior(self, version: int, manifest: str, *, replacing: str = "") -> None:
        """Make `manifest` the live one if its prior is newer, or if the live one is `replacing`, which is unusable."""

    async def live_prior(self) -> tuple[int, str] | None:
        """The live prior's version and manifest; None if none was published."""

    async def run(self) -> None:
        """Background work, to be run beside the gateway until cancelled."""

    async def close(self) -> None:
        """Close all connections."""


class MemoryStore:
    """The state of a single gateway."""

    def __init__(self) -> None:
        self._levels: dict[str, tuple[float, float]] = {}
        self._engines: dict[str, float] = {}
        self._models: dict[str, dict[str, Any]] = {}
        self._prior: tuple[int, str] | None = None

    @property
    def is_up(self) -> bool:
        """See `Store`."""
        return True

    async def take(self, bucket: Bucket, amount: float) -> float:
        """See `Store`."""
        amount, level = min(amount, bucket.burst), self._level(bucket)
        if level < amount:
            return (amount - level) / bucket.rate_per_s
        self._levels[bucket.name] = (level - amount, time.monotonic())
        return 0.0

    async def settle(self, bucket: Bucket, amount: float) -> None:
        """See `Store`."""
        self._levels[bucket.name] = (min(bucket.burst, self._level(bucket) - amount), time.monotonic())

    async def announce(self, url: str) -> None:
        """See `Store`."""
        self._engines[url] = time.monotonic()

    async def engines(self) -> list[str]:
        """See `Store`."""
        return list(self._engines)

    async def save_model(self, url: str, state: dict[str, Any]) -> None:
        """See `Store`."""
        self._models[url] = state

    async def load_model(self, url: str) -> dict[str, Any] | None:
        """See `Store`."""
        return self._models.get(url)

    async def publish_prior(self, version: int, manifest: str, *, replacing: str = "") -> None:
        """See `Store`."""
        if self._prior is None or version > self._prior[0] or self._prior[1] == replacing:
            self._prior = (version, manifest)

    async def live_prior(self) -> tuple[int, str] | None:
        """See `Store`."""
        return self._prior

    async def run(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to close."""

    def _level(self, bucket: Bucket) -> float:
        level, at = self._levels.get(bucket.name, (bucket.burst, 0.0))
        return min(bucket.burst, level + (time.monotonic() - at) * bucket.rate_per_s)
