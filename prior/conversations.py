"""Conversations as held-out text: rendered by the chat template as a server does, with only the assistant's answers scored.

A conversation is a row of JSON lines with `messages`, and optionally `tools`. It becomes one document. The tokens of each answer,
up to and including its end token, are scored given everything before them. All other text is context, and so is an answer that
the template renders differently once more turns follow (for example without its reasoning).
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
    """Whether `source` is a JSON lines file whose first row has `messages` and no `text`."""
    if source.suffix.lower() not in JSON_LINES or not source.is_file():
        return False
    first = next(json_objects(source), {})
    return "messages" in first and "text" not in first


def read_conversations(source: Path) -> Iterator[Document]:
    """Yield each conversation as a document whose text is its JSON.

    Raises:
        ChorusError: a row is not a conversation.
    """
    for number, row in enumerate(json_objects(source), start=1):
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise ChorusError(
                f"{source}, row {number}: `messages` is not a list of messages, each with a `role` and `content`."
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
        """Token ids, and whether each is scored.

        Raises:
            ChorusError: there is no chat template, or it cannot render this conversation.
        """
        ids: list[int] = []
        is_scored: list[bool] = []
        try:
            for text, is_answer in self._segments(**json.loads(conversation.text)):
                segment_ids = self._tokenizer(text, add_special_tokens=False).input_ids
                ids += segment_ids
                is_scored += [is_answer] * self._scored_length(segment_ids)
                is_scored += [False] * (len(ids) - len(is_scored))
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise ChorusError(
                f"{conversation.name} cannot be rendered by the chat template of {self.directory} ({error}). Leave the "
                "conversation out, or use a population whose template can render it."
            ) from None
        return ids, is_scored

    def _segments(self, messages: Messages, tools: list[JsonValue] | None = None) -> Iterator[tuple[str, bool]]:
        """The rendered text up to the last answer, in segments, and whether each is an answer.

        Segments are tokenized separately because a server tokenizes the prompt before there is an answer.
        """
        whole = self._render(messages, tools)
        done = 0
        for idx, message in enumerate(messages):
            if message["role"] != "assistant" or all(before["role"] != "user" for before in messages[:idx]):
                continue
            prompt = self._render(messages[:idx], tools, add_generation_prompt=True)
            with_answer = self._render(messages[: idx + 1], tools)
            if (
                done < len(prompt) < len(with_answer)
                and with_answer.startswith(prompt)
                and whole.startswith(with_answer)
            ):
                yield whole[done : len(prompt)], False
                yield whole[len(prompt) : len(with_answer)], True
                done = len(with_answer)

    def _scored_length(self, answer: list[int]) -> int:
        """Tokens of an answer up to its last end token. A newline that the template adds after that is never generated."""
        ends = [idx for idx, token in enumerate(answer) if token in self._end_token_ids]
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
                f"{self.directory} has no chat template to render conversations with. Add one as chat_template.jinja, or "
                "use a corpus of plain text."
            )
        return tokenizer

    @cached_property
    def _end_token_ids(self) -> frozenset[int]:
        return frozenset(end_tokens(self.directory, read_config(self.directory)))


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer as Transformers, and therefore a server, loads it.

    Raises:
        ChorusError: its files cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ChorusError(f"the tokenizer of {directory} cannot be loaded ({error}). Restore its files.") from None
