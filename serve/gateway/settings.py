"""What a gateway is told when it starts."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from chorus.population.errors import ChorusError
from chorus.population.live import LiveManifest
from chorus.population.manifest import Population, Tier
from chorus.serve.gateway.admission.admission import Limits
from chorus.serve.gateway.engines.discovery import DNS, SHARED
from chorus.serve.gateway.engines.supervisor import Supervision
from chorus.serve.gateway.request.keys import Keys
from chorus.serve.gateway.request.tiers import default_tier

_MIN_AUXILIARY_BYTES = 256 * 1024


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A gateway for one population."""

    population: Population
    """With at least one tier."""
    default_tier_name: str | None = None
    """Tier of requests that ask for none; the largest if None."""
    manifest: LiveManifest | None = None
    """Where a prior fitted again appears; None keeps the tiers as they are."""
    directory: Path | None = None
    """The population's directory, where a prior that another gateway published is written; None ignores those."""
    engine: Supervision | str | tuple[str, ...]
    """An engine to run and watch over, or where others run theirs: addresses, `dns+http://NAME:PORT` for every address behind a
    name, or `redis` for those that gateways announced there."""
    keys: Keys = field(default_factory=Keys)
    """Who may ask for what."""
    redis: str | None = None
    """Address of the Redis that replicas share; None keeps everything in memory."""
    discovery_interval_s: float = 5.0
    """Time between two looks for engines that came or went, and for what replicas share."""
    otlp_traces_endpoint: str | None = None
    """Where traces go, in OTLP over HTTP; None makes none."""
    echo_part: float = 0.0
    """Part of the requests whose prompt's loss is measured, in moments in which an engine has nothing else to do."""
    limits: Limits = field(default_factory=Limits)
    """How much is taken on at once."""
    calibrates: bool = True
    """Whether a few short requests of our own tell how long an engine takes, when it begins to answer."""
    stall_timeout_s: float = 60.0
    """Longest silence without a reason (see `life`): of an engine with work, which then counts as gone, and of a stream."""
    max_body_bytes: int = 2 * 2**20
    """Longest request body, also after decoding; longer ones get 413. The worst 2 MiB take a third of a second to read,
    in which nobody else is answered."""
    max_bodies_bytes: int = 64 * 2**20
    """What bodies that are still being read may hold together."""
    body_timeout_s: float = 60.0
    """Longest time from a request's head to the end of its body."""
    allow_origins: tuple[str, ...] = ()
    """Origins whose pages may call the API from a browser (CORS); `*` for all."""
    probe_interval_s: float = 1.0
    """Time between two looks at the engine's health."""
    probe_timeout_s: float = 15.0
    """An engine that does not answer a look for this long counts as down. A busy one takes its time."""

    def __post_init__(self) -> None:
        for origin in self.allow_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ChorusError(
                    f"origin {origin!r} is not one that a browser sends: SCHEME://HOST[:PORT] without a path, or * for all."
                )
        if not self.population.tiers:
            raise ChorusError(
                f"population {self.population.name!r} has no tiers. Fit them with `chorus prior fit DIR`."
            )
        if self.default_tier_name is not None:
            self.population.tier(self.default_tier_name)
        for source in self.sources:
            if source == SHARED and self.redis is None:
                raise ChorusError("engine 'redis' needs the address of a Redis, with --redis.")
            if source != SHARED and not source.removeprefix(DNS).startswith(("http://", "https://")):
                raise ChorusError(
                    f"engine {source!r} is not an address such as http://127.0.0.1:8001 or dns+http://engines:8000."
                )
        if self.redis is not None and not self.redis.startswith(("redis://", "rediss://", "unix://")):
            raise ChorusError(f"redis {self.redis!r} is not an address such as redis://127.0.0.1:6379/0.")

    @property
    def max_auxiliary_bytes(self) -> int:
        """Longest body of a request beside completions: more than fits a context as text or as token ids."""
        return min(self.max_body_bytes, max(_MIN_AUXILIARY_BYTES, 8 * self.population.context_length))

    @property
    def sources(self) -> tuple[str, ...]:
        """Where others run engines; empty if there is one of our own."""
        if isinstance(self.engine, Supervision):
            return ()
        return (self.engine,) if isinstance(self.engine, str) else self.engine

    @property
    def default_tier(self) -> Tier:
        """Tier of requests that ask for none."""
        if self.default_tier_name is None:
            return default_tier(self.population)
        return self.population.tier(self.default_tier_name)
