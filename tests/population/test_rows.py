"""JSON lines and Parquet as corpora."""

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet, table

from chorus.population import textfile
from chorus.population.corpus import read_all_documents, read_documents
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
        (b'{"text": 7}\n', r"row 1: no text in the field 'text'; it contains int"),
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
    with pytest.raises(ChorusError, match="is not a readable Parquet file"):
        list(read_documents(str(tmp_path / "b.parquet")))


def test_a_missing_file_of_rows_is_not_taken_for_a_dataset() -> None:
    with pytest.raises(ChorusError, match="does not exist"):
        list(read_documents("missing.parquet"))


ROWS = [
    {"text": "one"},
    {"text": None},
    {"text": "half \ud800 of a pair"},
    {"text": "\ud83c\udfb6"},
    {"text": "nul \0"},
]
TEXTS = ["one", "", "half \ufffd of a pair", "🎶", "nul \0"]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("a.jsonl", "lines"), ("a.ndjson.gz", "lines"), ("a.json", "lines"), ("a.json.gz", "lines"),
        ("a.json", "array"), ("a.json.gz", "array"), ("a.json", "strings"), ("a.json", "indented"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("block", [1, 7, 1 << 17])
def test_json_of_every_layout_gives_the_same_documents(
    name: str, layout: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textfile, "_BLOCK_BYTES", block)
    monkeypatch.setattr(textfile, "_HEAD_BYTES", block)
    strings = [row["text"] for row in ROWS]
    text = {
        "lines": "\r\n".join(map(json.dumps, ROWS)),
        "array": json.dumps(ROWS),
        "strings": json.dumps(strings),
        "indented": "\n\n" + json.dumps(ROWS, indent=2) + "\n",
    }[layout]
    data = ("\ufeff" + text).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [d.text for d in read_all_documents(str(tmp_path / name))] == TEXTS
    assert [d.text for d in read_all_documents(str(tmp_path))] == TEXTS


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[{"text": "one"}', r"element 1 of the array: a comma or \] is missing"),
        ('[{"text": "one"}, {"text": "tw', "element 2 of the array: Unterminated string"),
        ('["one", 7]', "element 2 of the array: a int, not an object or a string"),
        ('[{"body": "one"}]', "row 1: no text in the field 'text'; it has body.*--text-field"),
        ('{"data": [\n{"text": "one"}]}', "is neither an array of objects or strings"),
        ("[1, 2]", "is neither an array of objects or strings"),
        ("[" * 100_000, "is neither an array of objects or strings"),
    ],
)
def test_json_that_holds_no_documents_is_refused_by_itself_and_named_in_a_folder(
    text: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ChorusError, match=sentence):
        list(read_documents(str(tmp_path / "a.json")))


def test_json_among_code_is_text_or_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "package.json").write_text('{\n "name": "x"\n}')
    (tmp_path / "minified.json").write_text('{"name": "x"}')
    (tmp_path / "fixture.json").write_text('[{"id": 1}]')
    assert [d.name for d in read_documents(str(tmp_path))] == ["minified.json", "package.json"]
    assert "fixture.json, row 1: no text in the field 'text'; it has id" in caplog.text


def test_nulls_in_parquet_are_empty_documents_and_strings_that_are_none_a_sentence(tmp_path: Path) -> None:
    parquet.write_table(table({"text": ["one", None]}), tmp_path / "a.parquet")
    assert [d.text for d in read_all_documents(str(tmp_path / "a.parquet"))] == ["one", ""]
    raw = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xe9\xe9")]
    )
    parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "b.parquet")
    with pytest.raises(ChorusError, match="is not a readable Parquet file"):
        list(read_documents(str(tmp_path / "b.parquet")))


def test_a_file_of_rows_that_breaks_off_refuses_its_folder(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "%s"}\n' % str(idx).encode() * 100 for idx in range(2_000))
    (tmp_path / "a.jsonl").write_bytes(lines + b'{"text": "\xe9"}\n')
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ChorusError, match=r"a\.jsonl is not UTF-8"):
        list(read_documents(str(tmp_path)))
