"""Held-out losses from cached probabilities: of a member, and of the uniform mixture. Needs no torch."""

# N scored tokens, M members

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from population.files import replacing


def save_likelihoods(path: Path, likelihoods_N: NDArray[np.float32]) -> None:
    """Keep them for the table at the end of the run, atomically."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, likelihoods_N)


def loss(likelihoods_N: NDArray[np.floating]) -> float:
    """Mean -log p in nats."""
    return float(-np.log(np.maximum(likelihoods_N.astype(np.float64), 1e-30)).mean())


def mixture_loss(likelihoods_MN: list[NDArray[np.float32]]) -> float:
    """Mean -log of the uniformly weighted linear mixture, in nats."""
    return loss(np.mean([row.astype(np.float64) for row in likelihoods_MN], axis=0))
