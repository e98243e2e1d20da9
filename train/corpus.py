"""Splits and tokenises a corpus in bounded memory. It is surveyed once, then read again whenever its text is needed.

Memory holds an outline of each document, and the tokens of the held-out splits, whose size is capped; train tokens go through a
file. A corpus of at most `_MAX_CACHED_BYTES` is kept in memory, so that nothing is read (or downloaded) twice.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import NDArray

from chorus.population.corpus import Document, Outline, sample_outlines, split_outlines, survey_documents
from chorus.population.errors import ChorusError
from chorus.population.tokens import TextTokenizer, TokenSplit
from chorus.train.data import TrainTokens

_MAX_CACHED_BYTES = 64 << 20
HELD_OUT_CHARACTERS = 20_000_000  # per held-out split: about five million tokens, far more than a prior needs
_TOKENIZER_CHARACTERS = 500_000_000  # training text of a tokenizer


class Corpus:
    """Documents that can be read several times."""

    def __init__(self, read: Callable[[], Iterator[Document]]) -> None:
        self._read = read
        self._cached: list[Document] | None = None
        self.num_empty = 0
        """Documents without text, which are skipped; counted by `survey`."""

    def survey(self) -> list[Outline]:
        """Outlines of the distinct documents."""
        return list(survey_documents(self._read_and_cache()))

    def documents(self) -> Iterator[Document]:
        """All documents with text, in the same order every time."""
        return iter(self._cached) if self._cached is not None else filter(_has_text, self._read())

    def _read_and_cache(self) -> Iterator[Document]:
        cached: list[Document] | None = []
        num_bytes = self.num_empty = 0
        for document in self._read():
            if not _has_text(document):
                self.num_empty += 1
                continue
            num_bytes += len(document.text.encode())
            if num_bytes > _MAX_CACHED_BYTES:
                cached = None
            if cached is not None:
                cached.append(document)
            yield document
        self._cached = cached


@dataclass(frozen=True)
class SplitCorpus:
    """A corpus with a sample of its documents assigned to splits."""

    corpus: Corpus
    splits: dict[str, list[Outline]]

    @classmethod
    def sample(
        cls, corpus: Corpus, *, max_bytes: int | None, seed: int, fractions: dict[str, float], source: str
    ) -> "SplitCorpus":
        """Survey and sample a corpus, and assign the documents to splits. `source` names the corpus in errors.

        Raises:
            ChorusError: the sample or one of the splits is empty.
        """
        sampled = sample_outlines(corpus.survey(), max_bytes=max_bytes, seed=seed)
        if not sampled and max_bytes is not None:
            raise ChorusError(
                f"no document of corpus {source!r} fits in --max-bytes {max_bytes}, or none contains text. "
                "Raise --max-bytes, or check the corpus."
            )
        total = sum(outline.num_characters for outline in sampled)
        return cls(corpus, split_outlines(sampled, capped(fractions, total)))

    def texts(self, split: str, *, characters: int = _TOKENIZER_CHARACTERS) -> Iterator[str]:
        """Texts of a split in reading order, up to about `characters` characters in total."""
        wanted = {outline.idx for outline in self.splits[split]}
        for idx, document in enumerate(self.corpus.documents()):
            if idx in wanted:
                yield document.text
                characters -= len(document.text)
                if characters <= 0:
                    return

    def tokenise(self, tokenizer: TextTokenizer) -> "Tokenised":
        """Encode every sampled document once."""
        file = tempfile.TemporaryFile(prefix="chorus-tokens-")  # noqa: SIM115 - `Tokenised` closes it
        try:
            return self._tokenise(tokenizer, file)
        except BaseException:
            file.close()
            raise

    def _tokenise(self, tokenizer: TextTokenizer, file: IO[bytes]) -> "Tokenised":
        slots = {
            outline.idx: (split, slot, outline)
            for split, outlines in self.splits.items()
            for slot, outline in enumerate(outlines)
        }
        lengths = {split: np.zeros(len(outlines), dtype=np.int64) for split, outlines in self.splits.items()}
        starts = np.zeros(len(self.splits["train"]), dtype=np.int64)
        heldout: dict[str, list[NDArray[np.uint32] | None]]
        heldout = {split: [None] * len(outlines) for split, outlines in self.splits.items() if split != "train"}
        written = 0
        for idx, document in enumerate(self.corpus.documents()):
            if idx not in slots:
                continue
            split, slot, outline = slots[idx]
            if len(document.text) != outline.num_characters:
                raise ChorusError(f"document {document.name} changed while the corpus was read. Run the command again.")
            tokens = np.asarray(tokenizer.encode_document(document.text), dtype=np.uint32)
            lengths[split][slot] = len(tokens)
            if split == "train":
                starts[slot] = written
                file.write(tokens.tobytes())
                written += len(tokens)
            else:
                heldout[split][slot] = tokens
        file.flush()

        def train() -> Iterator[NDArray[np.uint32]]:
            for start, length in zip(starts, lengths["train"], strict=True):
                file.seek(int(start) * 4)
                yield np.frombuffer(file.read(int(length) * 4), dtype=np.uint32)

        complete = {split: [tokens for tokens in arrays if tokens is not None] for split, arrays in heldout.items()}
        return Tokenised(
            train=train, lengths=lengths, heldout=complete, close=file.close, num_empty=self.corpus.num_empty
        )


class Tokenised:
    """The tokens of a split corpus: held-out splits in memory, the train split read on demand."""

    def __init__(
        self,
        *,
        train: Callable[[], Iterator[NDArray[np.uint32]]],
        lengths: dict[str, NDArray[np.int64]],
        heldout: dict[str, list[NDArray[np.uint32]]],
        close: Callable[[], None] = lambda: None,
        num_empty: int = 0,
    ) -> None:
        """`train` yields the documents of the train split in the order of the sample; `close` releases its resources."""
        self._train, self._lengths, self._heldout, self._close = train, lengths, heldout, close
        self.num_empty = num_empty
        """Skipped documents without text."""

    def counts(self) -> dict[str, int]:
        """Tokens of each split."""
        return {split: int(lengths.sum()) for split, lengths in self._lengths.items()}

    def documents(self) -> dict[str, int]:
        """Documents of each split."""
        return {split: len(lengths) for split, lengths in self._lengths.items()}

    def save_train(self, directory: Path) -> None:
        """Write the train split, with documents in the order of the sample."""
        TrainTokens.save(directory, self._lengths["train"], self._train())

    def heldout(self, split: str) -> TokenSplit:
        """A held-out split."""
        return TokenSplit.from_documents(self._heldout[split])

    def __enter__(self) -> "Tokenised":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


def _has_text(document: Document) -> bool:
    return bool(document.text.strip())


def capped(fractions: dict[str, float], total_characters: int) -> dict[str, float]:
    """Limit each held-out split to `HELD_OUT_CHARACTERS`; what this removes goes to the train split."""
    cap = HELD_OUT_CHARACTERS / max(total_characters, 1)
    held_out = {split: min(share, cap) for split, share in fractions.items() if split != "train"}
    if all(held_out[split] == fractions[split] for split in held_out):
        return fractions
    return {"train": 1 - sum(held_out.values()), **held_out}
