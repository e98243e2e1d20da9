"""Serves the train split as batches, with documents in a new order every epoch.

An epoch is one stream of all documents, each whole and between its marker tokens. A batch is a slice of that stream, given by its
index alone, so a resumed run needs only its step.
"""

# B rows, T positions

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chorus.population.errors import ChorusError
from chorus.population.files import replacing

_TOKENS, _OFFSETS = "train-tokens.npy", "train-offsets.npy"


class TrainTokens:
    """Documents as tokens on disk, read through the page cache: memory does not grow with the corpus."""

    def __init__(self, directory: Path) -> None:
        try:
            self.tokens: NDArray[np.uint32] = np.load(directory / _TOKENS, mmap_mode="r")
            self.offsets: NDArray[np.int64] = np.load(directory / _OFFSETS)
        except (OSError, ValueError) as error:
            raise ChorusError(
                f"the tokens of the train split in {directory} cannot be read ({error}). Train into a new --out."
            ) from None

    @staticmethod
    def save(
        directory: Path,
        lengths: Sequence[int] | NDArray[np.int64],
        documents: Iterable[Sequence[int] | NDArray[np.uint32]],
    ) -> None:
        """Write token ids document by document, each file atomically. `lengths` holds the tokens of each document."""
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        with replacing(directory / _TOKENS) as temporary:
            tokens: NDArray[np.uint32]
            tokens = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint32, shape=(int(offsets[-1]),))  # type: ignore[no-untyped-call]
            # Reserve the space: a full disk raises OSError here, while writing to the mapped file would end in SIGBUS.
            with temporary.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
            for document, start in zip(documents, offsets[:-1], strict=True):
                tokens[start : start + len(document)] = document
            tokens.flush()  # type: ignore[attr-defined]
        with replacing(directory / _OFFSETS) as temporary, temporary.open("wb") as file:
            np.save(file, offsets)


class Epoch:
    """One pass over the train split, in its own document order."""

    def __init__(self, data: TrainTokens, *, seed: int, trajectory: int, epoch: int) -> None:
        num_documents = len(data.offsets) - 1
        order = np.random.default_rng([seed, trajectory, epoch]).permutation(num_documents)
        self._tokens = data.tokens
        self._starts = data.offsets[:-1][order]
        lengths = np.diff(data.offsets)[order]
        self._ends = np.cumsum(lengths)
        """Position in the stream just after the last token of each document."""

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens `start` to `start + count` of the stream."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        parts, position = [], start
        for idx in range(first, len(self._ends)):
            begin = self._ends[idx - 1] if idx else 0
            source = self._starts[idx] + (position - begin)
            take = min(int(self._ends[idx]) - position, start + count - position)
            parts.append(self._tokens[source : source + take])
            position += take
            if position == start + count:
                break
        assert position == start + count, "read past the end of the epoch"
        return np.concatenate(parts).astype(np.int64)

    def batch(self, idx: int, *, rows: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs (B, T) and targets (B, T) of batch `idx`; targets are one token ahead."""
        stream = self.read(idx * rows * length, rows * length + 1)
        return stream[:-1].reshape(rows, length), stream[1:].reshape(rows, length)
