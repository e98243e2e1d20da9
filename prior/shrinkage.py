"""Chooses how far to shrink weights towards uniform: the strength of a Dirichlet prior, by cross-validation over documents.

Weights that minimise the loss on a small text overfit it. `weights.fit_weights` takes the strength in pseudo-tokens. Arrays in, a
strength out.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chorus.population.errors import ChorusError
from chorus.prior.weights import Probabilities, check_probabilities, mixture_losses, solve

# M members, N tokens, D documents
STRENGTHS = (0.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
NUM_FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Shrinkage:
    """The chosen strength, and the cross-validated loss of every strength."""

    pseudo_tokens: float
    losses: dict[float, float]
    """Loss by strength, on documents that the weights were not fitted on, nats per token."""


def choose_shrinkage(
    probabilities_MN: Probabilities,
    offsets: NDArray[np.int64],
    *,
    strengths: tuple[float, ...] = STRENGTHS,
    num_folds: int = NUM_FOLDS,
) -> Shrinkage:
    """The strength with the lowest cross-validated loss; on a tie, the weaker one.

    `offsets` (D + 1): document d has the tokens offsets[d] : offsets[d + 1]. There are at most as many folds as documents.

    Raises:
        ChorusError: fewer than two documents have tokens, or the matrix cannot be fitted.
    """
    check_probabilities(probabilities_MN)
    fold_N = document_folds(offsets, num_folds)
    sums = dict.fromkeys(strengths, 0.0)
    for fold in range(int(fold_N.max()) + 1):
        is_fitted_N = fold_N != fold
        fitted_MN, held_out_MN = probabilities_MN[:, is_fitted_N], probabilities_MN[:, ~is_fitted_N]
        share = fitted_MN.shape[1] / len(fold_N)  # keeps the strength constant relative to the amount of text fitted on
        weights_M = None
        for strength in strengths:
            weights_M = solve(fitted_MN, pseudo_tokens=strength * share, start_M=weights_M).weights_M
            sums[strength] += float(mixture_losses(held_out_MN, weights_M).sum())
    losses = {strength: total / len(fold_N) for strength, total in sums.items()}
    return Shrinkage(pseudo_tokens=min(losses, key=lambda strength: (losses[strength], strength)), losses=losses)


def document_folds(offsets: NDArray[np.int64], num_folds: int) -> NDArray[np.int64]:
    """The fold of each token (N). Whole documents, longest first, each go to the fold with the fewest tokens."""
    tokens_D = np.diff(offsets)
    num_folds = min(num_folds, int((tokens_D > 0).sum()))
    if num_folds < 2:
        raise ChorusError(
            "the text has fewer than two documents with scored tokens: cross-validation needs 2. Give more text."
        )
    tokens_in_fold = np.zeros(num_folds, dtype=np.int64)
    fold_D = np.zeros(len(tokens_D), dtype=np.int64)
    for document in np.argsort(-tokens_D, kind="stable"):
        fold_D[document] = tokens_in_fold.argmin()
        tokens_in_fold[fold_D[document]] += tokens_D[document]
    return np.repeat(fold_D, tokens_D)
