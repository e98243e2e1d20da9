"""Documents out of rows: JSON lines and Parquet, read row by row, so that memory does not grow with the file."""

import json
from collections.abc import Iterator
from pathlib import Path

from chorus.population.errors import ChorusError

JSON_LINES, PARQUET = {".jsonl", ".ndjson"}, {".parquet"}
ROW_SUFFIXES = JSON_LINES | PARQUET
_PARQUET_ROWS = 1_000  # read at once


def read_rows(path: Path, text_field: str) -> Iterator[str]:
    """The text of every row, in their order.

    Raises:
        ChorusError: a row cannot be read, or has no text in that field.
    """
    rows = _parquet(path, text_field) if path.suffix.lower() in PARQUET else _json_lines(path)
    for number, row in rows:
        text = row.get(text_field)
        if not isinstance(text, str):
            there = f"it has {', '.join(map(str, row))}" if text is None else f"it holds {type(text).__name__}"
            raise ChorusError(
                f"{path}, row {number}: no text in the field {text_field!r}; {there}. Name the field with --text-field."
            )
        yield text


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"a {type(row).__name__}, not an object")
                    yield number, row
    except UnicodeDecodeError:
        raise ChorusError(
            f"{path} is not UTF-8 (behind line {number}). Convert it, for example with `iconv -f LATIN1 -t UTF-8`."
        ) from None
    except ValueError as error:
        raise ChorusError(
            f"{path}, line {number}, is not a JSON object ({error}). One object per line is expected."
        ) from None


def _parquet(path: Path, text_field: str) -> Iterator[tuple[int, dict[str, object]]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet  # heavy, and needed for this format alone
    except ImportError:
        raise ChorusError(f"{path} needs pyarrow, which is not installed: `pip install pyarrow`.") from None
    try:
        file = parquet.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            raise ChorusError(
                f"{path} has no column {text_field!r}; it has {', '.join(file.schema_arrow.names)}. "
                "Name the column with --text-field."
            )
        number = 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield number, {text_field: text}
    except (pyarrow.ArrowException, OSError) as error:
        raise ChorusError(f"{path} is not a Parquet file that can be read ({error}).") from None
