"""Encodes documents as tokens, the same way in every stage, and stores held-out splits as tokens.

A document becomes `bos + tokens + eos`, with the marker tokens that the tokenizer has, or with those set by `with_markers`. If
bos and eos are the same token, it is added only in front: the start of the next document then marks the end. Held-out losses are
defined on *windows* of these tokens, which an engine can score by echoing them: see `TokenSplit.windows`.
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
    """The tokenizer of a population or checkpoint, with its marker tokens bos and eos."""

    def __init__(self, tokenizer: Tokenizer, *, bos: int | None, eos: int | None) -> None:
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = (
            True  # a marker spelled out in a document is plain text; only this class adds markers
        )
        self._special = {
            idx: token.content for idx, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self.bos = bos
        self.eos = eos
        self._markers = ([] if bos is None else [bos], [] if eos is None or eos == bos else [eos])
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read `tokenizer.json`, and the bos and eos named in `tokenizer_config.json`.

        Raises:
            ChorusError: there is no fast tokenizer in the directory.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ChorusError(f"{directory} has no tokenizer.json: expected a fast Hugging Face tokenizer.")
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
        """The largest token id; `vocab_size` - 1 if ids have no gaps."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode_document(self, text: str) -> list[int]:
        """Token ids of a whole document between its marker tokens. A marker spelled out in the text is encoded as text."""
        front, back = self._markers
        return front + self._plain(text) + back

    def _plain(self, text: str) -> list[int]:
        ids = self._encode(text)
        spelled = [marker for idx in self._special.keys() & set(ids) if (marker := self._special[idx]) in text]
        if not spelled:
            return ids
        # Unigram models, and BPE that merges across words, may have the marker in their vocabulary: encode it in two halves.
        halves = re.compile("|".join(f"(?<={re.escape(marker[0])})(?={re.escape(marker[1:])})" for marker in spelled))
        return [idx for part in halves.split(text) for idx in self._encode(part)]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def add_markers(self, ids: NDArray[np.integer]) -> NDArray[np.uint32]:
        """Put marker tokens around the token ids of a document."""
        front, back = self._markers
        return np.concatenate([front, ids, back]).astype(np.uint32)

    def with_markers(self, front: list[int], back: list[int]) -> Self:
        """A copy of this tokenizer with these marker tokens around each document."""
        other = copy(self)
        other._markers = (front, back)
        return other


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """Documents as one array of tokens."""

    tokens: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    """Document d is tokens[offsets[d] : offsets[d + 1]]."""

    @classmethod
    def from_documents(cls, documents: Iterable[Sequence[int] | NDArray[np.uint32]]) -> Self:
        """Concatenate the token ids of documents."""
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
        """(document, start, stop) of every window of at most `length` tokens; positions index `tokens`.

        A window scores all its tokens except the first, which is only context. The next window starts with the last token of
        this one. So every token of a document except its first is scored exactly once, and a window is a prompt that an engine
        of that context length can echo. A document of one token has nothing to score.
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
            ChorusError: the file is missing or was not written by `save`.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(tokens=arrays["tokens"], offsets=arrays["offsets"])
        except FileNotFoundError:
            raise ChorusError(
                f"{path} is missing: this population has no such held-out split. Provide text with --corpus."
            ) from None
        except (ValueError, KeyError, OSError) as error:
            raise ChorusError(
                f"{path} is not a split of tokens ({error}). Restore it, or make the population again."
            ) from None


def split_path(population_directory: Path, split: str) -> Path:
    """The file with the tokens of a held-out split."""
    return population_directory / SPLITS_DIRECTORY / f"{split}.npz"
