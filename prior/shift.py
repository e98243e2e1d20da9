"""Evaluates tiers on other text than they were fitted on, and what fitting again would gain there. Arrays in, losses out.

The documents are split into two halves. Weights and members are fitted on one half and evaluated on the other, both ways, so the
gains are those to expect on new text of the same kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chorus.population.errors import ChorusError
from chorus.prior.bootstrap import Bootstrap, Interval
from chorus.prior.quadratic import FloatArray
from chorus.prior.selection import nested_path, same_tokens
from chorus.prior.weights import Probabilities, check_probabilities, mixture_losses, solve

# M members, N tokens, K members of a tier


@dataclass(frozen=True, kw_only=True)
class WeightedTier:
    """A tier of the manifest."""

    name: str
    members: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TierShift:
    """A tier on other text. The changes in loss are negative for a gain."""

    name: str
    loss: Interval
    """Loss with the weights of the manifest."""
    new_weights: Interval
    """Change if the same members had weights fitted on this kind of text."""
    new_members: Interval
    """Change if the same number of members and their weights were fitted on this kind of text."""
    to_best_single: Interval
    """The tier's loss minus that of the single member that is best on this text, picked with hindsight."""


def evaluate_shift(
    probabilities_MN: Probabilities, offsets: NDArray[np.int64], tiers: Sequence[WeightedTier]
) -> list[TierShift]:
    """Evaluate every tier on text of whole documents, with `offsets` (D + 1) as for `Bootstrap`.

    Raises:
        ChorusError: fewer than two documents have scored tokens, or the matrix cannot be fitted.
    """
    check_probabilities(probabilities_MN)
    bootstrap = Bootstrap(offsets)
    halves = _halves(offsets)
    max_members = max(len(tier.members) for tier in tiers)
    paths = [nested_path(probabilities_MN[:, fit], same_tokens(fit.stop - fit.start), max_members) for fit, _ in halves]
    means_M = [float(mixture_losses(row[None], np.ones(1)).mean()) for row in probabilities_MN]
    best_N = mixture_losses(probabilities_MN[int(np.argmin(means_M))][None], np.ones(1))

    shifts = []
    for tier in tiers:
        current_N = mixture_losses(probabilities_MN[list(tier.members)], np.asarray(tier.weights))
        new_members = [path[len(tier.members) - 1].members for path in paths]
        new_weights_N = _cross_fitted(probabilities_MN, halves, [tier.members] * 2)
        new_members_N = _cross_fitted(probabilities_MN, halves, new_members)
        shifts.append(
            TierShift(
                name=tier.name,
                loss=bootstrap.loss(current_N),
                new_weights=bootstrap.difference(new_weights_N, current_N),
                new_members=bootstrap.difference(new_members_N, current_N),
                to_best_single=bootstrap.difference(current_N, best_N),
            )
        )
    return shifts


def _cross_fitted(
    probabilities_MN: Probabilities, halves: list[tuple[slice, slice]], members: Sequence[tuple[int, ...]]
) -> FloatArray:
    """Losses of all tokens, each half with the members chosen and the weights fitted on the other half."""
    losses_N = np.empty(probabilities_MN.shape[1])
    for (fit, score), chosen in zip(halves, members, strict=True):
        rows_KN = probabilities_MN[list(chosen)]
        losses_N[score] = mixture_losses(rows_KN[:, score], solve(rows_KN[:, fit]).weights_M)
    return losses_N


def _halves(offsets: NDArray[np.int64]) -> list[tuple[slice, slice]]:
    """(fit, score) both ways, split at the document boundary nearest to half of the scored tokens."""
    inner = offsets[(offsets > 0) & (offsets < offsets[-1])]
    if not len(inner):
        raise ChorusError("the text has only one document with scored tokens; at least 2 are needed. Give more text.")
    cut = int(inner[np.abs(inner - offsets[-1] / 2).argmin()])
    first, second = slice(0, cut), slice(cut, int(offsets[-1]))
    return [(first, second), (second, first)]
