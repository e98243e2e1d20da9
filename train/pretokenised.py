"""Reads a corpus of token ids: memory-maps it, cuts it into documents at the tokenizer's markers, and splits it.

`.npy` holds a one-dimensional array of integers. `.bin` holds bare integers as nanoGPT writes them (uint16 if the vocabulary
allows, else uint32), optionally after the header of llm.c and modded-nanogpt. Memory holds an outline of each document and the
held-out splits; train documents are read from the mapped files.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chorus.population.corpus import Outline, locate, sample_outlines, split_outlines, walk
from chorus.population.errors import ChorusError
from chorus.population.notes import Notes
from chorus.population.tokens import TextTokenizer
from chorus.train.corpus import Tokenised, capped

SUFFIXES = {".bin", ".npy"}
_CHUNK_TOKENS = 1 << 22  # tokens scanned at once
_CHARACTERS_PER_TOKEN = 4  # approximate: it caps held-out splits of text and of tokens at about the same size
_HEADER_MAGIC, _HEADER_BYTES = 20240520, 1024


def token_files(corpus: str) -> list[Path]:
    """The token files of a corpus; empty if it is text.

    Raises:
        ChorusError: a folder contains both token files and other files.
    """
    path = locate(corpus)
    if path.is_file():
        return [path] if path.suffix in SUFFIXES else []
    if not path.is_dir():
        return []
    files = [file for file in walk(path, Notes()) if file.is_file()]
    tokens = [file for file in files if file.suffix in SUFFIXES]
    if tokens and (other := [file for file in files if file.suffix not in SUFFIXES]):
        raise ChorusError(
            f"the folder {corpus} contains token files ({tokens[0].name}) and other files ({other[0].name}). "
            "Use a folder of one kind."
        )
    return tokens


@dataclass(frozen=True)
class _Span:
    file: int
    start: int
    stop: int


def tokenised(
    files: list[Path], tokenizer: TextTokenizer, *, max_bytes: int | None, seed: int, fractions: dict[str, float]
) -> Tokenised:
    """Survey, sample and split a corpus of tokens, as `train.corpus` does with text. Exact duplicates of documents are dropped.

    Raises:
        ChorusError: a file is not a token file, its tokens are not this tokenizer's, or it contains too few documents.
    """
    arrays = [_open(path, tokenizer.vocab_size) for path in files]
    spans: list[_Span] = []
    outlines: list[Outline] = []
    seen: set[bytes] = set()
    for idx, (path, array) in enumerate(zip(files, arrays, strict=True)):
        for start, stop in _document_spans(path, array, tokenizer):
            digest = hashlib.sha256(array[start:stop].astype(np.uint32).tobytes()).digest()
            if digest not in seen:
                seen.add(digest)
                size = stop - start
                outlines.append(
                    Outline(
                        idx=len(spans), num_bytes=size * array.itemsize, num_characters=size * _CHARACTERS_PER_TOKEN
                    )
                )
                spans.append(_Span(idx, start, stop))
    sampled = sample_outlines(outlines, max_bytes=max_bytes, seed=seed)
    splits = split_outlines(sampled, capped(fractions, sum(outline.num_characters for outline in sampled)))

    def read(outline: Outline) -> NDArray[np.uint32]:
        span = spans[outline.idx]
        return tokenizer.add_markers(arrays[span.file][span.start : span.stop])

    num_markers = len(tokenizer.add_markers(np.zeros(0, dtype=np.uint32)))
    lengths = {
        split: np.asarray([o.num_characters // _CHARACTERS_PER_TOKEN + num_markers for o in outlines], dtype=np.int64)
        for split, outlines in splits.items()
    }
    return Tokenised(
        train=lambda: map(read, splits["train"]),
        lengths=lengths,
        heldout={split: list(map(read, outlines)) for split, outlines in splits.items() if split != "train"},
    )


def _open(path: Path, vocab_size: int) -> NDArray[np.integer]:
    """Memory-map a file as a one-dimensional array of integers."""
    try:
        if path.suffix == ".npy":
            array: NDArray[np.integer] = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            header = np.fromfile(path, dtype=np.int32, count=1)
            offset = _HEADER_BYTES if header.size and header[0] == _HEADER_MAGIC else 0
            array = np.memmap(path, dtype=np.uint16 if vocab_size <= 1 << 16 else np.uint32, mode="r", offset=offset)
    except (OSError, ValueError) as error:
        raise ChorusError(
            f"{path} cannot be read as tokens ({error}). Expected a .npy or .bin file of token ids."
        ) from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ChorusError(
            f"{path} contains {array.dtype} of shape {array.shape}; expected a one-dimensional array of integer token ids."
        )
    return array


def _document_spans(path: Path, array: NDArray[np.integer], tokenizer: TextTokenizer) -> Iterator[tuple[int, int]]:
    """(start, stop) of every document, without its markers."""
    markers = [marker for marker in (tokenizer.bos, tokenizer.eos) if marker is not None]
    if not markers:
        raise ChorusError(
            f"the tokenizer has no bos or eos token, so {path} cannot be cut into documents. Use a text corpus instead."
        )
    begin = 0
    for start in range(0, len(array), _CHUNK_TOKENS):
        part = np.asarray(array[start : start + _CHUNK_TOKENS])
        if (largest := int(part.max())) >= tokenizer.vocab_size or int(part.min()) < 0:
            wrong = largest if largest >= tokenizer.vocab_size else int(part.min())
            raise ChorusError(
                f"{path} contains the token {wrong}; the tokenizer has {tokenizer.vocab_size:,} tokens. "
                "Use the --tokenizer that made it."
            )
        for position in np.flatnonzero(np.isin(part, markers)) + start:
            if position > begin:
                yield begin, int(position)
            begin = int(position) + 1
    if begin == 0:
        raise ChorusError(
            f"{path} contains no marker between documents (token {' or '.join(map(str, markers))}), so it cannot be split by whole "
            "documents. Add one after each document, or use a text corpus."
        )
    if begin < len(array):
        yield begin, len(array)
