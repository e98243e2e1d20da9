"""The held-out text that a prior is fitted on: the population's own splits, or any corpus dealt by whole documents.

Three parts, and what each is for: `fitness` and `selection` fit weights and choose members (each judges what the other has
fitted), and `test` does neither: its losses are what is reported.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chorus.population.corpus import Document, read_documents, sample_documents, split_documents
from chorus.population.errors import ChorusError
from chorus.population.tokens import TextTokenizer, TokenSplit, split_path

HELD_OUT = ("fitness", "selection", "test")


@dataclass(frozen=True, kw_only=True)
class ScoredSplit:
    """Documents as tokens, and the windows in which they are scored."""

    name: str
    split: TokenSplit = field(repr=False)
    context_length: int

    def __post_init__(self) -> None:
        if self.num_scored == 0:
            raise ChorusError(
                f"the {self.name} split holds no document of at least two tokens: there is nothing to score. Give more text."
            )

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(D + 1): document d's scored tokens are offsets[d] : offsets[d + 1] of the split's scored tokens."""
        lengths_D = np.maximum(np.diff(self.split.offsets) - 1, 0)
        return np.concatenate([[0], np.cumsum(lengths_D)]).astype(np.int64)

    @property
    def num_scored(self) -> int:
        """Tokens with a probability: all but the first of every document."""
        return int(self.offsets[-1])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that a likelihood depends on besides the member: tokens, document boundaries, length of a window."""
        found = hashlib.sha256(f"windows of {self.context_length}\n".encode())
        found.update(np.ascontiguousarray(self.split.tokens, dtype="<u4").tobytes())
        found.update(np.ascontiguousarray(self.split.offsets, dtype="<i8").tobytes())
        return found.hexdigest()


def own_splits(directory: Path, *, context_length: int, vocab_size: int) -> dict[str, ScoredSplit]:
    """The splits that training kept apart in the population directory.

    Raises:
        ChorusError: one is missing or damaged, or holds tokens beyond the vocabulary.
    """
    loaded = {name: TokenSplit.load(split_path(directory, name)) for name in HELD_OUT}
    return _scored(loaded, context_length, vocab_size)


def corpus_splits(
    source: str,
    tokenizer: TextTokenizer,
    *,
    context_length: int,
    vocab_size: int,
    max_bytes: int,
    split_on: str | None,
    text_field: str = "text",
) -> dict[str, ScoredSplit]:
    """A corpus (see `population.corpus.read_documents`) in three equal parts of whole, distinct documents.

    The order is seeded, so that the same corpus gives the same splits on every run.

    Raises:
        ChorusError: the corpus cannot be read, is empty, or has too few documents.
    """
    documents = _sampled(source, max_bytes, split_on, text_field)
    dealt = split_documents(documents, dict.fromkeys(HELD_OUT, 1 / len(HELD_OUT)))
    tokens = {
        name: TokenSplit.from_documents([tokenizer.encode_document(d.text) for d in held])
        for name, held in dealt.items()
    }
    return _scored(tokens, context_length, vocab_size)


def whole_corpus(
    source: str,
    tokenizer: TextTokenizer,
    *,
    context_length: int,
    vocab_size: int,
    max_bytes: int,
    split_on: str | None,
    text_field: str = "text",
) -> ScoredSplit:
    """All of a corpus as one split, in the same order as `corpus_splits`."""
    documents = _sampled(source, max_bytes, split_on, text_field)
    split = TokenSplit.from_documents([tokenizer.encode_document(d.text) for d in documents])
    return _scored({"corpus": split}, context_length, vocab_size)["corpus"]


def _sampled(source: str, max_bytes: int, split_on: str | None, text_field: str) -> list[Document]:
    documents = list(read_documents(source, split_on=split_on, text_field=text_field))
    if not documents:
        raise ChorusError(f"the corpus {source!r} is empty: no document holds any text.")
    if not (sampled := sample_documents(documents, max_bytes=max_bytes, seed=0)):
        smallest = min(len(document.text.encode()) for document in documents)
        raise ChorusError(
            f"no document of corpus {source!r} fits into --max-bytes {max_bytes}; the smallest has {smallest:,} bytes. "
            "Raise --max-bytes, or cut documents with --split-on."
        )
    return sampled


def _scored(splits: dict[str, TokenSplit], context_length: int, vocab_size: int) -> dict[str, ScoredSplit]:
    for name, split in splits.items():
        if split.tokens.size and (largest := int(split.tokens.max())) >= vocab_size:
            raise ChorusError(
                f"the {name} split holds token {largest}, the population's vocabulary has {vocab_size} tokens: "
                "it was made with another tokenizer. Make it again, or give text with --corpus."
            )
    return {name: ScoredSplit(name=name, split=split, context_length=context_length) for name, split in splits.items()}
