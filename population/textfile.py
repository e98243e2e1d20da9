"""Reads a text file in pieces, block by block: memory grows with the longest piece, not with the file.

Files may be compressed (gzip, bzip2, xz, zstandard), which is detected from their first bytes, not from their name.
"""

import bz2
import codecs
import gzip
import io
import lzma
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from chorus.population.errors import ChorusError
from chorus.population.notes import Notes

END_OF_TEXT = "<|endoftext|>"
COMPRESSED_SUFFIXES = {".gz", ".bz2", ".xz", ".zst"}
_PASSAGE_CHARACTERS = 4_000
_MAX_PASSAGE_RATIO = 4  # maximum length of a passage without a blank line, in multiples of _PASSAGE_CHARACTERS
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_BLOCK_BYTES = 1 << 17
_HEAD_BYTES = 8_000  # searched for NUL bytes, as git does
_READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)


class NotTextError(ChorusError):
    """A file is not UTF-8 text, or cannot be read at all."""


def content_suffix(path: Path) -> str:
    """The suffix of the uncompressed file, in lower case: `.jsonl` for `rows.jsonl.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def read_pieces(path: Path, split_on: str | None, *, passages: bool, notes: Notes) -> Iterator[str]:
    """The pieces of a file. Joined, they are the whole file without its `<|endoftext|>` marks.

    With `split_on`, every matching line starts a piece. Without it, the file is cut at `<|endoftext|>` if it contains any; else,
    with `passages`, at the first blank line after every 4,000 characters; else it is one piece. If 16,000 characters contain no
    blank line, a passage ends at the first line end after 4,000, else at the first space after 4,000, else at 16,000.

    Raises:
        NotTextError: the file is not UTF-8 text. Raised before the first piece.
        ChorusError: `split_on` is not a valid regular expression.
    """
    pattern = None if split_on is None else _compile(split_on)
    is_marked = _contains(path, END_OF_TEXT)
    if pattern is not None:
        return _split_at_lines(path, pattern)
    if is_marked:
        return _split_at_marks(path)
    return _passages(path, notes) if passages else iter(["".join(read_blocks(path))])


def _compile(split_on: str) -> "re.Pattern[str]":
    try:
        return re.compile(split_on, re.MULTILINE)
    except re.error as error:
        raise ChorusError(f"--split-on {split_on!r} is not a regular expression: {error}.") from None


def read_blocks(path: Path) -> Iterator[str]:
    """The text in blocks, without a byte order mark, with line ends translated as in Python's text mode.

    Raises:
        NotTextError: the file is not UTF-8 text, or cannot be read.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    num_read, at_start = 0, True
    try:
        with _opened(path) as file:
            block = file.read(_HEAD_BYTES)
            if problem := _head_problem(path, block):
                raise NotTextError(problem)
            while True:
                text = decoder.decode(block, final=not block)
                yield text.removeprefix("\ufeff") if at_start else text
                at_start = at_start and not text
                num_read += len(block)
                if not block:
                    return
                block = file.read(_BLOCK_BYTES)
    except UnicodeDecodeError as error:
        num_pending = len(error.object) - len(block)  # bytes of an incomplete character, kept from the previous block
        raise NotTextError(
            f"{path} is not UTF-8 (byte {num_read - num_pending + error.start}). If it is Latin-1, convert it: "
            f"`{_iconv(path, 'LATIN1')}`; for another encoding, change LATIN1 there."
        ) from None
    except _READ_ERRORS as error:
        raise NotTextError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}).") from None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes, decompressed if it is compressed."""
    with path.open("rb") as raw:
        magic = raw.read(10)
        raw.seek(0)
        if magic.startswith(b"\x1f\x8b"):
            opener: Callable[[IO[bytes]], Any] = gzip.open
        elif magic.startswith(b"BZh") and magic[4:] == b"1AY&SY":
            opener = bz2.open
        elif magic.startswith(b"\xfd7zXZ\x00"):
            opener = lzma.open
        elif magic.startswith(b"\x28\xb5\x2f\xfd"):
            opener = _zstandard(path)
        else:
            opener = nullcontext
        with opener(raw) as file:
            yield file


