"""How the population is described to clients: the list of models, and the `population` object of each answer."""

from typing import Any

from chorus.population.manifest import Population, Tier
from chorus.serve.gateway.tiers import SEPARATOR


def population_object(population: Population, tier: Tier) -> dict[str, Any]:
    """What an answer says about who gave it."""
    return {
        "tier": tier.name,
        "members": list(tier.members),
        "weights": list(tier.weights),
        "prior_version": population.prior_version,
    }


def model_cards(population: Population, default: Tier) -> dict[str, dict[str, Any]]:
    """OpenAI's model objects by id: the population under its own name, as its default tier, then each tier."""
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
