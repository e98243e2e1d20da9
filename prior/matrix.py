"""P[m, n] on disk: one memory-mapped float32 file for each text, a row for each member, appended as members are scored.

    DIR/prior/likelihoods/<digest of the text>/rows.f32      row after row, N numbers each, little-endian
    DIR/prior/likelihoods/<digest of the text>/index.json    whose rows these are, their checksums, where parts and documents begin

A row counts once the index names it, and the index is replaced after the row is on disk: a run that is killed loses the row it was
writing and no other. Rows belong to digests of weights and text, so a file of another population or another text is never taken
for this one.
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
    """A split's place among the columns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    num_tokens: int
    offsets: list[int]
    """(D + 1), from 0: where its documents begin among its scored tokens."""


class Row(BaseModel):
    """One row of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: str
    """Digest of the member's weights."""
    crc32: int


class Index(BaseModel):
    """What the rows are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    """Digest of all that a likelihood depends on besides the member."""
    parts: tuple[Part, ...]
    rows: tuple[Row, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Columns."""
        return sum(part.num_tokens for part in self.parts)


class RowFile:
    """The rows of one text."""

    def __init__(self, directory: Path, empty: Index) -> None:
        self._directory = directory
        self._empty = empty

    @classmethod
    def open(cls, directory: Path, empty: Index) -> Self:
        """The file in `directory`, which need not exist yet. `empty` is its index without rows."""
        directory.mkdir(parents=True, exist_ok=True)
        return cls(directory, empty)

    def sound(self) -> dict[str, int]:
        """Digest of weights to row number, of all rows whose checksum holds. Reads them once."""
        index = self._index()
        found = {}
        for number, row in enumerate(index.rows):
            if self._is_sound(number, row):
                found[row.weights] = number
            else:
                logger.warning(
                    "row %d of %s is damaged or belongs to another text and is computed again",
                    number,
                    self._directory / ROWS,
                )
        return found

    def write(self, weights: str, row_N: NDArray[np.float32]) -> None:
        """Keep a member's row: in the place of its damaged one, else after the last."""
        assert row_N.shape == (self._empty.num_tokens,)
        data = np.ascontiguousarray(row_N, dtype=_DTYPE).tobytes()
        with locked(self._directory / ".lock"):
            index = self._index()
            rows = list(index.rows)
            number = next((idx for idx, row in enumerate(rows) if row.weights == weights), len(rows))
            rows[number : number + 1] = [Row(weights=weights, crc32=zlib.crc32(data))]
            handle = os.open(self._directory / ROWS, os.O_WRONLY | os.O_CREAT, 0o644)
            with os.fdopen(handle, "wb") as file:
                file.seek(number * len(data))
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            written = index.model_copy(update={"rows": tuple(rows)})
            write_text(self._directory / INDEX, written.model_dump_json() + "\n")

    def matrix(self, numbers: Sequence[int]) -> NDArray[np.float32]:
        """The rows of those numbers, read-only (M, N).

        Rows that follow one another, as a population's do that has only grown, are a view of the file: what is read can be dropped
        from memory again, and nothing is held twice. Rows in another order are copied.
        """
        shape = (max(numbers) + 1, self._empty.num_tokens)
        mapped_RN: NDArray[np.float32] = np.memmap(self._directory / ROWS, dtype=_DTYPE, mode="r", shape=shape)
        first = numbers[0]
        if list(numbers) == list(range(first, first + len(numbers))):
            return mapped_RN[first : first + len(numbers)]
        return mapped_RN[list(numbers)]

    def _is_sound(self, number: int, row: Row) -> bool:
        size = self._empty.num_tokens * _DTYPE.itemsize
        try:
            with (self._directory / ROWS).open("rb") as file:
                file.seek(number * size)
                return zlib.crc32(file.read(size)) == row.crc32
        except OSError:
            return False

    def _index(self) -> Index:
        path = self._directory / INDEX
        try:
            found = Index.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return self._empty
        except ValidationError as error:
            logger.warning("%s is damaged and its rows are computed again (%s)", path, type(error).__name__)
            return self._empty
        if found.model_copy(update={"rows": ()}) != self._empty:
            logger.warning("%s belongs to another text and its rows are computed again", path)
            return self._empty
        return found
