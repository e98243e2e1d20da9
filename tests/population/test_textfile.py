"""Text files in pieces: read block by block, cut as if they were read whole."""

import bz2
import gzip
import lzma
import random
import re
import subprocess
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chorus.population import textfile
from chorus.population.errors import ChorusError
from chorus.population.notes import Notes
from chorus.population.textfile import END_OF_TEXT, NotTextError, read_blocks, read_pieces

ALPHABET = st.sampled_from(
    [
        "a",
        "é",
        "🎶",
        "\n",
        "\n\n",
        "\r\n",
        " = T = \n",
        END_OF_TEXT,
        "<|endof",
        "word ",
        "\n \t\n",
        "long" * 12,
        "\ufeff",
    ]
)


def whole(text: str, split_on: str | None, passages: bool) -> list[str]:
    """The same from the whole text at once."""
    if split_on is not None:
        pieces = [""]
        for line in re.findall(r"[^\n]*\n|[^\n]+", text):
            if re.search(split_on, line, re.MULTILINE):
                pieces.append("")
            pieces[-1] += line
        return pieces
    if END_OF_TEXT in text:
        return text.split(END_OF_TEXT)
    if not passages:
        return [text]
    pieces = []
    while text:
        blank = re.compile(r"\n[^\S\n]*\n").search(text, 20, 80)
        line, space = text.find("\n", 20, 80), re.compile(r"\s").search(text, 20, 80)
        if blank:
            stop = blank.end()
        elif len(text) < 80:
            stop = len(text)
        elif line >= 0:
            stop = line + 1
        else:
            stop = space.end() if space else 80
        pieces.append(text[:stop])
        text = text[stop:]
    return pieces


@pytest.fixture
def short_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfile, "_PASSAGE_CHARACTERS", 20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    parts=st.lists(ALPHABET, max_size=80),
    block=st.integers(1, 40),
    how=st.sampled_from([(None, True), (None, False), (r"^ = \w = $", True)]),
)
def test_pieces_do_not_depend_on_the_blocks(
    short_passages: None, tmp_path: Path, parts: list[str], block: int, how: tuple[str | None, bool]
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("".join(parts).encode())
    textfile._BLOCK_BYTES, before = block, textfile._BLOCK_BYTES
    try:
        found = [piece for piece in read_pieces(path, how[0], passages=how[1], notes=Notes()) if piece]
    finally:
        textfile._BLOCK_BYTES = before
    assert found == [piece for piece in whole(path.read_text(encoding="utf-8-sig"), *how) if piece]


@pytest.mark.parametrize("block", [1, 2, 5, 1 << 20])
def test_a_byte_that_is_not_utf8_is_located_in_the_file(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textfile, "_BLOCK_BYTES", block)
    path = tmp_path / "text.txt"
    for data, where in (("é🎶ab".encode() + b"\xe9 nor this", 8), ("é🎶".encode()[:-1], 2)):
        path.write_bytes(data)
        with pytest.raises(ChorusError, match=rf"is not UTF-8 \(byte {where}\)"):
            list(read_pieces(path, None, passages=True, notes=Notes()))


@pytest.mark.parametrize("mark", ["\n\n", f"\n{END_OF_TEXT}\n", "\n = Title = \n"])
def test_memory_does_not_grow_with_the_file(mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfile, "_BLOCK_BYTES", 1 << 14)
    path = tmp_path / "large.txt"
    path.write_text(("some words of a document " * 300 + mark) * 500)
    tracemalloc.start()
    try:
        count = sum(
            1 for _ in read_pieces(path, "^ = Title = $" if "=" in mark else None, passages=True, notes=Notes())
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count in (500, 501)
    assert peak < path.stat().st_size / 20


BOM = "\ufeff"


def compressed(data: bytes, kind: str) -> bytes:
    if kind == "zst":
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return bytes(sink.getvalue())
    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "plain": bytes}[kind](data)


@pytest.mark.parametrize("kind", ["plain", "gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("twice", [False, True])
def test_compressed_files_are_read_whatever_they_are_called_and_without_a_byte_order_mark(
    kind: str, twice: bool, tmp_path: Path
) -> None:
    path = tmp_path / "corpus.txt"
    data = compressed(f"{BOM}one\r\ntwo ".encode(), kind)
    path.write_bytes(data + compressed(b"three", kind) if twice else data)  # `cat a.gz b.gz` is a file of both
    assert "".join(read_blocks(path)) == ("one\ntwo three" if twice else "one\ntwo ")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_a_compressed_file_cut_short_or_damaged_is_refused(kind: str, tmp_path: Path) -> None:
    data = compressed(random.Random(0).randbytes(20_000).hex().encode(), kind)
    damaged = [data[:40] + bytes(200) + data[240:]] if kind != "zst" else []  # which has no checksum here
    for wrong in (data[:-9], *damaged):
        (tmp_path / "a").write_bytes(wrong)
        with pytest.raises(NotTextError, match=r"cannot be read|is not UTF-8"):
            list(read_blocks(tmp_path / "a"))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("text".encode("utf-16"), r"is UTF-16, not UTF-8.*`iconv -f UTF-16 -t UTF-8 "),
        ("plain text, no mark".encode("utf-16-le"), r"`iconv -f UTF-16LE -t UTF-8 "),
        ("plain text, no mark".encode("utf-16-be"), r"`iconv -f UTF-16BE -t UTF-8 "),
        ("text".encode("utf-32"), r"is UTF-32, not UTF-8.*`iconv -f UTF-32 "),
        ("caf\xe9".encode("latin-1"), r"If it is Latin-1.*`iconv -f LATIN1 "),
        (b"PK\x03\x04" + bytes(40), "is an archive"),
        (bytes(257) + b"ustar" + bytes(250), "is an archive"),
        (b"%PDF-1.7\n\x00", "is a PDF"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", r"is binary, not text \(NUL at byte 8\)"),
        (b"some words\0and more", r"NUL at byte 10.*`tr -d "),
    ],
)
def test_what_is_no_utf8_text_is_refused_with_advice_that_fits(data: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "my file.txt"
    path.write_bytes(data)
    with pytest.raises(NotTextError, match=sentence) as caught:
        list(read_pieces(path, None, passages=True, notes=Notes()))
    if "`iconv" in sentence or "`tr" in sentence:  # the advice works as it stands
        subprocess.run(["sh", "-c", str(caught.value).split("`")[1]], check=True)
        assert list(read_blocks(tmp_path / "my file.utf8.txt"))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("some words of a line\n" * 5_000, "line ends"),
        ("a,b\r\n" * 20_000, "line ends"),
        ("one long line " * 8_000, "spaces"),
        ("x" * 100_000, "spaces"),
        (("word " * 200 + "\n \n") * 100, None),  # WikiText: its blank lines hold a space
    ],
)
def test_passages_end_at_line_ends_or_spaces_where_no_blank_line_comes_and_that_is_noted(
    text: str, where: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    notes = Notes()
    for _ in range(2):  # a corpus is read several times
        pieces = list(read_pieces(tmp_path / "a.txt", None, passages=True, notes=notes))
    assert "".join(pieces) == text.replace("\r\n", "\n")
    assert len(pieces) > 5
    assert max(map(len, pieces)) <= 16_000
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (where is not None)
    assert where is None or f"a.txt is cut into passages at {where}" in messages[0]
