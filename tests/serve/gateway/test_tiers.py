"""Which tier a request gets."""

import pytest

from chorus.population.manifest import Population
from chorus.serve.expected_loss import expected_loss
from chorus.serve.gateway.request.errors import ApiError
from chorus.serve.gateway.request.tiers import choose, default_tier, model_names


def pick(population: Population, model: str | None = None, budget: str | int | None = None) -> tuple[str, str, str]:
    choice = choose(population, default_tier(population), model=model, budget=budget)
    return choice.tier.name, choice.requested, choice.model


@pytest.mark.parametrize(
    ("model", "budget", "expected"),
    [
        (None, None, ("max", "default", "tiny")),
        ("", None, ("max", "default", "tiny")),
        ("tiny", None, ("max", "default", "tiny")),
        ("tiny:economy", None, ("economy", "economy", "tiny:economy")),
        (None, "standard", ("standard", "standard", "tiny")),
        (None, 1, ("economy", "economy", "tiny")),
        (None, 2, ("standard", "standard", "tiny")),
        (None, 3, ("standard", "standard", "tiny")),
        (None, 4, ("max", "max", "tiny")),
        ("tiny:standard", "standard", ("standard", "standard", "tiny:standard")),
        ("tiny:standard", 3, ("standard", "standard", "tiny:standard")),
        ("tiny", "economy", ("economy", "economy", "tiny")),
    ],
)
def test_the_tier_asked_for_is_chosen(
    tiny: Population, model: str | None, budget: str | int | None, expected: tuple[str, str, str]
) -> None:
    assert pick(tiny, model, budget) == expected


@pytest.mark.parametrize(
    ("model", "budget", "status", "code", "says"),
    [
        ("other", None, 404, "model_not_found", "tiny, tiny:economy, tiny:standard, tiny:max"),
        ("tiny:gold", None, 404, "model_not_found", "tiny:standard"),
        ("other:max", None, 404, "model_not_found", "tiny:max"),
        ("tiny:", None, 404, "model_not_found", "tiny:max"),
        (None, "gold", 404, "tier_not_found", "economy, standard, max"),
        (None, "4", 404, "tier_not_found", "without quotes"),
        (None, 0, 400, "budget_out_of_range", "4 members"),
        (None, -1, 400, "budget_out_of_range", "4 members"),
        (None, 5, 400, "budget_out_of_range", "from 1 to 4"),
        ("tiny:economy", "max", 400, "contradictory_budget", "'economy'"),
        ("tiny:economy", 4, 400, "contradictory_budget", "'max'"),
    ],
)
def test_unknown_models_and_budgets_are_refused_with_the_alternatives(
    tiny: Population, model: str | None, budget: str | int | None, status: int, code: str, says: str
) -> None:
    with pytest.raises(ApiError) as error:
        pick(tiny, model, budget)
    assert (error.value.status, error.value.code) == (status, code)
    assert says in error.value.message


def test_a_budget_below_the_smallest_tier_is_refused(tiny: Population) -> None:
    without_economy = tiny.model_copy(update={"tiers": tiny.tiers[1:]})
    with pytest.raises(ApiError, match="'standard', runs 2 members"):
        pick(without_economy, budget=1)


def test_the_more_expensive_of_two_equally_large_tiers_is_chosen(tiny: Population) -> None:
    dearer = tiny.tiers[1].model_copy(update={"name": "dearer"})
    population = tiny.model_copy(update={"tiers": (*tiny.tiers[:2], dearer)})
    assert pick(population, budget=2)[0] == "dearer"
    assert default_tier(population).name == "dearer"


def test_every_name_that_is_listed_can_be_asked_for(tiny: Population) -> None:
    assert [pick(tiny, name)[0] for name in model_names(tiny)] == ["max", "economy", "standard", "max"]


def test_the_loss_between_two_tiers_lies_on_the_line_between_them() -> None:
    assert [expected_loss(size, {2: 4.0, 4: 3.0}) for size in (1, 2, 3, 4, 9)] == [4.0, 4.0, 3.5, 3.0, 3.0]
