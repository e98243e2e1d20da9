"""Recipes: what to do with a budget of epochs, and why. The table is data; `bench/recipes.py` measures what it rests on.

Epochs are passes over the train split summed over all trajectories: what the population costs, however it is dealt.
"""

from dataclasses import dataclass
from typing import Literal

from chorus.population.errors import ChorusError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to deal out a budget of at least `from_epochs`."""

    from_epochs: int
    trajectories: int
    epochs_per_cycle: int
    burn_in: int
    """Epochs of the first cycle beyond those of the others."""
    distil_after: int | Literal["saturation"]
    reason: str


# Losses: nats per token of the mixture of at most six members on held-out text, members of 0.4M parameters, 24,000 train tokens.
# A burn-in of 4 epochs was worse at every budget, so no row has one; cycles of 4 epochs were as good as those of 2 from 36 on. A
# teacher at saturation was better at 6 epochs (4.536 and 4.558 nats), equal up to 24 and worse from 36 on (at 60: 4.352 and 4.329).
RECIPES = (
    Recipe(
        from_epochs=1, trajectories=1, epochs_per_cycle=2, burn_in=0, distil_after="saturation",
        reason="more trajectories would all stay untrained (12 epochs in 1, 2 and 3 of them: 4.45, 4.49 and 4.60 nats)",
    ),
    Recipe(
        from_epochs=24, trajectories=2, epochs_per_cycle=2, burn_in=0, distil_after=1,
        reason="two trajectories are as good as one (24 epochs: 4.39 and 4.39 nats) and train side by side",
    ),
    Recipe(
        from_epochs=48, trajectories=3, epochs_per_cycle=2, burn_in=0, distil_after=1,
        reason="three trajectories, each saturated, are as good as a long one (60 epochs: 4.329 and 4.343 nats; on two other "
        "seeds 4.188 and 4.184), differ more, and train side by side",
    ),
    Recipe(
        from_epochs=480, trajectories=5, epochs_per_cycle=2, burn_in=0, distil_after=8,
        reason="as q0's record run, 5 trajectories of 96 cycles in 960 epochs; not measured here",
    ),
)  # fmt: skip
"""By rising budget; the last row that a budget reaches counts. `bench/recipes.py` measures, bench/LOG.md has all of it."""


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """A budget dealt out."""

    trajectories: int
    cycles: int
    epochs_per_cycle: int
    burn_in: int
    distil_after: int | Literal["saturation"] | None
    reason: str

    @property
    def epochs(self) -> int:
        """What it uses of the budget: at most all of it."""
        return self.trajectories * (self.burn_in + self.cycles * self.epochs_per_cycle)

    def sentence(self, budget: int) -> str:
        """What a user is told."""
        used = "" if self.epochs == budget else f", {self.epochs} of them used"
        first = f", the first with {self.burn_in} epochs more" if self.burn_in else ""
        after = {None: "never", "saturation": "when a cycle gains next to nothing"}.get(
            self.distil_after,  # type: ignore[arg-type]
            f"after {self.distil_after} cycle{'s' * (self.distil_after != 1)}",
        )
        return (
            f"{budget} epochs{used}: {self.trajectories} x {self.cycles} cycles of {self.epochs_per_cycle}{first}; "
            f"the teacher speaks {after}. Why: {self.reason}."
        )


def deal(epochs: int, recipes: tuple[Recipe, ...] = RECIPES) -> Dealt:
    """The recipe of a budget, its cycles counted out.

    Raises:
        ChorusError: the budget is less than one epoch.
    """
    if epochs < 1:
        raise ChorusError(f"--epochs is {epochs}; 1 or more passes over the train split are expected.")
    recipe = max((row for row in recipes if row.from_epochs <= epochs), key=lambda row: row.from_epochs)
    own = epochs // recipe.trajectories
    per_cycle = min(recipe.epochs_per_cycle, own)
    burn_in = recipe.burn_in if own >= recipe.burn_in + 3 * per_cycle else 0
    cycles = (own - burn_in) // per_cycle
    enough = cycles > (2 if recipe.distil_after == "saturation" else recipe.distil_after)
    return Dealt(
        trajectories=recipe.trajectories, cycles=cycles, epochs_per_cycle=per_cycle, burn_in=burn_in,
        distil_after=recipe.distil_after if enough else None, reason=recipe.reason,
    )  # fmt: skip
