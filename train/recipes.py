"""Recipes: how to allocate a budget of epochs, and why. `bench/recipes.py` measures the alternatives behind the table.

Epochs are passes over the train split, summed over all trajectories: the cost of the population under any allocation.
"""

from dataclasses import dataclass
from typing import Literal

from chorus.population.errors import ChorusError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to allocate a budget of at least `from_epochs`."""

    from_epochs: int
    trajectories: int
    epochs_per_cycle: int
    burn_in: int
    """Extra epochs of the first cycle."""
    distil_after: int | Literal["saturation"]
    reason: str


# Losses: nats per token of the mixture of at most six members on held-out text, members of 0.4M parameters, 24,000 train tokens.
# A burn-in of 4 epochs was worse at every budget, so no row has one. Cycles of 4 epochs were as good as those of 2 from a budget of
# 36 on. A teacher at saturation was better at 6 epochs (4.536 against 4.558 nats), equal up to 24 and worse from 36 on (at 60:
# 4.352 against 4.329).
RECIPES = (
    Recipe(
        from_epochs=1, trajectories=1, epochs_per_cycle=2, burn_in=0, distil_after="saturation",
        reason="with more trajectories, all would stay undertrained (12 epochs in 1, 2 and 3 of them: 4.45, 4.49 and 4.60 nats)",
    ),
    Recipe(
        from_epochs=24, trajectories=2, epochs_per_cycle=2, burn_in=0, distil_after=1,
        reason="two trajectories are as good as one (24 epochs: 4.39 and 4.39 nats) and train in parallel",
    ),
    Recipe(
        from_epochs=48, trajectories=3, epochs_per_cycle=2, burn_in=0, distil_after=1,
        reason="three trajectories, each saturated, are as good as a long one (60 epochs: 4.329 and 4.343 nats; on two other "
        "seeds 4.188 and 4.184), differ more, and train in parallel",
    ),
    Recipe(
        from_epochs=480, trajectories=5, epochs_per_cycle=2, burn_in=0, distil_after=8,
        reason="like q0's record run, 5 trajectories of 96 cycles in 960 epochs; not measured here",
    ),
)  # fmt: skip
"""In order of rising budget; the last row that a budget reaches applies. bench/LOG.md has all measurements."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The settings that a budget allocates."""

    trajectories: int
    cycles: int
    epochs_per_cycle: int
    burn_in: int
    distil_after: int | Literal["saturation"] | None
    reason: str

    @property
    def epochs(self) -> int:
        """Epochs used, at most the budget."""
        return self.trajectories * (self.burn_in + self.cycles * self.epochs_per_cycle)

    def describe(self, budget: int) -> str:
        """The allocation and its reason, as one sentence for the user."""
        used = "" if self.epochs == budget else f", {self.epochs} of them used"
        first = f", the first with {self.burn_in} extra" if self.burn_in else ""
        if self.distil_after is None:
            distillation = "no distillation"
        elif self.distil_after == "saturation":
            distillation = "distillation starts when a cycle gains next to nothing"
        else:
            distillation = f"distillation starts after {self.distil_after} cycle{'s' * (self.distil_after != 1)}"
        return (
            f"{budget} epochs{used}: {self.trajectories} x {self.cycles} cycles of {self.epochs_per_cycle}{first}; "
            f"{distillation}. Why: {self.reason}."
        )


def allocate(epochs: int, recipes: tuple[Recipe, ...] = RECIPES) -> Allocation:
    """Apply the recipe of a budget, with as many cycles as fit.

    Raises:
        ChorusError: the budget is less than one epoch.
    """
    if epochs < 1:
        raise ChorusError(f"--epochs is {epochs}; expected at least 1 pass over the train split.")
    recipe = max((row for row in recipes if row.from_epochs <= epochs), key=lambda row: row.from_epochs)
    per_trajectory = epochs // recipe.trajectories
    per_cycle = min(recipe.epochs_per_cycle, per_trajectory)
    burn_in = recipe.burn_in if per_trajectory >= recipe.burn_in + 3 * per_cycle else 0
    cycles = (per_trajectory - burn_in) // per_cycle
    can_distil = cycles > (2 if recipe.distil_after == "saturation" else recipe.distil_after)
    return Allocation(
        trajectories=recipe.trajectories, cycles=cycles, epochs_per_cycle=per_cycle, burn_in=burn_in,
        distil_after=recipe.distil_after if can_distil else None, reason=recipe.reason,
    )  # fmt: skip
