"""The held-out text that a prior is fitted on: the population's own splits, or a corpus split by whole documents.

`fitness` and `selection` are for fitting weights and choosing members (each evaluates what was fitted on the other). `test` is
only for reporting losses.
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
    """Tokenized documents, and the windows in which they are scored."""

    name: str
    split: TokenSplit = field(repr=False)
    context_length: int
    is_scored: NDArray[np.bool_] | None = field(default=None, repr=False)
    """Whether each token is scored; None: all. A document's first token is never scored, since it has no context."""

    def __post_init__(self) -> None:
        if self.num_scored == 0:
            raise ChorusError(
                f"the {self.name} split has nothing to score: no document has a scored token besides its first. Give more text."
            )

    @cached_property
    def columns(self) -> NDArray[np.int64]:
        """For each token, its index among the scored tokens; -1 if it is not scored."""
        scored = np.ones(len(self.split.tokens), dtype=bool) if self.is_scored is None else self.is_scored.copy()
        firsts = self.split.offsets[:-1]
        scored[firsts[firsts < self.split.offsets[1:]]] = False
        return np.where(scored, np.cumsum(scored) - 1, -1)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(D + 1): document d has scored tokens offsets[d] : offsets[d + 1] of the split's scored tokens."""
        scored_before = np.concatenate([[0], np.cumsum(self.columns >= 0)])
        return np.asarray(scored_before[self.split.offsets], dtype=np.int64)

    @property
    def num_scored(self) -> int:
        """Number of scored tokens: all but the first of every document, or those of the answers in conversations."""
        return int(self.offsets[-1])

    @cached_property
    def windows(self) -> list[tuple[int, int]]:
        """(start, stop) of every window with a scored token; see `TokenSplit.windows`."""
        windows = self.split.windows(self.context_length)
        return [(start, stop) for _, start, stop in windows if (self.columns[start + 1 : stop] >= 0).any()]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that a likelihood depends on besides the member: tokens, documents, window length and scored tokens."""
        digest = hashlib.sha256(f"windows of {self.context_length}\n".encode())
        digest.update(np.ascontiguousarray(self.split.tokens, dtype="<u4").tobytes())
        digest.update(np.ascontiguousarray(self.split.offsets, dtype="<i8").tobytes())
        if self.is_scored is not None:
            digest.update(self.is_scored.tobytes())
        return digest.hexdigest()


def own_splits(directory: Path, *, context_length: int, vocab_size: int) -> dict[str, ScoredSplit]:
    """The held-out splits that training saved in the population directory.

    Raises:
        ChorusError: a split is missing or damaged, or has tokens outside the vocabulary.
    """
    loaded = {name: TokenSplit.load(split_path(directory, name)) for name in HELD_OUT}
    return {name: _scored(name, split, context_length, vocab_size) for name, split in loaded.items()}


def corpus_splits(
    source: str, reader: Reader, *, context_length: int, vocab_size: int, max_bytes: int, split_on: str | None
) -> dict[str, ScoredSplit]:
    """A corpus (see `Reader.open`) in three equal splits of whole, distinct documents.

    The order is seeded: the same corpus always gives the same splits.

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
    unsampled, encode = reader.open(source, split_on=split_on)
    documents = list(unsampled)
    if not documents:
        raise ChorusError(f"the corpus {source!r} is empty: no document has any text.")
    if not (sampled := sample_documents(documents, max_bytes=max_bytes, seed=0)):
        smallest = min(len(document.text.encode()) for document in documents)
        raise ChorusError(
            f"no document of corpus {source!r} fits into --max-bytes {max_bytes}; the smallest has {smallest:,} bytes. "
            "Raise --max-bytes, or split documents with --split-on."
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
            f"the {name} split contains token {largest}, but the population's vocabulary has {vocab_size} tokens: "
            "it was made with another tokenizer. Make it again, or give text with --corpus."
        )
    return ScoredSplit(name=name, split=split, context_length=context_length, is_scored=is_scored)
