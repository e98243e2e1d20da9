"""Who asks: the rights and limits that go with an API key."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """The holder of an API key. Without keys there is one, who may do everything."""

    name: str
    tiers: frozenset[str] | None = None
    """Tiers that may be asked for; None for all."""
    floor: str | None = None
    """The tier below which a full house does not take its requests."""
    structured_outputs: bool = True
    """Whether answers may be made to follow a schema or a grammar, which costs an engine time to compile."""
    requests_per_s: float | None = None
    tokens_per_min: float | None = None
    share: float = 1.0
    """Its part of a full house, relative to others'."""


ANYONE = Tenant(name="anyone")
