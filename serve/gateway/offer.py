"""What is on offer now: the population's tiers as the manifest has them, in the forms in which answers speak of them."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from chorus.population.live import LiveManifest
from chorus.population.manifest import Population, Tier
from chorus.serve.gateway import cards
from chorus.serve.gateway.tiers import default_tier

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The tiers of one prior. A request is chosen for, and answered in the words of, one offer."""

    population: Population
    """With at least one tier."""
    default_tier: Tier
    cards: dict[str, dict[str, Any]]
    """OpenAI's model objects by id."""
    population_json: dict[str, bytes]
    """What an answer's `population` object says about its tier, by tier."""

    parts: dict[tuple[str, ...], Self] = field(default_factory=dict)
    """Offers of some of these tiers, by their names, as they were asked for."""

    def restricted(self, names: tuple[str, ...]) -> Self:
        """The same population with only these of its tiers; at least one."""
        if names not in self.parts:
            tiers = tuple(tier for tier in self.population.tiers if tier.name in names)
            population = self.population.model_copy(update={"tiers": tiers})
            default = self.default_tier.name if self.default_tier in tiers else None
            self.parts[names] = self.of(population, default)
        return self.parts[names]

    @classmethod
    def of(cls, population: Population, default_tier_name: str | None) -> Self:
        """The offer of a population; under uniform tiers if it has none. The largest tier is the default without a name."""
        population = population if population.tiers else population.with_uniform_tiers()
        default = default_tier(population)
        if default_tier_name is not None:
            named = [tier for tier in population.tiers if tier.name == default_tier_name]
            if not named:
                logger.warning("tier %s is gone; requests that ask for none get %s", default_tier_name, default.name)
            default = named[0] if named else default
        return cls(
            population=population,
            default_tier=default,
            cards=cards.model_cards(population, default),
            population_json={
                tier.name: json.dumps(cards.population_object(population, tier), separators=(",", ":")).encode()
                for tier in population.tiers
            },
        )


class LiveOffer:
    """The offer now: made anew when a prior fitted again appears in the manifest, or engines take another length of context."""

    def __init__(
        self,
        population: Population,
        default_tier_name: str | None,
        manifest: LiveManifest | None,
        context_length: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`context_length` is what engines take, where they say so; else it is the population's."""
        self._default_tier_name = default_tier_name
        self._manifest = manifest
        self._context_length = context_length
        self._given = population
        self._made_of: tuple[Population, int | None] | None = None
        self._offer: Offer

    @property
    def population(self) -> Population:
        """The population as its manifest has it."""
        return self._given if self._manifest is None else self._manifest.current()

    def current(self) -> Offer:
        """Costs one look at the manifest's date while nothing changed."""
        population, length = self.population, self._context_length()
        known = self._made_of
        if known is None or population is not known[0] or length != known[1]:
            self._made_of = population, length
            shown = population if length is None else population.model_copy(update={"context_length": length})
            self._offer = Offer.of(shown, self._default_tier_name)
        return self._offer
