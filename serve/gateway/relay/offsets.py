"""Corrects `text_offset` in answers that echo their prompt, to OpenAI's definition: offsets of tokens into the text.

vLLM also counts the tokens that its tokenizer adds in front of the prompt, which are not in the text.
"""

import json
from typing import Any

_OBJECT = b"data: {"
_MAX_HIDDEN = 4


class Offsets:
    """Corrects the offsets of one answer, whole or event by event."""

    def __init__(self) -> None:
        self._hidden: dict[int, int] = {}
        """Characters of the leading tokens that are not in the text, by choice."""

    def correct(self, body: bytes) -> bytes:
        """A JSON object with corrected offsets."""
        answer = json.loads(body)
        for choice in answer.get("choices", ()):
            self._correct_choice(choice)
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()

    def correct_events(self, events: bytes) -> bytes:
        """Whole server-sent events with corrected offsets."""
        parts = events.split(b"\n\n")
        return b"\n\n".join(
            b"data: " + self.correct(part[6:]) if part.startswith(_OBJECT) and b'"text_offset"' in part else part
            for part in parts
        )

    def _correct_choice(self, choice: dict[str, Any]) -> None:
        logprobs = choice.get("logprobs") or {}
        offsets, tokens, text = logprobs.get("text_offset"), logprobs.get("tokens"), choice.get("text") or ""
        if not offsets or not tokens:
            return
        is_first = choice["index"] not in self._hidden
        num_hidden = _num_hidden(tokens, text) if is_first else 0
        if is_first:
            self._hidden[choice["index"]] = sum(len(token) for token in tokens[:num_hidden])
        hidden = self._hidden[choice["index"]]
        logprobs["text_offset"] = [max(0, offset - hidden) for offset in offsets]


def _num_hidden(tokens: list[str], text: str) -> int:
    """The number of leading tokens that are not in the text: those before the first token with which the text starts."""
    return next((idx for idx, token in enumerate(tokens[:_MAX_HIDDEN]) if token and text.startswith(token)), 0)
