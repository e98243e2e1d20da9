"""Text to tokens and back, the same for every stage; and held-out documents as tokens.

A document becomes `bos + tokens + eos`, with the marks that the tokenizer has (a tokenizer whose bos and eos are one token gets
it once, in front: the next document's start then marks the end), or what else is put around it. Held-out losses are defined on
*windows* of these tokens, which an engine can score by echoing them: see `TokenSplit.windows`.
"""

import json
import re
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from chorus.population.errors import ChorusError
from chorus.population.files import replacing

SPLITS_DIRECTORY = "splits"


class TextTokenizer:
    """The tokenizer of a population or of a checkpoint, with its begin and end marks."""

    def __init__(self, tokenizer: Tokenizer, *, bos: int | None, eos: int | None) -> None:
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # what documents spell is text: marks come from here alone
        self._special = {
            idx: token.content for idx, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self.bos = bos
        self.eos = eos
        self._marks = ([] if bos is None else [bos], [] if eos is None or eos == bos else [eos])
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read `tokenizer.json` and the marks named in `tokenizer_config.json`.

        Raises:
            ChorusError: there is no fast tokenizer in the directory.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ChorusError(f"{directory} has no tokenizer.json: a fast Hugging Face tokenizer is expected.")
        tokenizer = Tokenizer.from_file(str(path))
        config_path = directory / "tokenizer_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}

        def token_id(key: str) -> int | None:
            token = config.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            return None if token is None else tokenizer.token_to_id(token)

        return cls(tokenizer, bos=token_id("bos_token"), eos=token_id("eos_token"))

    @property
    def highest_id(self) -> int:
        """The largest token id; `vocab_size` - 1 where ids have no gaps."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode_document(self, text: str) -> list[int]:
        """Token ids of a whole document between its marks. Text that spells a mark is text."""
        front, back = self._marks
        return front + self._plain(text) + back

    def _plain(self, text: str) -> list[int]:
        ids = self._encode(text)
        spelt = [mark for idx in self._special.keys() & set(ids) if (mark := self._special[idx]) in text]
        if not spelt:
            return ids
        # Unigram models, and BPE that crosses words, may hold a mark as a piece of their own: it is encoded in two halves then.
        halves = re.compile("|".join(f"(?<={re.escape(mark[0])})(?={re.escape(mark[1:])})" for mark in spelt))
        return [idx for part in halves.split(text) for idx in self._encode(part)]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def between_marks(self, ids: NDArray[np.integer]) -> NDArray[np.uint32]:
        """Token ids of a whole document, of which the text is encoded already, between its marks."""
        front, back = self._marks
        return np.concatenate([front, ids, back]).astype(np.uint32)

    def between(self, front: list[int], back: list[int]) -> Self:
        """The same tokenizer with these tokens around each document."""
        other = copy(self)
        other._marks = (front, back)
        return other


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """Documents as tokens, one after the other."""

    tokens: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    """Document d is tokens[offsets[d] : offsets[d + 1]]."""

    @classmethod
    def from_documents(cls, documents: Iterable[Sequence[int] | NDArray[np.uint32]]) -> Self:
        """Concatenate token ids, document by document."""
        arrays = [np.asarray(ids, dtype=np.uint32) for ids in documents]
        lengths = [len(array) for array in arrays]
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.uint32)
        return cls(tokens=tokens, offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def document(self, idx: int) -> NDArray[np.uint32]:
        """Tokens of one document."""
        return self.tokens[self.offsets[idx] : self.offsets[idx + 1]]

    def windows(self, length: int) -> list[tuple[int, int, int]]:
        """(document, start, stop) of every window of at most `length` tokens, positions counted in `tokens`.

        A window scores all its tokens but the first, which only serves as context; the next window begins with the last token
        of this one. So every token of a document but its first is scored exactly once, and a window is a prompt that an engine
        with that context length can echo. Documents of one token have nothing to score.
        """
        found = []
        for idx in range(self.num_documents):
            first, last = int(self.offsets[idx]), int(self.offsets[idx + 1]) - 1
            found += [(idx, start, min(start + length, last + 1)) for start in range(first, last, length - 1)]
        return found

    def save(self, path: Path) -> None:
        """Write both arrays to an `.npz` file, atomically."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, tokens=self.tokens, offsets=self.offsets)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ChorusError: the file is missing or is not such a file.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(tokens=arrays["tokens"], offsets=arrays["offsets"])
        except FileNotFoundError:
            raise ChorusError(
                f"{path} is missing: this population has no such held-out split. Give text with --corpus."
            ) from None
        except (ValueError, KeyError, OSError) as error:
            raise ChorusError(
                f"{path} is not a split of tokens ({error}). Restore it or make the population again."
            ) from None


def split_path(population_directory: Path, split: str) -> Path:
    """Where a population keeps the tokens of a held-out split."""
    return population_directory / SPLITS_DIRECTORY / f"{split}.npz"
