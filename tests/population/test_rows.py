"""JSON lines and Parquet as corpora."""

from pathlib import Path

import pytest
from pyarrow import parquet, table

from chorus.population.corpus import read_documents
from chorus.population.errors import ChorusError


def test_every_row_is_a_document_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": " "}\n{"text": "two", "id": 3}\n')
    parquet.write_table(table({"text": ["three", "four"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("five")
    assert [(d.name, d.text) for d in read_documents(str(tmp_path))] == [
        ("a.jsonl#0", "one"), ("a.jsonl#2", "two"), ("b.parquet#0", "three"), ("b.parquet#1", "four"), ("c.txt", "five"),
    ]  # fmt: skip
    assert [d.text for d in read_documents(str(tmp_path / "b.parquet"))] == ["three", "four"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"text": "one"}\n{"txt": "two"}\n', r"row 2: no text in the field 'text'; it has txt.*--text-field"),
        (b'{"text": 7}\n', r"row 1: no text in the field 'text'; it holds int"),
        (b'{"text": "one"}\nplain words\n', r"line 2, is not a JSON object"),
        (b"[1, 2]\n", r"line 1, is not a JSON object \(a list, not an object\)"),
        (b'{"text": "caf\xe9"}\n', r"is not UTF-8 \(byte 13\)"),
    ],
)
def test_rows_that_cannot_be_read_are_named(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ChorusError, match=sentence):
        list(read_documents(str(tmp_path / "rows.jsonl")))


def test_a_parquet_file_without_the_column_or_damaged_is_named(tmp_path: Path) -> None:
    parquet.write_table(table({"body": ["one"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ChorusError, match="has no column 'text'; it has body, n"):
        list(read_documents(str(tmp_path / "a.parquet")))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ChorusError, match="is not a Parquet file that can be read"):
        list(read_documents(str(tmp_path / "b.parquet")))


def test_a_missing_file_of_rows_is_not_taken_for_a_dataset() -> None:
    with pytest.raises(ChorusError, match="does not exist"):
        list(read_documents("missing.parquet"))
