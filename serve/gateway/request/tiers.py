"""Choose a request's tier from its model name, its budget, both or neither."""

from dataclasses import dataclass

from chorus.population.manifest import Population, Tier
from chorus.serve.gateway.request.errors import ApiError, bad_request

SEPARATOR = ":"
"""Separates population and tier in a model name: `my-population:premium`. Neither name can contain it."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The tier that will serve a request, and what the client requested."""

    tier: Tier
    requested: str
    """The requested tier's name, or `default`: a bounded set, fit for a metric's label."""
    model: str
    """The model name to echo in the answer."""


def default_tier(population: Population) -> Tier:
    """The tier with the most members; of several, the most expensive."""
    return max(reversed(population.tiers), key=lambda tier: tier.budget)


def model_names(population: Population) -> list[str]:
    """Every name that a request may give as `model`: the population's, and one for each tier."""
    return [population.name, *(f"{population.name}{SEPARATOR}{tier.name}" for tier in population.tiers)]


def choose(population: Population, default: Tier, *, model: str | None, budget: str | int | None) -> Choice:
    """The tier for a request that gives `model` (absent or empty: the population) and `budget` (absent: the default tier).

    Raises:
        ApiError: 404 for a model or tier that does not exist; 400 for a budget that no tier fits, or that contradicts
            the model name.
    """
    by_model = _tier_of_model(population, model)
    by_budget = _tier_of_budget(population, budget)
    if by_model and by_budget and by_model != by_budget:
        raise bad_request(
            f"model {model!r} means tier {by_model.name!r}, but budget {budget!r} means tier {by_budget.name!r}. "
            f"Send only one of them, or model {population.name!r} with the budget.",
            code="contradictory_budget",
            param="budget",
        )
    tier = by_model or by_budget
    return Choice(
        tier=tier or default,
        requested=tier.name if tier else "default",
        model=model or population.name,
    )


def tiers_between(population: Population, floor: Tier, requested: Tier) -> list[Tier]:
    """Tiers that may serve a request for tier `requested`, from that tier down to `floor`.

    Each tier's members are among those of the one before, so that a running request can move down.
    """
    found = [requested]
    for tier in sorted(population.tiers, key=lambda tier: -tier.budget):
        is_between = floor.budget <= tier.budget < found[-1].budget
        if is_between and set(tier.members) < set(found[-1].members) and set(floor.members) <= set(tier.members):
            found.append(tier)
    return found


def at_least(population: Population, budget: str | int) -> Tier:
    """The smallest tier that satisfies a `min_budget`: the tier of that name, or one with at least that number of members.

    Raises:
        ApiError: 404 for a tier that does not exist; 400 for a number below 1 or above that of the largest tier.
    """
    if isinstance(budget, str):
        return _tier_of_name(population, budget, "min_budget")
    fitting = [tier for tier in population.tiers if tier.budget >= budget]
    if budget < 1 or not fitting:
        largest = max(tier.budget for tier in population.tiers)
        raise bad_request(
            f"min_budget {budget} is out of range: the largest tier has {largest} members. "
            f"Send a number from 1 to {largest} or a tier's name.",
            code="budget_out_of_range",
            param="min_budget",
        )
    return min(fitting, key=lambda tier: tier.budget)


def _tier_of_model(population: Population, model: str | None) -> Tier | None:
    if not model or model == population.name:
        return None
    name, _, tier_name = model.partition(SEPARATOR)
    for tier in population.tiers:
        if name == population.name and tier.name == tier_name:
            return tier
    raise ApiError(
        404,
        f"model {model!r} does not exist; choose from {', '.join(model_names(population))}.",
        code="model_not_found",
        param="model",
    )


def _tier_of_budget(population: Population, budget: str | int | None) -> Tier | None:
    match budget:
        case None:
            return None
        case str():
            return _tier_of_name(population, budget, "budget")
        case int():
            return _largest_tier_within(population, budget)


def _tier_of_name(population: Population, name: str, param: str) -> Tier:
    for tier in population.tiers:
        if tier.name == name:
            return tier
    hint = " Send a number of members without quotes." if name.isdigit() else ""
    raise ApiError(
        404,
        f"tier {name!r} does not exist; choose from {', '.join(tier.name for tier in population.tiers)}.{hint}",
        code="tier_not_found",
        param=param,
    )


def _largest_tier_within(population: Population, budget: int) -> Tier:
    num_members = len(population.members)
    if not 1 <= budget <= num_members:
        raise bad_request(
            f"budget {budget} is out of range: {population.name!r} has {num_members} members. "
            f"Send a number from 1 to {num_members} or a tier's name.",
            code="budget_out_of_range",
            param="budget",
        )
    fitting = [tier for tier in population.tiers if tier.budget <= budget]
    if not fitting:
        smallest = min(population.tiers, key=lambda tier: tier.budget)
        raise bad_request(
            f"no tier fits budget {budget}: the smallest, {smallest.name!r}, runs {smallest.budget} members; raise the budget.",
            code="budget_out_of_range",
            param="budget",
        )
    return max(reversed(fitting), key=lambda tier: tier.budget)
