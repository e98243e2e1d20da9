"""The held-out text that a prior is fitted on: the population's own splits, or any corpus dealt by whole documents.

Three parts, and what each is for: `fitness` and `selection` fit weights and choose members (each judges what the other has
fitted), and `test` does neither: its losses are what is reported.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chorus.population.corpus import Document, sample_documents, split_documents
from chorus.population.errors import ChorusError
from chorus.population.tokens import TokenSplit, split_path
from chorus.prior.reading import Encode, Reader

HELD_OUT = ("fitness", "selection", "test")


@dataclass(frozen=True, kw_only=True)
class ScoredSplit:
    """Documents as tokens, and the windows in which they are scored."""

    name: str
    split: TokenSplit = field(repr=False)
    context_length: int
    is_scored: NDArray[np.bool_] | None = field(default=None, repr=False)
    """Of every token; all where None. A document's first token is not scored in any case: nothing stands before it."""

    def __post_init__(self) -> None:
        if self.num_scored == 0:
            raise ChorusError(
                f"the {self.name} split holds no document of at least two tokens: there is nothing to score. Give more text."
            )

    @cached_property
    def columns(self) -> NDArray[np.int64]:
        """Of every token, which of the scored ones it is; -1 where it is none."""
        scored = np.ones(len(self.split.tokens), dtype=bool) if self.is_scored is None else self.is_scored.copy()
        firsts = self.split.offsets[:-1]
        scored[firsts[firsts < self.split.offsets[1:]]] = False
        return np.where(scored, np.cumsum(scored) - 1, -1)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(D + 1): document d's scored tokens are offsets[d] : offsets[d + 1] of the split's scored tokens."""
        scored_before = np.concatenate([[0], np.cumsum(self.columns >= 0)])
        return np.asarray(scored_before[self.split.offsets], dtype=np.int64)

    @property
    def num_scored(self) -> int:
        """Tokens with a probability: all but the first of every document, or the answers of conversations."""
        return int(self.offsets[-1])

    @cached_property
    def windows(self) -> list[tuple[int, int]]:
        """(start, stop) of every window that scores something; see `TokenSplit.windows`."""
        found = self.split.windows(self.context_length)
        return [(start, stop) for _, start, stop in found if (self.columns[start + 1 : stop] >= 0).any()]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that a likelihood depends on besides the member: tokens, documents, length of a window, what is scored."""
        found = hashlib.sha256(f"windows of {self.context_length}\n".encode())
        found.update(np.ascontiguousarray(self.split.tokens, dtype="<u4").tobytes())
        found.update(np.ascontiguousarray(self.split.offsets, dtype="<i8").tobytes())
        if self.is_scored is not None:
            found.update(self.is_scored.tobytes())
        return found.hexdigest()


def own_splits(directory: Path, *, context_length: int, vocab_size: int) -> dict[str, ScoredSplit]:
    """The splits that training kept apart in the population directory.

    Raises:
        ChorusError: one is missing or damaged, or holds tokens beyond the vocabulary.
    """
    loaded = {name: TokenSplit.load(split_path(directory, name)) for name in HELD_OUT}
    return {name: _scored(name, split, context_length, vocab_size) for name, split in loaded.items()}


def corpus_splits(
    source: str, reader: Reader, *, context_length: int, vocab_size: int, max_bytes: int, split_on: str | None
) -> dict[str, ScoredSplit]:
    """A corpus (see `Reader.open`) in three equal parts of whole, distinct documents.

    The order is seeded, so that the same corpus gives the same splits on every run.

    Raises:
        ChorusError: the corpus cannot be read, is empty, or has too few documents.
    """
    documents, encode = _sampled(source, reader, max_bytes, split_on)
    dealt = split_documents(documents, dict.fromkeys(HELD_OUT, 1 / len(HELD_OUT)))
    return {name: _encoded(name, held, encode, context_length, vocab_size) for name, held in dealt.items()}


def whole_corpus(
    source: str, reader: Reader, *, context_length: int, vocab_size: int, max_bytes: int, split_on: str | None
) -> ScoredSplit:
    """All of a corpus as one split, in the same order as `corpus_splits`."""
    documents, encode = _sampled(source, reader, max_bytes, split_on)
    return _encoded("corpus", documents, encode, context_length, vocab_size)


def _sampled(source: str, reader: Reader, max_bytes: int, split_on: str | None) -> tuple[list[Document], Encode]:
    found, encode = reader.open(source, split_on=split_on)
    documents = list(found)
    if not documents:
        raise ChorusError(f"the corpus {source!r} is empty: no document holds any text.")
    if not (sampled := sample_documents(documents, max_bytes=max_bytes, seed=0)):
        smallest = min(len(document.text.encode()) for document in documents)
        raise ChorusError(
            f"no document of corpus {source!r} fits into --max-bytes {max_bytes}; the smallest has {smallest:,} bytes. "
            "Raise --max-bytes, or cut documents with --split-on."
        )
    return sampled, encode


def _encoded(
    name: str, documents: Sequence[Document], encode: Encode, context_length: int, vocab_size: int
) -> ScoredSplit:
    encoded = [encode(document) for document in documents]
    split = TokenSplit.from_documents([ids for ids, _ in encoded])
    masks = [mask for _, mask in encoded if mask is not None]
    is_scored = np.concatenate(masks).astype(bool) if masks else None
    return _scored(name, split, context_length, vocab_size, is_scored)


def _scored(
    name: str, split: TokenSplit, context_length: int, vocab_size: int, is_scored: NDArray[np.bool_] | None = None
) -> ScoredSplit:
    if split.tokens.size and (largest := int(split.tokens.max())) >= vocab_size:
        raise ChorusError(
            f"the {name} split holds token {largest}, the population's vocabulary has {vocab_size} tokens: "
            "it was made with another tokenizer. Make it again, or give text with --corpus."
        )
    return ScoredSplit(name=name, split=split, context_length=context_length, is_scored=is_scored)
