"""Offsets of tokens into the text of an answer that echoes its prompt, as OpenAI defines `text_offset`.

vLLM adds up the lengths of all tokens, also of those that its tokenizer puts in front of the prompt and that are not in the text.
"""

import json
from typing import Any

_OBJECT = b"data: {"
_MOST_HIDDEN = 4


class Offsets:
    """Mends the offsets of one answer, whole or event by event."""

    def __init__(self) -> None:
        self._hidden: dict[int, int] = {}
        """Characters of the tokens in front that are not in the text, by choice."""

    def mend(self, body: bytes) -> bytes:
        """A JSON object with the offsets as they should be."""
        answer = json.loads(body)
        for choice in answer.get("choices", ()):
            self._mend_choice(choice)
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()

    def mend_events(self, events: bytes) -> bytes:
        """The same for whole server-sent events."""
        parts = events.split(b"\n\n")
        return b"\n\n".join(
            b"data: " + self.mend(part[6:]) if part.startswith(_OBJECT) and b'"text_offset"' in part else part
            for part in parts
        )

    def _mend_choice(self, choice: dict[str, Any]) -> None:
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
    """How many tokens in front are not in the text: those before the first with which it begins."""
    return next((idx for idx, token in enumerate(tokens[:_MOST_HIDDEN]) if token and text.startswith(token)), 0)
