"""What a prior is worth on other text than it was fitted on, and what fitting again would gain there.

Arrays in, losses out. The documents are cut into two halves. Whatever is fitted on one half is counted on the other, both ways, so
that a gain shown here is one that new text of the same kind can expect.
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
class Offer:
    """A tier as it stands in the manifest."""

    name: str
    members: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TierShift:
    """A tier on other text. The differences are what would change: below zero is a gain."""

    name: str
    loss: Interval
    """With the weights of the manifest."""
    new_weights: Interval
    """If the same members got weights fitted on this kind of text."""
    new_members: Interval
    """If as many members were chosen and weighed anew on this kind of text."""
    to_best_single: Interval
    """The tier's loss minus that of the single member which is best here, picked with hindsight."""


def evaluate_shift(
    probabilities_MN: Probabilities, offsets: NDArray[np.int64], offers: Sequence[Offer]
) -> list[TierShift]:
    """Every offer on text of whole documents, `offsets` (D + 1) as for `Bootstrap`.

    Raises:
        ChorusError: fewer than two documents have scored tokens, or the matrix cannot be fitted.
    """
    check_probabilities(probabilities_MN)
    bootstrap = Bootstrap(offsets)
    halves = _halves(offsets)
    longest = max(len(offer.members) for offer in offers)
    paths = [nested_path(probabilities_MN[:, fit], same_tokens(fit.stop - fit.start), longest) for fit, _ in halves]
    means_M = [float(mixture_losses(row[None], np.ones(1)).mean()) for row in probabilities_MN]
    best_N = mixture_losses(probabilities_MN[int(np.argmin(means_M))][None], np.ones(1))

    found = []
    for offer in offers:
        own_N = mixture_losses(probabilities_MN[list(offer.members)], np.asarray(offer.weights))
        anew = [path[len(offer.members) - 1].members for path in paths]
        weighed_N = _fitted_elsewhere(probabilities_MN, halves, [offer.members] * 2)
        chosen_N = _fitted_elsewhere(probabilities_MN, halves, anew)
        found.append(
            TierShift(
                name=offer.name,
                loss=bootstrap.loss(own_N),
                new_weights=bootstrap.difference(weighed_N, own_N),
                new_members=bootstrap.difference(chosen_N, own_N),
                to_best_single=bootstrap.difference(own_N, best_N),
            )
        )
    return found


def _fitted_elsewhere(
    probabilities_MN: Probabilities, halves: list[tuple[slice, slice]], members: Sequence[tuple[int, ...]]
) -> FloatArray:
    """Losses of all tokens, each half's under the weights that the other half gave to the members chosen there."""
    losses_N = np.empty(probabilities_MN.shape[1])
    for (fit, score), chosen in zip(halves, members, strict=True):
        rows_KN = probabilities_MN[list(chosen)]
        losses_N[score] = mixture_losses(rows_KN[:, score], solve(rows_KN[:, fit]).weights_M)
    return losses_N


def _halves(offsets: NDArray[np.int64]) -> list[tuple[slice, slice]]:
    """(fit, score) twice: the documents cut where the scored tokens are most nearly halved."""
    inner = offsets[(offsets > 0) & (offsets < offsets[-1])]
    if not len(inner):
        raise ChorusError("the text has one document with scored tokens: at least 2 are needed. Give more text.")
    cut = int(inner[np.abs(inner - offsets[-1] / 2).argmin()])
    first, second = slice(0, cut), slice(cut, int(offsets[-1]))
    return [(first, second), (second, first)]
