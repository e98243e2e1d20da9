"""The log of a trajectory: one JSON object per line, which a resumed run continues as if nothing had happened."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

Record = dict[str, str | int | float]


class Log:
    """Appends records to a file and passes them on."""

    def __init__(self, path: Path | None, *, length: int, also: Callable[[Record], None]) -> None:
        """Open the log and cut it to `length` bytes: what stands behind them will be written again. Without a path, keep none."""
        self._file = (path or Path(os.devnull)).open("ab")
        if path is not None:
            self._file.truncate(min(length, path.stat().st_size))
        self._also = also

    def write(self, record: Record) -> None:
        """Append one record."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        self._also(record)

    def length(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
