"""P[m, n] on disk: one memory-mapped float32 file per text, with one row per member, appended as members are scored.

    DIR/prior/likelihoods/<digest of the text>/rows.f32      rows of N numbers each, little-endian
    DIR/prior/likelihoods/<digest of the text>/index.json    each row's member and checksum, and where parts and documents begin

The index is replaced only after a new row is on disk, so a killed run loses at most the row it was writing. Rows are keyed by
digests of weights and text, so rows of another population or text are never used by mistake.
"""

import logging
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from chorus.population.files import locked, write_text

ROWS, INDEX = "rows.f32", "index.json"
_DTYPE = np.dtype("<f4")

logger = logging.getLogger(__name__)
# M members, N scored tokens of all parts, R rows of the file


class Part(BaseModel):
    """The columns of one split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    num_tokens: int
    offsets: list[int]
    """(D + 1), from 0: where its documents begin, counted in its scored tokens."""


class Row(BaseModel):
    """One row of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: str
    """Digest of the member's weights."""
    crc32: int


class Index(BaseModel):
    """Describes the rows of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    """Digest of everything besides the member that a likelihood depends on."""
    parts: tuple[Part, ...]
    rows: tuple[Row, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Number of columns."""
        return sum(part.num_tokens for part in self.parts)


class RowFile:
    """The likelihood rows of one text."""

    def __init__(self, directory: Path, empty: Index) -> None:
        self._directory = directory
        self._empty = empty

    @classmethod
    def open(cls, directory: Path, empty: Index) -> Self:
        """The file in `directory`, which is created if needed. `empty` is its index without rows."""
        directory.mkdir(parents=True, exist_ok=True)
        return cls(directory, empty)

    def valid_rows(self) -> dict[str, int]:
        """Row index by digest of weights, for all rows whose checksum matches. Reads every row once."""
        valid = {}
        for row_idx, row in enumerate(self._index().rows):
            if self._is_valid(row_idx, row):
                valid[row.weights] = row_idx
            else:
                logger.warning(
                    "row %d of %s is damaged or belongs to another text; recomputing it",
                    row_idx,
                    self._directory / ROWS,
                )
        return valid

    def write(self, weights: str, row_N: NDArray[np.float32]) -> None:
        """Write a member's row, over its damaged row if there is one, else at the end."""
        assert row_N.shape == (self._empty.num_tokens,)
        data = np.ascontiguousarray(row_N, dtype=_DTYPE).tobytes()
        with locked(self._directory / ".lock"):
            index = self._index()
            rows = list(index.rows)
            row_idx = next((idx for idx, row in enumerate(rows) if row.weights == weights), len(rows))
            rows[row_idx : row_idx + 1] = [Row(weights=weights, crc32=zlib.crc32(data))]
            handle = os.open(self._directory / ROWS, os.O_WRONLY | os.O_CREAT, 0o644)
            with os.fdopen(handle, "wb") as file:
                file.seek(row_idx * len(data))
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            written = index.model_copy(update={"rows": tuple(rows)})
            write_text(self._directory / INDEX, written.model_dump_json() + "\n")

    def matrix(self, row_idxs: Sequence[int]) -> NDArray[np.float32]:
        """These rows (M, N), read-only.

        Consecutive rows, as in a population that has only grown, are a view of the file: the system can evict pages that were read,
        and nothing is held twice. Rows in another order are copied.
        """
        shape = (max(row_idxs) + 1, self._empty.num_tokens)
        mapped_RN: NDArray[np.float32] = np.memmap(self._directory / ROWS, dtype=_DTYPE, mode="r", shape=shape)
        first = row_idxs[0]
        if list(row_idxs) == list(range(first, first + len(row_idxs))):
            return mapped_RN[first : first + len(row_idxs)]
        return mapped_RN[list(row_idxs)]

    def _is_valid(self, row_idx: int, row: Row) -> bool:
        size = self._empty.num_tokens * _DTYPE.itemsize
        try:
            with (self._directory / ROWS).open("rb") as file:
                file.seek(row_idx * size)
                return zlib.crc32(file.read(size)) == row.crc32
        except OSError:
            return False

    def _index(self) -> Index:
        path = self._directory / INDEX
        try:
            index = Index.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return self._empty
        except ValidationError as error:
            logger.warning("%s is damaged; recomputing its rows (%s)", path, type(error).__name__)
            return self._empty
        if index.model_copy(update={"rows": ()}) != self._empty:
            logger.warning("%s belongs to another text; recomputing its rows", path)
            return self._empty
        return index
