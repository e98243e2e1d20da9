"""The likelihoods of all members on the three held-out splits, from which a prior is fitted."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from chorus.prior.weights import Probabilities

# M members, N tokens, D documents


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """P[m, n] of all members on the three concatenated held-out splits: fitness, selection, test."""

    probabilities_MN: Probabilities = field(repr=False)
    num_fitness: int
    num_selection: int
    fitted_offsets: NDArray[np.int64] = field(repr=False)
    """(D + 1), from 0: where the documents of the fitness and selection splits begin, counted in their scored tokens."""
    test_offsets: NDArray[np.int64] = field(repr=False)
    """(D + 1), from 0: where the documents of the test split begin, counted in its scored tokens."""

    def __post_init__(self) -> None:
        expected = self.num_fitness + self.num_selection + int(self.test_offsets[-1])
        if self.probabilities_MN.shape[1] != expected:
            raise ValueError(f"got likelihoods of {self.probabilities_MN.shape[1]} tokens for {expected} scored tokens")
        if int(self.fitted_offsets[-1]) != self.num_fitness + self.num_selection:
            raise ValueError(
                f"the documents end at token {self.fitted_offsets[-1]} of {self.num_fitness + self.num_selection}"
            )

    @property
    def fitted(self) -> Probabilities:
        """Likelihoods on the fitness and selection splits: a view."""
        return self.probabilities_MN[:, : self.num_fitness + self.num_selection]

    @property
    def test(self) -> Probabilities:
        """Likelihoods on the test split: a view."""
        return self.probabilities_MN[:, self.num_fitness + self.num_selection :]
