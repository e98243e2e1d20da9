"""A corpus as the tokens that a population's members see: texts between marks, or conversations through the chat template."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from chorus.population.corpus import Document, read_documents
from chorus.population.manifest import Population
from chorus.population.tokens import TextTokenizer
from chorus.prior.conversations import Chat, holds_conversations, load_tokenizer, read_conversations

Marks = Literal["tokenizer", "both", "none"]
"""Around a text: what the tokenizer adds by itself, its bos and eos, or nothing."""
Encode = Callable[[Document], tuple[list[int], list[bool] | None]]
"""A document as token ids, and which of them are scored; all but the first where that is None."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How corpora are read for the population in a directory."""

    directory: Path
    marks: Marks
    text_field: str = "text"
    """See `population.corpus.read_documents`."""

    @classmethod
    def of(
        cls, population: Population, directory: Path, marks: Marks | None = None, *, text_field: str = "text"
    ) -> Self:
        """With the marks that the members know, unless others are given.

        Members that `chorus train` made have learned documents between bos and eos. Of other checkpoints only the tokenizer shows
        what stood around a text: `<|im_start|>` may be its bos, and yet no document began with it.
        """
        is_trained = any(member.trajectory is not None for member in population.members)
        marks = marks or ("both" if is_trained else "tokenizer")
        return cls(directory=directory, marks=marks, text_field=text_field)

    def open(self, source: str, *, split_on: str | None) -> tuple[Iterator[Document], Encode]:
        """The documents of a corpus, and what makes each of them tokens.

        Raises:
            ChorusError: the corpus cannot be read (see `population.corpus.read_documents`), or the tokenizer.
        """
        if holds_conversations(Path(source)):
            return read_conversations(Path(source)), Chat(self.directory).encode
        tokenizer = TextTokenizer.load(self.directory)
        if self.marks != "both":
            tokenizer = tokenizer.between(*(([], []) if self.marks == "none" else _own_marks(self.directory)))
        return read_documents(source, split_on=split_on, text_field=self.text_field), lambda document: (
            tokenizer.encode_document(document.text),
            None,
        )


def _own_marks(directory: Path) -> tuple[list[int], list[int]]:
    """What `tokenizer(text)` has before and behind the tokens of the text."""
    tokenizer = load_tokenizer(directory)
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    start = next(start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]
