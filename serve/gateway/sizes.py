"""How much work a request asks for, read from its body without a tokenizer. What is odd counts as little: the engine refuses it."""

from typing import Any

from chorus.serve.gateway.terms import Size

_COMPLETION_DEFAULT_TOKENS = 16
"""OpenAI's default for completions, which the engine keeps to; a chat goes on to the end of the context."""


def read_size(fields: dict[str, Any], kind: str, context_length: int) -> Size:
    """The size of a request that members serve."""
    texts, num_tokens, num_prompts = _prompt(fields, kind)
    characters = sum(len(text) for text in texts)
    fallback = _COMPLETION_DEFAULT_TOKENS if kind == "completion" else context_length
    names = {"chat": ("max_completion_tokens", "max_tokens"), "responses": ("max_output_tokens",)}
    asked = None
    for name in names.get(kind, ("max_tokens",)):
        asked = asked or _natural(fields.get(name))
    num_choices = max(1, _natural(fields.get("n")) or 1) if kind in ("completion", "chat") else 1
    return Size(
        num_sequences=num_prompts * num_choices,
        num_choices=num_choices,
        prompt_tokens=num_tokens,
        prompt_characters=characters,
        max_tokens=min(fallback if asked is None else asked, context_length),
        is_open=asked is None and kind != "completion",
    )


def _prompt(fields: dict[str, Any], kind: str) -> tuple[list[str], int, int]:
    """Texts, number of token ids, and number of prompts."""
    if kind == "chat":
        messages = fields.get("messages")
        return _texts(messages if isinstance(messages, list) else []), 0, 1
    if kind in ("responses", "messages"):
        parts = [fields.get(name) for name in ("system", "instructions", "input", "messages")]
        return [text for part in parts for text in ([part] if isinstance(part, str) else _texts(part))], 0, 1
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
    """Every string under `content`, `text` and `output` (a tool's), which is where a message's words are."""
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


def _natural(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