def _zstandard(path: Path) -> Callable[[IO[bytes]], Any]:
    try:
        import pyarrow  # a slow import, needed only here
    except ImportError:
        raise NotTextError(
            f"{path} is compressed with zstandard, which needs pyarrow: `pip install pyarrow`, or decompress it."
        ) from None
    return lambda raw: pyarrow.input_stream(raw, compression="zstd")


def _head_problem(path: Path, head: bytes) -> str | None:
    """Why a file with these first bytes is not UTF-8 text; None if it may be."""
    if encoding := _wide_encoding(head):
        return f"{path} is {encoding}, not UTF-8. Convert it: `{_iconv(path, encoding)}`."
    if head.startswith(b"PK\x03\x04") or head[257:262] == b"ustar":
        return f"{path} is an archive. Unpack it and use the folder."
    if head.startswith(b"%PDF-"):
        return f"{path} is a PDF. Extract its text, for example with `pdftotext`."
    if (where := head.find(b"\0")) >= 0:
        binary = f"{path} is binary, not text (NUL at byte {where})."
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head)
        except UnicodeDecodeError:
            return binary
        remove_nuls = f"tr -d '\\0' < {shlex.quote(str(path))} > {shlex.quote(str(_converted_path(path)))}"
        return f"{binary} If it is text, remove the NULs: `{remove_nuls}`."
    return None


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, detected by the byte order mark or the position of zero bytes; None for others."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    for at, encoding in ((1, "UTF-16LE"), (0, "UTF-16BE")):  # in Western text every second byte is zero
        zeros, others = head[at::2], head[1 - at :: 2]
        if zeros.count(0) > 0.4 * len(zeros) and b"\0" not in others:
            text = head[: len(head) // 2 * 2].decode(encoding, "replace")
            if text and all(character.isprintable() or character.isspace() for character in text):
                return encoding
    return None


def _iconv(path: Path, encoding: str) -> str:
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(str(_converted_path(path)))}"


def _converted_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.utf8{path.suffix}")


def _contains(path: Path, mark: str) -> bool:
    """Whether a mark is in the file. Reads to the end, so that a file that is not text is refused before any piece is used."""
    found, tail = False, ""
    for block in read_blocks(path):
        seen = tail + block
        found = found or mark in seen
        tail = seen[-len(mark) :]
    return found


def read_lines(path: Path) -> Iterator[str]:
    """Lines with their line ends, as a file in text mode yields them."""
    rest = ""
    for block in read_blocks(path):
        *lines, rest = (rest + block).split("\n")
        yield from (line + "\n" for line in lines)
    if rest:
        yield rest


def _split_at_lines(path: Path, pattern: "re.Pattern[str]") -> Iterator[str]:
    piece: list[str] = []
    for line in read_lines(path):
        if piece and pattern.search(line):
            yield "".join(piece)
            piece = []
        piece.append(line)
    yield "".join(piece)


def _split_at_marks(path: Path) -> Iterator[str]:
    rest = ""
    for block in read_blocks(path):
        *pieces, rest = (rest + block).split(END_OF_TEXT)
        yield from pieces
    yield rest


def _passages(path: Path, notes: Notes) -> Iterator[str]:
    rest = ""
    for block in read_blocks(path):
        rest += block
        start = 0
        while (cut := _passage_end(rest, start)) is not None:
            stop, where = cut
            if where != "blank lines":
                notes(f"{path} is cut into passages at {where} wherever 16,000 characters contain no blank line.")
            yield rest[start:stop]
            start = stop
        rest = rest[start:]
    yield rest


def _passage_end(text: str, start: int) -> tuple[int, str] | None:
    """Where the passage from `start` ends, and what ends it; None if that depends on more text."""
    first, last = start + _PASSAGE_CHARACTERS, start + _MAX_PASSAGE_RATIO * _PASSAGE_CHARACTERS
    if found := _BLANK_LINE.search(text, first, last):
        return found.end(), "blank lines"
    if len(text) < last:
        return None
    if (end := text.find("\n", first, last)) >= 0:
        return end + 1, "line ends"
    space = re.compile(r"\s").search(text, first, last)
    return (space.end() if space else last), "spaces within long lines"
