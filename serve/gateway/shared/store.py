"""What replicas of the gateway share, as an interface, and its form for one gateway alone: in memory."""

import time
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A token bucket: `burst` at most, filled at `rate_per_s`."""

    name: str
    rate_per_s: float
    burst: float


class Store(Protocol):
    """Shared state. Nothing here raises: what cannot be shared is kept locally until it can."""

    @property
    def is_up(self) -> bool:
        """Whether what is shared could be reached when last asked for."""

    async def take(self, bucket: Bucket, amount: float) -> float:
        """Take `amount` (at most the burst) if it is there, and return 0; else take nothing and return the seconds until it is."""

    async def settle(self, bucket: Bucket, amount: float) -> None:
        """Take `amount` in any case, or give it back where it is negative."""

    async def announce(self, url: str) -> None:
        """An engine of ours answers at `url`, for all to use; to be said again every few seconds."""

    async def engines(self) -> list[str]:
        """Addresses that were announced lately."""

    async def save_model(self, url: str, state: dict[str, Any]) -> None:
        """What was learned about the engine at `url`."""

    async def load_model(self, url: str) -> dict[str, Any] | None:
        """What any gateway learned about it; None if none did."""

    async def publish_prior(self, version: int, manifest: str, *, instead_of: str = "") -> None:
        """Make a manifest the live one, if its prior is newer than that, or if that is `instead_of`, which nobody can use."""

    async def live_prior(self) -> tuple[int, str] | None:
        """The live prior's version and manifest; None if none was published."""

    async def keep(self) -> None:
        """Run beside the gateway until cancelled."""

    async def close(self) -> None:
        """Let go of all connections."""


class MemoryStore:
    """The state of one gateway, for itself."""

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

    async def publish_prior(self, version: int, manifest: str, *, instead_of: str = "") -> None:
        """See `Store`."""
        if self._prior is None or version > self._prior[0] or self._prior[1] == instead_of:
            self._prior = (version, manifest)

    async def live_prior(self) -> tuple[int, str] | None:
        """See `Store`."""
        return self._prior

    async def keep(self) -> None:
        """Nothing needs to be done."""

    async def close(self) -> None:
        """Nothing is held."""

    def _level(self, bucket: Bucket) -> float:
        level, at = self._levels.get(bucket.name, (bucket.burst, 0.0))
        return min(bucket.burst, level + (time.monotonic() - at) * bucket.rate_per_s)
