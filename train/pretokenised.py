"""A corpus that is tokens already: memory-mapped, cut into documents at the tokenizer's marks, dealt to splits.

`.npy` holds one row of integers; `.bin` holds them bare, as nanoGPT writes them (uint16 where the vocabulary allows it, else
uint32), or behind the header of llm.c and modded-nanogpt. What is held in memory is the outline of each document and the held-out
splits; train documents are read where they lie.
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
_AT_ONCE = 1 << 22  # tokens looked at
_CHARACTERS = 4  # about so many to a token: held-out splits of text and of tokens stop at about the same size
_HEADER_MAGIC, _HEADER_BYTES = 20240520, 1024


def token_files(corpus: str) -> list[Path]:
    """The files of tokens that a corpus is; none where it is text.

    Raises:
        ChorusError: a folder holds tokens and other things.
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
            f"the folder {corpus} holds tokens ({tokens[0].name}) and other files ({other[0].name}). Give a folder of the one kind."
        )
    return tokens


@dataclass(frozen=True)
class _Place:
    file: int
    start: int
    stop: int


def tokenised(
    files: list[Path], tokenizer: TextTokenizer, *, max_bytes: int | None, seed: int, fractions: dict[str, float]
) -> Tokenised:
    """Survey, sample and deal such a corpus, as `train.corpus` does with text; exact copies of documents are dropped.

    Raises:
        ChorusError: a file is not of that kind, its tokens are not this tokenizer's, or it holds too few documents.
    """
    arrays = [_open(path, tokenizer.vocab_size) for path in files]
    places: list[_Place] = []
    outlines: list[Outline] = []
    seen: set[bytes] = set()
    for idx, (path, array) in enumerate(zip(files, arrays, strict=True)):
        for start, stop in _cuts(path, array, tokenizer):
            digest = hashlib.sha256(array[start:stop].astype(np.uint32).tobytes()).digest()
            if digest not in seen:
                seen.add(digest)
                size = stop - start
                outlines.append(
                    Outline(idx=len(places), num_bytes=size * array.itemsize, num_characters=size * _CHARACTERS)
                )
                places.append(_Place(idx, start, stop))
    sampled = sample_outlines(outlines, max_bytes=max_bytes, seed=seed)
    splits = split_outlines(sampled, capped(fractions, sum(outline.num_characters for outline in sampled)))

    def read(outline: Outline) -> NDArray[np.uint32]:
        place = places[outline.idx]
        return tokenizer.between_marks(arrays[place.file][place.start : place.stop])

    marks = len(tokenizer.between_marks(np.zeros(0, dtype=np.uint32)))
    lengths = {
        split: np.asarray([o.num_characters // _CHARACTERS + marks for o in held], dtype=np.int64)
        for split, held in splits.items()
    }
    return Tokenised(
        train=lambda: map(read, splits["train"]),
        lengths=lengths,
        heldout={split: list(map(read, held)) for split, held in splits.items() if split != "train"},
    )


def _open(path: Path, vocab_size: int) -> NDArray[np.integer]:
    """The file as one row of integers, mapped."""
    try:
        if path.suffix == ".npy":
            array: NDArray[np.integer] = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            header = np.fromfile(path, dtype=np.int32, count=1)
            offset = _HEADER_BYTES if header.size and header[0] == _HEADER_MAGIC else 0
            array = np.memmap(path, dtype=np.uint16 if vocab_size <= 1 << 16 else np.uint32, mode="r", offset=offset)
    except (OSError, ValueError) as error:
        raise ChorusError(
            f"{path} cannot be read as tokens ({error}). A .npy or .bin file of token ids is expected."
        ) from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ChorusError(
            f"{path} holds {array.dtype} in the shape {array.shape}; one row of integers, the token ids, is expected."
        )
    return array


def _cuts(path: Path, array: NDArray[np.integer], tokenizer: TextTokenizer) -> Iterator[tuple[int, int]]:
    """(start, stop) of every document without its marks."""
    marks = [mark for mark in (tokenizer.bos, tokenizer.eos) if mark is not None]
    if not marks:
        raise ChorusError(
            f"the tokenizer names no bos or eos token, at which {path} could be cut into documents. Give text."
        )
    begin = 0
    for start in range(0, len(array), _AT_ONCE):
        part = np.asarray(array[start : start + _AT_ONCE])
        if (largest := int(part.max())) >= tokenizer.vocab_size or int(part.min()) < 0:
            wrong = largest if largest >= tokenizer.vocab_size else int(part.min())
            raise ChorusError(
                f"{path} holds the token {wrong}; the tokenizer has {tokenizer.vocab_size:,}. Give the --tokenizer that made it."
            )
        for mark in np.flatnonzero(np.isin(part, marks)) + start:
            if mark > begin:
                yield begin, int(mark)
            begin = int(mark) + 1
    if begin == 0:
        raise ChorusError(
            f"{path} holds no mark between documents (token {' or '.join(map(str, marks))}), so it cannot be dealt to splits by "
            "whole documents. Write one behind each document, or give text."
        )
    if begin < len(array):
        yield begin, len(array)
