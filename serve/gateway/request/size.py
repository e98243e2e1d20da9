"""How much work a request asks for, read from its body without a tokenizer, and the engine's final token counts.

A malformed prompt counts as small: the engine refuses it.
"""

from dataclasses import dataclass
from typing import Any

_COMPLETION_DEFAULT_TOKENS = 16
"""OpenAI's default for completions, which the engine follows; a chat may run to the end of the context."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much work a request asks for, by its body."""

    num_sequences: int = 1
    """Answers generated side by side."""
    num_choices: int = 1
    """Answers returned for each prompt (`n`)."""
    num_prompts: int = 1
    prompt_tokens: int = 0
    """Tokens of all prompts given as token ids."""
    prompt_characters: int = 0
    """Characters of all prompts given as text."""
    max_tokens: int = 16
    """Longest answer of one sequence, in tokens."""
    is_open: bool = False
    """Whether the request names no length, so that `max_tokens` is the context length."""

    @property
    def total_tokens(self) -> int:
        """Most tokens that all sequences together may generate."""
        return self.num_sequences * self.max_tokens


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one request, as counted by the engine."""

    prompt_tokens: int
    completion_tokens: int

    def as_json(self) -> dict[str, int]:
        """OpenAI's usage object."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": total,
            "completion_tokens": self.completion_tokens,
        }


NO_USAGE = Usage(prompt_tokens=0, completion_tokens=0)


def read_size(fields: dict[str, Any], kind: str, context_length: int) -> Size:
    """The size of a request that members serve. Its counts must be checked and not null."""
    texts, num_tokens, num_prompts = _prompt(fields, kind)
    characters = sum(len(text) for text in texts)
    fallback = _COMPLETION_DEFAULT_TOKENS if kind == "completion" else context_length
    names = {"chat": ("max_completion_tokens", "max_tokens"), "responses": ("max_output_tokens",)}
    requested: int | None = next((fields[name] for name in names.get(kind, ("max_tokens",)) if name in fields), None)
    has_choices = kind in ("completion", "chat")
    num_choices: int = fields.get("n", 1) if has_choices else 1
    return Size(
        num_sequences=num_prompts * max(num_choices, fields.get("best_of", 1) if has_choices else 1),
        num_choices=num_choices,
        num_prompts=num_prompts,
        prompt_tokens=num_tokens,
        prompt_characters=characters,
        max_tokens=min(fallback if requested is None else requested, context_length),
        is_open=requested is None and kind != "completion",
    )


def read_text_size(fields: dict[str, Any]) -> Size:
    """The size of a request to tokenize or detokenize."""
    prompt, messages, tokens = (fields.get(name) for name in ("prompt", "messages", "tokens"))
    texts = [prompt] if isinstance(prompt, str) else _texts(messages)
    return Size(
        prompt_tokens=len(tokens) if isinstance(tokens, list) else 0,
        prompt_characters=sum(len(text) for text in texts),
        max_tokens=0,
    )


def _prompt(fields: dict[str, Any], kind: str) -> tuple[list[str], int, int]:
    """Texts, number of token ids, and number of prompts."""
    if kind == "chat":
        messages = fields.get("messages")
        return _texts(messages if isinstance(messages, list) else []), 0, 1
    if kind in ("responses", "messages"):
        parts = [fields.get(name) for name in ("system", "instructions", "input", "messages")]
        return [text for part in parts for text in ([part] if isinstance(part, str) else _texts(part))], 0, 1
    prompt, embeds = fields.get("prompt"), fields.get("prompt_embeds")
    num_embeds = len(embeds) if isinstance(embeds, list) else int(embeds is not None)
    match prompt:
        case str():
            return [prompt], 0, 1 + num_embeds
        case [int(), *_]:
            return [], len(prompt), 1 + num_embeds
        case [_, *_]:
            tokens = sum(len(part) for part in prompt if isinstance(part, list))
            return [part for part in prompt if isinstance(part, str)], tokens, len(prompt) + num_embeds
        case _:
            return [], 0, max(1, num_embeds)


def _texts(value: object) -> list[str]:
    """Every string under `content`, `text` and `output` (of a tool), which hold a message's text."""
    match value:
        case list():
            return [text for part in value for text in _texts(part)]
        case dict():
            found: list[str] = []
            for key in ("content", "text", "output"):
                part = value.get(key)
                found += [part] if isinstance(part, str) else _texts(part)
            return found
        case _:
            return []
