"""Conversations as held-out text: rendered by the chat template as a server renders them, scored where the assistant answers.

A conversation is a row of JSON lines with `messages`, and `tools` where the template takes them. It becomes one document. The
tokens of each answer are scored, to the token that ends it, given all that stands before; what users, systems and templates write
is context. A template may render a turn otherwise once others follow (it drops thoughts, say); such a turn is context, too.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from pydantic import JsonValue
from transformers import AutoTokenizer

from chorus.population.checkpoint import end_tokens
from chorus.population.corpus import Document
from chorus.population.errors import ChorusError
from chorus.population.manifest import read_config
from chorus.population.rows import JSON_LINES, json_objects

Messages = list[dict[str, JsonValue]]


def holds_conversations(source: Path) -> bool:
    """Whether this is a file of JSON lines whose first row has `messages` and no `text`."""
    if source.suffix.lower() not in JSON_LINES or not source.is_file():
        return False
    first = next(json_objects(source), {})
    return "messages" in first and "text" not in first


def read_conversations(source: Path) -> Iterator[Document]:
    """Each conversation as a document whose text is its JSON.

    Raises:
        ChorusError: a row is not a conversation.
    """
    for number, row in enumerate(json_objects(source), start=1):
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise ChorusError(
                f"{source}, row {number}: `messages` is not a list of messages, each with a `role` and a `content`."
            )
        kept = {key: row[key] for key in ("messages", "tools") if row.get(key)}
        yield Document(name=f"{source.name}#{number - 1}", text=json.dumps(kept, ensure_ascii=False))


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


@dataclass(frozen=True)
class Chat:
    """The chat template and tokenizer of a population."""

    directory: Path

    def encode(self, conversation: Document) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them are scored.

        Raises:
            ChorusError: there is no template, or it does not take this conversation.
        """
        ids: list[int] = []
        is_scored: list[bool] = []
        try:
            for text, is_answer in self._segments(**json.loads(conversation.text)):
                of_segment = self._tokenizer(text, add_special_tokens=False).input_ids
                ids += of_segment
                is_scored += [is_answer] * self._length(of_segment)
                is_scored += [False] * (len(ids) - len(is_scored))
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise ChorusError(
                f"{conversation.name} cannot be rendered by the chat template of {self.directory} ({error}). Leave that "
                "conversation out, or give a population a template that takes it."
            ) from None
        return ids, is_scored

    def _segments(self, messages: Messages, tools: list[JsonValue] | None = None) -> Iterator[tuple[str, bool]]:
        """The rendered text in pieces, in order, up to the last answer; and whether each is an answer.

        Pieces are made tokens one by one: a server, too, makes a prompt tokens before there is an answer.
        """
        whole = self._render(messages, tools)
        done = 0
        for idx, message in enumerate(messages):
            if message["role"] != "assistant" or all(before["role"] != "user" for before in messages[:idx]):
                continue
            asked = self._render(messages[:idx], tools, add_generation_prompt=True)
            answered = self._render(messages[: idx + 1], tools)
            if done < len(asked) < len(answered) and answered.startswith(asked) and whole.startswith(answered):
                yield whole[done : len(asked)], False
                yield whole[len(asked) : len(answered)], True
                done = len(answered)

    def _length(self, answer: list[int]) -> int:
        """Tokens of an answer to the last that ends it; a template's line end behind that is never generated."""
        ends = [idx for idx, token in enumerate(answer) if token in self._ends]
        return ends[-1] + 1 if ends else len(answer)

    def _render(self, messages: Messages, tools: list[JsonValue] | None, *, add_generation_prompt: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.directory)
        if tokenizer.chat_template is None:
            raise ChorusError(
                f"{self.directory} has no chat template, by which conversations become text. Put one there as "
                "chat_template.jinja, or give a corpus of plain text."
            )
        return tokenizer

    @cached_property
    def _ends(self) -> frozenset[int]:
        return frozenset(end_tokens(self.directory, read_config(self.directory)))


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer as Transformers, and so a server, has it.

    Raises:
        ChorusError: its files cannot be used.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ChorusError(f"the tokenizer of {directory} cannot be loaded ({error}). Restore its files.") from None
