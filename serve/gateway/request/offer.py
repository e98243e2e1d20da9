"""The tiers on offer now, as in the manifest, and the JSON that describes them in answers."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from chorus.population.live import LiveManifest
from chorus.population.manifest import Population, Tier
from chorus.serve.gateway.request.errors import ApiError
from chorus.serve.gateway.request.keys import Tenant
from chorus.serve.gateway.request.tiers import SEPARATOR, default_tier

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The tiers of one prior. A request's tier is chosen from, and described by, a single offer."""

    population: Population
    """Has at least one tier."""
    default_tier: Tier
    cards: dict[str, dict[str, Any]]
    """OpenAI's model objects by id."""
    population_json: dict[str, bytes]
    """An answer's `population` object as JSON, by tier name."""

    restricted_offers: dict[tuple[str, ...], Self] = field(default_factory=dict)
    """Cache of `restricted`: offers of some of these tiers, by their names."""

    def restricted(self, names: tuple[str, ...]) -> Self:
        """The same population with only the named tiers, at least one of which must exist."""
        if names not in self.restricted_offers:
            tiers = tuple(tier for tier in self.population.tiers if tier.name in names)
            population = self.population.model_copy(update={"tiers": tiers})
            default = self.default_tier.name if self.default_tier in tiers else None
            self.restricted_offers[names] = self.of(population, default)
        return self.restricted_offers[names]

    @classmethod
    def of(cls, population: Population, default_tier_name: str | None) -> Self:
        """The offer of a population, with uniform tiers if it has none.

        The default is the named tier if it exists, else the largest.
        """
        population = population if population.tiers else population.with_uniform_tiers()
        default = default_tier(population)
        if default_tier_name is not None:
            named = [tier for tier in population.tiers if tier.name == default_tier_name]
            if not named:
                logger.warning(
                    "the default tier %s no longer exists; using %s instead", default_tier_name, default.name
                )
            default = named[0] if named else default
        return cls(
            population=population,
            default_tier=default,
            cards=model_cards(population, default),
            population_json={
                tier.name: json.dumps(population_object(population, tier), separators=(",", ":")).encode()
                for tier in population.tiers
            },
        )


class LiveOffer:
    """The current offer, rebuilt when the manifest gets a new prior or the engines' context length changes."""

    def __init__(
        self,
        population: Population,
        default_tier_name: str | None,
        manifest: LiveManifest | None,
        context_length: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`context_length` returns what engines report, or None to use the population's."""
        self._default_tier_name = default_tier_name
        self._manifest = manifest
        self._context_length = context_length
        self._initial_population = population
        self._built_from: tuple[Population, int | None] | None = None
        self._offer: Offer

    @property
    def population(self) -> Population:
        """The population as in its manifest."""
        return self._initial_population if self._manifest is None else self._manifest.current()

    def current(self) -> Offer:
        """The offer now. If nothing changed, this costs one check of the manifest's date."""
        population, length = self.population, self._context_length()
        known = self._built_from
        if known is None or population is not known[0] or length != known[1]:
            self._built_from = population, length
            shown = population if length is None else population.model_copy(update={"context_length": length})
            self._offer = Offer.of(shown, self._default_tier_name)
        return self._offer


def offer_to(tenant: Tenant, offer: Offer) -> Offer:
    """The offer with only the tiers that the tenant may use.

    Raises:
        ApiError: 403 if none is left.
    """
    if tenant.tiers is None:
        return offer
    names = tuple(tier.name for tier in offer.population.tiers if tier.name in tenant.tiers)
    if not names:
        raise ApiError(
            403,
            "this API key may use none of the current tiers; ask the operator to allow one.",
            code="tier_not_allowed",
        )
    return offer.restricted(names)


def population_object(population: Population, tier: Tier) -> dict[str, Any]:
    """The `population` object of an answer that `tier` gave."""
    return {
        "tier": tier.name,
        "members": list(tier.members),
        "weights": list(tier.weights),
        "prior_version": population.prior_version,
    }


def model_cards(population: Population, default: Tier) -> dict[str, dict[str, Any]]:
    """OpenAI's model objects by id: the population's name, which stands for its default tier, then each tier."""
    tiers = {population.name: default}
    tiers |= {f"{population.name}{SEPARATOR}{tier.name}": tier for tier in population.tiers}
    return {model: _card(model, population, tier) for model, tier in tiers.items()}


def _card(model: str, population: Population, tier: Tier) -> dict[str, Any]:
    return {
        "id": model,
        "object": "model",
        "created": int(population.provenance.created_at.timestamp()),
        "owned_by": "chorus",
        "root": population.name,
        "parent": None if model == population.name else population.name,
        "max_model_len": population.context_length,
        "population": {
            **population_object(population, tier),
            "budget": tier.budget,
            "pool": tier.pool,
            "temperature": tier.temperature,
            "decoding": tier.decoding,
            "relative_cost": tier.relative_cost,
            "test_loss": None if tier.test_loss is None else tier.test_loss.model_dump(),
        },
    }
