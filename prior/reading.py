"""Tokenizes a corpus for a population: plain texts between marker tokens, or conversations through the chat template."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from chorus.population.corpus import Document, read_documents
from chorus.population.manifest import Population
from chorus.population.tokens import TextTokenizer
from chorus.prior.conversations import Chat, holds_conversations, load_tokenizer, read_conversations

Marks = Literal["tokenizer", "both", "none"]
"""Tokens around each text: what the tokenizer adds by default, its bos and eos, or none."""
Encode = Callable[[Document], tuple[list[int], list[bool] | None]]
"""Converts a document to token ids and a mask of scored tokens; None: all but the first."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads corpora for the population in a directory."""

    directory: Path
    marks: Marks
    text_field: str = "text"
    """See `population.corpus.read_documents`."""

    @classmethod
    def of(
        cls, population: Population, directory: Path, marks: Marks | None = None, *, text_field: str = "text"
    ) -> Self:
        """A reader with the marks that the members were trained with, unless `marks` are given.

        Members from `chorus train` learned documents between bos and eos. For other checkpoints, only the tokenizer's defaults show
        what surrounded a text: the bos may be `<|im_start|>`, which never started a document.
        """
        is_trained = any(member.trajectory is not None for member in population.members)
        marks = marks or ("both" if is_trained else "tokenizer")
        return cls(directory=directory, marks=marks, text_field=text_field)

    def open(self, source: str, *, split_on: str | None) -> tuple[Iterator[Document], Encode]:
        """The documents of a corpus, and a function that tokenizes one.

        Raises:
            ChorusError: the corpus (see `population.corpus.read_documents`) or the tokenizer cannot be read.
        """
        if holds_conversations(Path(source)):
            return read_conversations(Path(source)), Chat(self.directory).encode
        tokenizer = TextTokenizer.load(self.directory)
        if self.marks != "both":
            tokenizer = tokenizer.with_markers(*(([], []) if self.marks == "none" else _default_marks(self.directory)))
        return read_documents(source, split_on=split_on, text_field=self.text_field), lambda document: (
            tokenizer.encode_document(document.text),
            None,
        )


def _default_marks(directory: Path) -> tuple[list[int], list[int]]:
    """The tokens that `tokenizer(text)` adds before and after the text."""
    tokenizer = load_tokenizer(directory)
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    start = next(start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]
