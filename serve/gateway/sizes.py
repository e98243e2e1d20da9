"""How much work a request asks for, read from its body without a tokenizer. What is odd counts as little: the engine refuses it."""

from typing import Any

from chorus.serve.gateway.terms import Size

_COMPLETION_DEFAULT_TOKENS = 16
"""OpenAI's default for completions, which the engine keeps to; a chat goes on to the end of the context."""


def read_size(fields: dict[str, Any], kind: str, context_length: int) -> Size:
    """The size of a completion's or a chat's request."""
    texts, num_tokens, num_prompts = _prompt(fields, kind)
    characters = sum(len(text) for text in texts)
    fallback = context_length if kind == "chat" else _COMPLETION_DEFAULT_TOKENS
    asked = _natural(fields.get("max_completion_tokens") if kind == "chat" else None) or _natural(
        fields.get("max_tokens")
    )
    num_choices = max(1, _natural(fields.get("n")) or 1)
    return Size(
        num_sequences=num_prompts * num_choices,
        num_choices=num_choices,
        prompt_tokens=num_tokens,
        prompt_characters=characters,
        max_tokens=min(fallback if asked is None else asked, context_length),
        is_open=asked is None and kind == "chat",
    )


def _prompt(fields: dict[str, Any], kind: str) -> tuple[list[str], int, int]:
    """Texts, number of token ids, and number of prompts."""
    if kind == "chat":
        messages = fields.get("messages")
        return _texts(messages if isinstance(messages, list) else []), 0, 1
    prompt = fields.get("prompt")
    match prompt:
        case str():
            return [prompt], 0, 1
        case [int(), *_]:
            return [], len(prompt), 1
        case [_, *_]:
            tokens = sum(len(part) for part in prompt if isinstance(part, list))
            return [part for part in prompt if isinstance(part, str)], tokens, len(prompt)
        case _:
            return [], 0, 1


def _texts(value: object) -> list[str]:
    """Every string under `content` and `text`, which is where a message's words are."""
    match value:
        case list():
            return [text for part in value for text in _texts(part)]
        case dict():
            found: list[str] = []
            for key in ("content", "text"):
                part = value.get(key)
                found += [part] if isinstance(part, str) else _texts(part)
            return found
        case _:
            return []


def _natural(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
