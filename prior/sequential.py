"""Weights that adapt to each document, evaluated offline. Serving does not use them yet; the losses show whether it should.

    w_m(t)  ~  w_m * ( prod_{s < t} P[m, s] ) ^ power        within one document

Power 0 is the prior. Power 1 is exact Bayes for "one member wrote the whole document", which commits too early if members are
alike. The best power is chosen by cross-validation over documents. Arrays in, losses out.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chorus.prior.quadratic import FloatArray
from chorus.prior.shrinkage import document_folds
from chorus.prior.weights import Probabilities

# M members, N tokens, D documents
POWERS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def sequential_losses(
    probabilities_MN: Probabilities, weights_M: FloatArray, offsets: NDArray[np.int64], power: float
) -> FloatArray:
    """-log q_n of every token (N). The weights start at `weights_M` in each document and adapt to its previous tokens only.

    `offsets` (D + 1): document d has the tokens offsets[d] : offsets[d + 1].
    """
    losses_N = np.empty(probabilities_MN.shape[1])
    with np.errstate(divide="ignore"):
        prior_M1 = np.log(weights_M)[:, None]
    for start, stop in itertools.pairwise(offsets):
        if start == stop:
            continue
        p_MT = np.maximum(probabilities_MN[:, start:stop].astype(np.float64), np.finfo(np.float32).tiny)
        evidence_MT = np.zeros_like(p_MT)
        np.cumsum(np.log(p_MT[:, :-1]), axis=1, out=evidence_MT[:, 1:])
        score_MT = prior_M1 + power * evidence_MT
        score_MT -= score_MT.max(axis=0)
        np.exp(score_MT, out=score_MT)
        losses_N[start:stop] = np.log(score_MT.sum(axis=0)) - np.log((score_MT * p_MT).sum(axis=0))
    return losses_N


@dataclass(frozen=True, kw_only=True)
class SequentialFit:
    """The best power, and cross-validated losses."""

    power: float
    """The best power over all documents, for use on other text."""
    losses_N: FloatArray
    """Loss of every token, with the power that is best on the other folds, so that no document influences its own power."""


def fit_power(
    probabilities_MN: Probabilities,
    weights_M: FloatArray,
    offsets: NDArray[np.int64],
    *,
    powers: tuple[float, ...] = POWERS,
    num_folds: int = 5,
) -> SequentialFit:
    """The power with the lowest loss, and cross-validated losses to compare with those of fixed weights.

    Raises:
        ChorusError: fewer than two documents have tokens.
    """
    fold_N = document_folds(offsets, num_folds)
    losses_PN = np.stack([sequential_losses(probabilities_MN, weights_M, offsets, power) for power in powers])
    losses_N = np.empty(losses_PN.shape[1])
    for fold in range(int(fold_N.max()) + 1):
        inside = fold_N == fold
        losses_N[inside] = losses_PN[int(losses_PN[:, ~inside].sum(axis=1).argmin()), inside]
    return SequentialFit(power=powers[int(losses_PN.sum(axis=1).argmin())], losses_N=losses_N)
