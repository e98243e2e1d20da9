"""How far to draw weights towards uniform: a Dirichlet prior whose strength is chosen by cross-validation over documents.

Weights that minimise the loss on little text fit its accidents. `weights.fit_weights` takes the strength as pseudo-tokens; here
each strength is fitted without one part of the documents and counted on that part. Arrays in, a strength out.
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
    """The strength chosen, and what every strength cost."""

    pseudo_tokens: float
    losses: dict[float, float]
    """Strength: loss on documents that did not fit the weights, nats per token."""


def choose_shrinkage(
    probabilities_MN: Probabilities,
    offsets: NDArray[np.int64],
    *,
    strengths: tuple[float, ...] = STRENGTHS,
    num_folds: int = NUM_FOLDS,
) -> Shrinkage:
    """The strength with the lowest cross-validated loss; the weaker of equals.

    `offsets` (D + 1): document d has the tokens offsets[d] : offsets[d + 1]. There are at most as many folds as documents.

    Raises:
        ChorusError: fewer than two documents have tokens, or the matrix cannot be fitted.
    """
    check_probabilities(probabilities_MN)
    fold_N = document_folds(offsets, num_folds)
    sums = dict.fromkeys(strengths, 0.0)
    for fold in range(int(fold_N.max()) + 1):
        inside = fold_N != fold
        fitted_MN, counted_MN = probabilities_MN[:, inside], probabilities_MN[:, ~inside]
        share = fitted_MN.shape[1] / len(fold_N)  # the strength that counts is that relative to the text fitted on
        weights_M = None
        for strength in strengths:
            weights_M = solve(fitted_MN, pseudo_tokens=strength * share, start_M=weights_M).weights_M
            sums[strength] += float(mixture_losses(counted_MN, weights_M).sum())
    losses = {strength: total / len(fold_N) for strength, total in sums.items()}
    return Shrinkage(pseudo_tokens=min(losses, key=lambda strength: (losses[strength], strength)), losses=losses)


def document_folds(offsets: NDArray[np.int64], num_folds: int) -> NDArray[np.int64]:
    """For each token (N) the fold of its document; whole documents, the longest first, each to the fold with the fewest tokens."""
    tokens_D = np.diff(offsets)
    num_folds = min(num_folds, int((tokens_D > 0).sum()))
    if num_folds < 2:
        raise ChorusError(
            "the text has fewer than two documents with scored tokens: cross-validation needs 2. Give more text."
        )
    filled = np.zeros(num_folds, dtype=np.int64)
    fold_D = np.zeros(len(tokens_D), dtype=np.int64)
    for document in np.argsort(-tokens_D, kind="stable"):
        fold_D[document] = filled.argmin()
        filled[fold_D[document]] += tokens_D[document]
    return np.repeat(fold_D, tokens_D)
