"""A text file as pieces, read block by block: memory does not grow with the file, only with its longest piece."""

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path

from chorus.population.errors import ChorusError

END_OF_TEXT = "<|endoftext|>"
_PASSAGE_CHARACTERS = 4_000
_BLOCK_BYTES = 1 << 20


def read_pieces(path: Path, split_on: str | None, *, passages: bool) -> Iterator[str]:
    """The pieces of a file, which together are the file but for its marks.

    With `split_on`, each line that the pattern matches begins a piece. Without it the file is cut at `<|endoftext|>` if it has any;
    else, with `passages`, at the first blank line behind every 4,000 characters; else it is one piece.

    Raises:
        ChorusError: the file is not UTF-8, or `split_on` is no regular expression.
    """
    if split_on is not None:
        return _at_lines(path, _pattern(split_on))
    if _holds(path, END_OF_TEXT):
        return _at_marks(path)
    return _passages(path) if passages else iter(["".join(_blocks(path))])


def _pattern(split_on: str) -> "re.Pattern[str]":
    try:
        return re.compile(split_on, re.MULTILINE)
    except re.error as error:
        raise ChorusError(f"--split-on {split_on!r} is not a regular expression: {error}.") from None


def _blocks(path: Path) -> Iterator[str]:
    """The text in blocks, its line ends translated as Python's text mode does."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    num_read = 0
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK_BYTES)
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                waiting = len(error.object) - len(block)  # of the block before: the begin of a character
                raise ChorusError(
                    f"{path} is not UTF-8 (byte {num_read - waiting + error.start}). "
                    "Convert it, for example with `iconv -f LATIN1 -t UTF-8`."
                ) from None
            num_read += len(block)
            if not block:
                return


def _holds(path: Path, mark: str) -> bool:
    tail = ""
    for block in _blocks(path):
        if mark in (seen := tail + block):
            return True
        tail = seen[-len(mark) :]
    return False


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends, as a file in text mode gives them."""
    rest = ""
    for block in _blocks(path):
        *lines, rest = (rest + block).split("\n")
        yield from (line + "\n" for line in lines)
    if rest:
        yield rest


def _at_lines(path: Path, pattern: "re.Pattern[str]") -> Iterator[str]:
    piece: list[str] = []
    for line in _lines(path):
        if piece and pattern.search(line):
            yield "".join(piece)
            piece = []
        piece.append(line)
    yield "".join(piece)


def _at_marks(path: Path) -> Iterator[str]:
    rest = ""
    for block in _blocks(path):
        *pieces, rest = (rest + block).split(END_OF_TEXT)
        yield from pieces
    yield rest


def _passages(path: Path) -> Iterator[str]:
    rest, searched = "", _PASSAGE_CHARACTERS
    for block in _blocks(path):
        rest += block
        start = 0
        while (stop := rest.find("\n\n", max(searched, start + _PASSAGE_CHARACTERS))) >= 0:
            yield rest[start : stop + 2]
            start = stop + 2
        rest = rest[start:]
        searched = max(_PASSAGE_CHARACTERS, len(rest) - 1)
    yield rest
