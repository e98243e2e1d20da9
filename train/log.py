"""The log of a trajectory: one JSON object per line. A resumed run continues it without gaps or duplicates."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

Record = dict[str, str | int | float]


class Log:
    """Appends records to a file and forwards them."""

    def __init__(self, path: Path | None, *, length: int, forward: Callable[[Record], None]) -> None:
        """Open the log and truncate it to `length` bytes, since later steps will be logged again. Without a path, write no file.

        `forward` receives every record.
        """
        self._file = (path or Path(os.devnull)).open("ab")
        if path is not None:
            self._file.truncate(min(length, path.stat().st_size))
        self._forward = forward

    def write(self, record: Record) -> None:
        """Append one record."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        self._forward(record)

    def length(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
