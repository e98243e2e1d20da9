"""Chooses the members of every tier from budgets or cost limits, by held-out loss: one nested path, and each tier's place on it."""

import itertools
from dataclasses import dataclass

import numpy as np

from chorus.population.errors import ChorusError
from chorus.prior.held_out import HeldOut
from chorus.prior.selection import Choice, Limits, best_set, best_set_within, cross_folds, nested_path_within

# M members
DEFAULT_BUDGETS = {"economy": 1, "standard": 2, "premium": 4}
MAX_TIER = "max"
USEFUL_NATS = 5e-4  # further members that gain less held-out loss are not worth their forward passes


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The nested path, and the number of members of each tier on it."""

    path: list[Choice]
    """Sets of 1, 2, ... members."""
    sizes: dict[str, int]
    """Number of members of every tier, by name, from the smallest."""
    num_useful: int
    """Number of members after which the held-out loss falls by at most `USEFUL_NATS` more."""

    @property
    def tiers(self) -> list[Choice]:
        """The set of every tier, from the smallest."""
        return [self.path[size - 1] for size in self.sizes.values()]


def choose(
    held_out: HeldOut,
    *,
    budgets: dict[str, int] | None,
    limited: tuple[str, ...],
    limits: Limits | None,
    max_members: int,
) -> Chosen:
    """Choose the nested path and the tiers on it; see `fit.fit_prior`.

    Raises:
        ChorusError: a budget is outside 1 to the population's size, or a limit is too low.
    """
    num_members = len(held_out.probabilities_MN)
    check_budgets(budgets, num_members)
    max_members = max(max_members, *(budgets or {"": 1}).values())
    folds = cross_folds(held_out.num_fitness, held_out.num_selection)
    path, limited_sizes = nested_path_within(
        held_out.fitted, folds, limits or Limits(costs_M=np.ones(num_members)), max_members
    )
    num_useful = max(useful_members([choice.loss for choice in path]), *limited_sizes, 1)
    sizes = _distinct(limited, limited_sizes) if limited else budgets
    sizes = tier_sizes(sizes, len(path), num_useful)
    if (largest := max(sizes.values())) > len(path):
        raise ChorusError(
            f"a tier has a budget of {largest} members, but only {len(path)} on the nested path fit under the cap for all tiers."
        )
    return Chosen(path=path, sizes=sizes, num_useful=num_useful)


def choose_freely(
    held_out: HeldOut, nested: Choice, reference: tuple[int, ...], *, limits: Limits | None, limit: float | None
) -> Choice:
    """The best set with as many members as `nested`, or within a cost limit, that need not contain the tier below.

    `reference`: another set of this size, to start from.
    """
    folds = cross_folds(held_out.num_fitness, held_out.num_selection)
    if limits is not None and limit is not None:
        return best_set_within(held_out.fitted, folds, limits, limit)
    return best_set(held_out.fitted, folds, len(nested.members), starts=(nested.members, reference))


def check_budgets(budgets: dict[str, int] | None, num_members: int) -> None:
    """Raise ChorusError for budgets that the population cannot meet."""
    for name, size in (budgets or {}).items():
        if not 1 <= size <= num_members:
            raise ChorusError(
                f"tier {name!r} has a budget of {size} members; the population has {num_members}. Give 1 to {num_members}."
            )
        if name == MAX_TIER:
            raise ChorusError(
                f"the tier {MAX_TIER!r} takes no budget: it holds all useful members. Choose another name."
            )
    if budgets is not None and (not budgets or len(set(budgets.values())) < len(budgets)):
        raise ChorusError(
            f"budgets {budgets} are empty or repeat a size: give each tier a different number of members."
        )


def _distinct(names: tuple[str, ...], sizes: list[int]) -> dict[str, int]:
    """Sizes of tiers with a cost limit, by name. Raises ChorusError if a tier has the same members as the one below."""
    for (below, fewer), (name, size) in itertools.pairwise(zip(names, sizes, strict=True)):
        if size == fewer:
            raise ChorusError(
                f"tier {name!r} would have the same {size} members as {below!r}: no other member that fits its limit lowers the "
                "held-out loss. Raise its limit, or leave it out."
            )
    return dict(zip(names, sizes, strict=True))


def tier_sizes(budgets: dict[str, int] | None, num_members: int, num_useful: int) -> dict[str, int]:
    """Number of members of every tier, by name, from the smallest.

    With `budgets`: all of them, and `max` if it is larger. Without: those of `DEFAULT_BUDGETS` that are smaller than `max`, since a
    larger tier would be `max` under another name; and `max`.
    """
    if budgets is not None:
        sizes = dict(sorted(budgets.items(), key=lambda item: item[1]))
        return sizes if max(sizes.values()) >= num_useful else {**sizes, MAX_TIER: num_useful}
    if num_members == 1:
        return {"economy": 1}
    return {name: size for name, size in DEFAULT_BUDGETS.items() if size < num_useful} | {MAX_TIER: num_useful}


def useful_members(losses: list[float]) -> int:
    """The fewest members whose held-out loss is within `USEFUL_NATS` of the path's lowest, but at least two of several.

    With one, every budget would serve the same single model. If the second member does not help, the fit has a warning.
    """
    within = [loss <= min(losses) + USEFUL_NATS for loss in losses]
    return max(within.index(True) + 1, min(2, len(losses)))
