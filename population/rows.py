"""Reads documents from JSON lines, JSON arrays and Parquet, row by row, so that memory does not grow with the file."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from chorus.population.errors import ChorusError
from chorus.population.notes import Notes
from chorus.population.textfile import content_suffix, read_blocks, read_lines

JSON, JSON_LINES, PARQUET = ".json", {".jsonl", ".ndjson"}, {".parquet"}
ROW_SUFFIXES = JSON_LINES | PARQUET
_PARQUET_BATCH_ROWS = 1_000
_SPACE = " \t\n\r"


def read_rows(path: Path, text_field: str, notes: Notes) -> Iterator[str]:
    """The text of every row, in order; "" if it is null.

    Raises:
        ChorusError: a row cannot be read, or its text field is missing or not a string.
    """
    suffix = content_suffix(path)
    if suffix in PARQUET:
        rows: Iterator[object] = _parquet(path, text_field)
    elif suffix == JSON and _first_character(path) == "[":
        rows = _json_array(path)
    else:
        rows = json_objects(path)
    for number, row in enumerate(rows, start=1):
        yield row_text(row, text_field, f"{path}, row {number}", notes)


def holds_rows(path: Path, text_field: str) -> bool:
    """Whether a `.json` file has rows: an array of objects or strings, or JSON lines. If not, it is read as one text, like code.

    Raises:
        NotTextError: the file is not UTF-8 text.
    """
    if _first_character(path) != "[":
        lines = (line for line in read_lines(path) if line.strip())
        first, second = _parsed(next(lines, "")), next(lines, None)
        return isinstance(first, dict) and (text_field in first or isinstance(_parsed(second or ""), dict))
    try:
        return isinstance(next(_json_array(path), None), dict | str)
    except ChorusError:  # not valid JSON
        return False


def row_text(row: object, text_field: str, where: str, notes: Notes) -> str:
    """The text of one row: the row itself if it is a string, else its text field. "" if null.

    Raises:
        ChorusError: the field is missing or not a string.
    """
    if not isinstance(row, Mapping):
        text = row
    elif text_field in row:
        text = row[text_field]
    else:
        raise ChorusError(
            f"{where}: no text in the field {text_field!r}; it has {', '.join(map(str, row))}. Set the field with --text-field."
        )
    if text is None:
        return ""  # pandas and databases write a missing text as null
    if not isinstance(text, str):
        raise ChorusError(
            f"{where}: no text in the field {text_field!r}; it contains {type(text).__name__}. Set the field with --text-field."
        )
    try:
        text.encode()
    except UnicodeEncodeError:  # from escapes such as \ud800; surrogate pairs are joined, lone ones replaced
        notes(f"{where}, and maybe others: lone surrogates are replaced with U+FFFD.")
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def json_objects(path: Path) -> Iterator[dict[str, object]]:
    """The objects of a JSON lines file, in order.

    Raises:
        ChorusError: a line is not a JSON object.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}, not an object")
        except (ValueError, RecursionError) as error:
            raise ChorusError(
                f"{path}, line {number}, is not a JSON object ({error}). Expected one object per line."
            ) from None
        yield row


def _json_array(path: Path) -> Iterator[dict[str, object] | str | None]:
    """The elements of a JSON array, which must be objects, strings or nulls, decoded one by one."""
    blocks = read_blocks(path)
    decode = json.JSONDecoder().raw_decode
    rest, number = "".join(_read_characters(blocks, 1)).lstrip(_SPACE).removeprefix("["), 0
    while True:
        rest = rest.lstrip(_SPACE)
        while len(rest) < 2 and (more := next(blocks, None)) is not None:
            rest = (rest + more).lstrip(_SPACE)
        if rest.startswith("]"):
            return
        if number:
            if not rest.startswith(","):
                raise _invalid_array(path, number, "a comma or ] is missing after it")
            rest = rest[1:].lstrip(_SPACE)
        while True:
            try:
                row, end = decode(rest)
                break
            except (ValueError, RecursionError) as error:
                more = "".join(
                    _read_characters(blocks, len(rest) + 1)
                )  # read as much again, so that a long element takes linear time
                if not more:
                    raise _invalid_array(path, number + 1, str(error)) from None
                rest = (rest + more).lstrip(_SPACE)
        number += 1
        if not isinstance(row, dict | str | None):
            raise _invalid_array(path, number, f"a {type(row).__name__}, not an object or a string")
        yield row
        rest = rest[end:]


def _read_characters(blocks: Iterator[str], characters: int) -> Iterator[str]:
    """Blocks with at least `characters` non-space characters in total, or up to the end."""
    while characters > 0 and (block := next(blocks, None)) is not None:
        characters -= len(block.strip(_SPACE))
        yield block


def _invalid_array(path: Path, number: int, reason: str) -> ChorusError:
    return ChorusError(
        f"{path}, element {number} of the array: {reason}. Expected an array of objects or strings, or one object per line."
    )


def _first_character(path: Path) -> str:
    return next((block.lstrip()[:1] for block in read_blocks(path) if block.strip()), "")


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _parquet(path: Path, text_field: str) -> Iterator[dict[str, object]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet  # a slow import, needed only here
    except ImportError:
        raise ChorusError(f"{path} needs pyarrow, which is not installed: `pip install pyarrow`.") from None
    try:
        file = parquet.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            raise ChorusError(
                f"{path} has no column {text_field!r}; it has {', '.join(file.schema_arrow.names)}. "
                "Set the column with --text-field."
            )
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                yield {text_field: text}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ChorusError(f"{path} is not a readable Parquet file ({error}).") from None
