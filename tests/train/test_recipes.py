"""How a budget of epochs is allocated."""

import pytest
from click.testing import CliRunner

from chorus.population.errors import ChorusError
from chorus.train.command import _recipe_options, train
from chorus.train.recipes import RECIPES, Recipe, allocate
from chorus.train.settings import Settings

TABLE = (
    Recipe(from_epochs=1, trajectories=1, epochs_per_cycle=2, burn_in=0, distil_after=1, reason="little"),
    Recipe(from_epochs=20, trajectories=3, epochs_per_cycle=2, burn_in=1, distil_after="saturation", reason="much"),
)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (1, (1, 1, 1, 0, None)),  # not even one cycle of two
        (2, (1, 1, 2, 0, None)),  # one cycle: no teacher
        (19, (1, 9, 2, 0, 1)),
        (20, (3, 3, 2, 0, "saturation")),  # six each: no room for a burn-in
        (21, (3, 3, 2, 1, "saturation")),
        (62, (3, 9, 2, 1, "saturation")),
    ],
)
def test_a_budget_is_allocated_by_the_last_recipe_that_it_reaches(epochs: int, expected: tuple[object, ...]) -> None:
    allocation = allocate(epochs, TABLE)
    assert (
        allocation.trajectories,
        allocation.cycles,
        allocation.epochs_per_cycle,
        allocation.burn_in,
        allocation.distil_after,
    ) == expected
    assert allocation.reason in allocation.describe(epochs)


@pytest.mark.parametrize("epochs", [*range(1, 131), 256, 960])
def test_every_budget_gives_a_run_that_spends_nearly_all_of_it(epochs: int) -> None:
    allocation = allocate(epochs)
    assert 0 < allocation.epochs <= epochs
    assert epochs - allocation.epochs < allocation.trajectories * allocation.epochs_per_cycle
    settings = Settings(corpus="stdlib", **_recipe_options(epochs, set(), distils=True))
    assert settings.trajectories * settings.epochs == allocation.epochs


def test_the_table_rises_and_begins_at_one_epoch() -> None:
    begins = [recipe.from_epochs for recipe in RECIPES]
    assert begins == sorted(set(begins))
    assert begins[0] == 1


def test_the_description_contains_the_allocation_and_its_reason() -> None:
    assert allocate(62, TABLE).describe(62) == (
        "62 epochs, 57 of them used: 3 x 9 cycles of 2, the first with 1 extra; distillation starts when a cycle gains "
        "next to nothing. Why: much."
    )
    assert (
        allocate(4, TABLE).describe(4) == "4 epochs: 1 x 2 cycles of 2; distillation starts after 1 cycle. Why: little."
    )


def test_a_user_may_still_set_when_and_whether_to_distil() -> None:
    assert "distil_after" in _recipe_options(60, set(), distils=True)
    assert "distil_after" not in _recipe_options(60, {"distil_after"}, distils=True)
    assert "distil_after" not in _recipe_options(60, set(), distils=False)
    assert _recipe_options(2, set(), distils=True)["distil_alpha"] == 0.0
    result = CliRunner().invoke(train, ["stdlib", "--epochs", "6", "--burn-in", "1", "--out", "unused"])
    assert isinstance(result.exception, ChorusError)
    assert "already sets --burn-in" in str(result.exception)
