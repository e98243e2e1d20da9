"""Text files in pieces: read block by block, cut as if they were read whole."""

import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chorus.population import textfile
from chorus.population.errors import ChorusError
from chorus.population.notes import Notes
from chorus.population.textfile import END_OF_TEXT, read_pieces

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
