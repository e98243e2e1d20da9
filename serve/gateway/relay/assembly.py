"""Assembles a stream's events into the whole answer that the engine would have sent without streaming, or a part of it if cut."""

import json
from typing import Any

from chorus.serve.gateway.request.size import Usage

_OBJECTS = {"chat.completion.chunk": "chat.completion"}


class Assembly:
    """Collects events and assembles them into one answer."""

    def __init__(self) -> None:
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._usage: dict[str, Any] | None = None

    def feed(self, events: bytes) -> None:
        """Add whole events."""
        for line in events.split(b"\n\n"):
            if line.startswith(b"data: {"):
                self._take(json.loads(line[6:]))

    def answer(self, *, cut: Usage | None = None) -> bytes:
        """The answer as JSON. If cut short, `cut` is its usage, and unfinished choices get finish_reason `length`."""
        choices = [self._choices[index] for index in sorted(self._choices)]
        for choice in choices:
            if cut is not None and choice.get("finish_reason") is None:
                choice["finish_reason"] = "length"
            if calls := choice.get("message", {}).get("tool_calls"):
                choice["message"]["tool_calls"] = [calls[index] for index in sorted(calls)]
        head = {key: value for key, value in self._head.items() if key not in ("choices", "usage", "population")}
        head["object"] = _OBJECTS.get(str(head.get("object")), head.get("object"))
        usage = self._usage if cut is None else cut.as_json()
        return json.dumps({**head, "choices": choices, "usage": usage}, separators=(",", ":")).encode()

    def _take(self, event: dict[str, Any]) -> None:
        self._head = self._head or event
        self._usage = event.get("usage") or self._usage
        for part in event.get("choices", ()):
            choice = self._choices.setdefault(part["index"], {"index": part["index"], "finish_reason": None})
            if "delta" in part:
                _merge_message(choice.setdefault("message", {"role": "assistant", "content": None}), part["delta"])
            else:
                choice["text"] = choice.get("text", "") + (part.get("text") or "")
            for key, value in part.items():
                if key not in ("index", "delta", "text"):
                    choice[key] = _joined(choice.get(key), value)

    @property
    def is_empty(self) -> bool:
        """Whether no event with a choice has come yet."""
        return not self._choices


def empty_answer(model: str, *, is_chat: bool, num_choices: int, usage: Usage) -> bytes:
    """The answer of a request whose deadline passes before its first token."""
    nothing: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if is_chat else {"text": ""}
    choices = [{"index": idx, **nothing, "logprobs": None, "finish_reason": "length"} for idx in range(num_choices)]
    body = {"object": "chat.completion" if is_chat else "text_completion", "model": model, "choices": choices}
    return json.dumps({**body, "usage": usage.as_json()}, separators=(",", ":")).encode()


def last_event(model: str, *, is_chat: bool, indices: list[int], like: dict[str, Any]) -> bytes:
    """The event that ends a stream that is cut short; `like` holds the fields that its events share (id, created)."""
    nothing: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
    choices = [{"index": idx, **nothing, "logprobs": None, "finish_reason": "length"} for idx in indices]
    return _event(model, is_chat=is_chat, like=like, choices=choices)


def usage_event(model: str, *, is_chat: bool, usage: Usage, like: dict[str, Any]) -> bytes:
    """The event after the last one, which reports usage, for clients that request it."""
    return _event(model, is_chat=is_chat, like=like, choices=[], usage=usage.as_json())


def _event(model: str, *, is_chat: bool, like: dict[str, Any], **fields: Any) -> bytes:
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    body = {**like, "object": kind, "model": model, **fields}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _merge_message(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for key, value in delta.items():
        if key == "tool_calls":
            for call in value or ():
                known = message.setdefault("tool_calls", {}).setdefault(call.get("index", 0), {})
                for name, part in call.items():
                    if name == "function":
                        known["function"] = _joined(known.get("function"), part)
                    elif name != "index":
                        known[name] = part
        elif key == "role":
            message["role"] = value or message["role"]
        else:
            message[key] = _joined(message.get(key), value)


def _joined(known: Any, more: Any) -> Any:
    """Concatenate strings and lists, merge objects key by key, replace anything else; null changes nothing."""
    if more is None or known is None:
        return known if more is None else more
    if isinstance(known, str) and isinstance(more, str):
        return known + more
    if isinstance(known, list) and isinstance(more, list):
        return [*known, *more]
    if isinstance(known, dict) and isinstance(more, dict):
        return {key: _joined(known.get(key), more.get(key)) for key in {**known, **more}}
    return more
