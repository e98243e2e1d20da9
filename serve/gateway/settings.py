"""The settings of a gateway, checked when they are made."""

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
    """Settings of a gateway for one population."""

    population: Population
    """The population to serve, with at least one tier."""
    default_tier_name: str | None = None
    """Tier of requests that name none; the largest if None."""
    manifest: LiveManifest | None = None
    """The manifest on disk, reread when a prior is refitted; None keeps the tiers fixed."""
    directory: Path | None = None
    """The population's directory, to which priors published by other gateways are written; None ignores them."""
    engine: Supervision | str | tuple[str, ...]
    """An engine to start and supervise, or where others run theirs: addresses, `dns+http://NAME:PORT` for every address behind a
    name, or `redis` for the engines that gateways announced there."""
    keys: Keys = field(default_factory=Keys)
    """API keys and their rights."""
    redis: str | None = None
    """Address of the Redis that gateways share; None keeps everything in memory."""
    discovery_interval_s: float = 5.0
    """Seconds between two discoveries of engines. State is shared with other gateways twice as often."""
    otlp_traces_endpoint: str | None = None
    """Address to which traces are sent, in OTLP over HTTP; None disables tracing."""
    echo_part: float = 0.0
    """Fraction of requests whose prompt's loss is measured while an engine is idle."""
    limits: Limits = field(default_factory=Limits)
    """Limits of admission."""
    calibrates: bool = True
    """Whether a few short requests measure how long an engine takes when it comes up."""
    stall_timeout_s: float = 60.0
    """Longest unexplained silence in seconds (see `life`): of a stream, or of an engine with work, which then counts as frozen."""
    max_body_bytes: int = 2 * 2**20
    """Most bytes of a request body, also after decoding; longer ones get 413. The worst 2 MiB take a third of a second to parse,
    which blocks all other requests."""
    max_bodies_bytes: int = 64 * 2**20
    """Most bytes held by all bodies that are being read."""
    body_timeout_s: float = 60.0
    """Most seconds from a request's head to the end of its body."""
    allow_origins: tuple[str, ...] = ()
    """Origins whose pages may call the API from a browser (CORS); `*` allows all."""
    probe_interval_s: float = 1.0
    """Seconds between two health probes of an engine."""
    probe_timeout_s: float = 15.0
    """Seconds after which an unanswered probe marks an engine as down; long, because a busy engine answers slowly."""

    def __post_init__(self) -> None:
        for origin in self.allow_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ChorusError(
                    f"--allow-origin {origin!r} is invalid; use SCHEME://HOST[:PORT] without a path, or * for all."
                )
        if not self.population.tiers:
            raise ChorusError(
                f"population {self.population.name!r} has no tiers. Fit them with `chorus prior fit DIR`."
            )
        if self.default_tier_name is not None:
            self.population.tier(self.default_tier_name)
        for source in self.sources:
            if source == SHARED and self.redis is None:
                raise ChorusError("--engine redis needs the address of a Redis; set --redis.")
            if source != SHARED and not source.removeprefix(DNS).startswith(("http://", "https://")):
                raise ChorusError(
                    f"--engine {source!r} is not a URL; use one such as http://127.0.0.1:8001 or dns+http://engines:8000."
                )
        if self.redis is not None:
            from chorus.serve.gateway.shared.redis_client import check_address  # only this needs the Redis client

            check_address(self.redis)

    @property
    def max_auxiliary_bytes(self) -> int:
        """Most bytes of an auxiliary request's body: more than a full context takes as text or as token ids."""
        return min(self.max_body_bytes, max(_MIN_AUXILIARY_BYTES, 8 * self.population.context_length))

    @property
    def sources(self) -> tuple[str, ...]:
        """Where others run engines; empty if the gateway runs its own."""
        if isinstance(self.engine, Supervision):
            return ()
        return (self.engine,) if isinstance(self.engine, str) else self.engine

    @property
    def default_tier(self) -> Tier:
        """Tier of requests that name none."""
        if self.default_tier_name is None:
            return default_tier(self.population)
        return self.population.tier(self.default_tier_name)
