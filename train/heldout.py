"""Held-out losses of members and uniform mixtures, from saved probabilities. Needs no torch."""

# N scored tokens, M members

import numpy as np
from numpy.typing import NDArray


def loss(likelihoods_N: NDArray[np.floating]) -> float:
    """Mean -log p, in nats per token."""
    return float(-np.log(np.maximum(likelihoods_N.astype(np.float64), 1e-30)).mean())


def mixture_loss(likelihoods_MN: list[NDArray[np.float32]]) -> float:
    """Mean -log p of the linear mixture with uniform weights, in nats per token."""
    return loss(np.mean([row.astype(np.float64) for row in likelihoods_MN], axis=0))
