"""Small inputs for tests of the prior: matrices whose members resemble one another as snapshots do, and short splits."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chorus.population.tokens import TokenSplit, split_path
from chorus.prior.splits import HELD_OUT


def some_likelihoods(
    num_members: int, num_tokens: int, *, seed: int = 0, duplicates: int = 0, noise: float = 0.8
) -> NDArray[np.float32]:
    """Random probabilities (M, N): tokens differ in difficulty, members in skill; the last few nearly copy earlier ones."""
    generator = np.random.default_rng(seed)
    difficulty_N = generator.gamma(2.0, 1.2, size=num_tokens)
    skill_M1 = generator.normal(0, 0.1, size=(num_members, 1))
    losses_MN = difficulty_N + skill_M1 + generator.normal(0, noise, size=(num_members, num_tokens))
    for copy in range(duplicates):
        original = copy % (num_members - duplicates)
        losses_MN[num_members - 1 - copy] = losses_MN[original] + generator.normal(0, 0.02, size=num_tokens)
    return np.exp(-np.maximum(losses_MN, 1e-4)).astype(np.float32)


def cut_splits(directory: Path, *, num_documents: int, num_tokens: int = 300) -> None:
    """Leave a population only the beginnings of the first documents of its splits, so that scoring them takes a moment."""
    for name in HELD_OUT:
        whole = TokenSplit.load(split_path(directory, name))
        documents = [
            whole.document(idx)[:num_tokens].tolist() for idx in range(min(num_documents, whole.num_documents))
        ]
        TokenSplit.from_documents(documents).save(split_path(directory, name))


def trained_snapshots() -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.int64]]]:
    """Real probabilities (M, N) and document offsets of three splits, the first 120 tokens of ten documents each.

    From ten members trained by `chorus train stdlib`, two trajectories of five cycles."""
    with np.load(Path(__file__).with_name("snapshots.npz")) as kept:
        matrices = {name: np.exp(-kept[name].astype(np.float32)) for name in HELD_OUT}
        return matrices, {name: kept[f"{name}_offsets"].astype(np.int64) for name in HELD_OUT}
