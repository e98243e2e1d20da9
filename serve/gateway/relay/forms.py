"""The answer formats of the APIs: streams, usage, errors, and answers that are cut short.

Completions and chats are spliced (`splice`). Events of Responses and Messages have names, and contain whole objects at the start
and end of a stream, so each event is parsed.
"""

import copy
import json
import re
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol

from chorus.serve.gateway.relay.assembly import Assembly, empty_answer, last_event, usage_event
from chorus.serve.gateway.relay.splice import ERROR, Additions, EventSplicer, check_answer, read_usage
from chorus.serve.gateway.request.call import Call, Kind
from chorus.serve.gateway.request.errors import ApiError, anthropic_body, engine_error, error_status
from chorus.serve.gateway.request.size import Usage

AtEnd = Callable[[bytes], tuple[bytes, bytes]]
"""Takes an event that ends an answer; returns the event to send, and a new `population` object for it."""
_DONE = b"data: [DONE]\n\n"
_DELTA = re.compile(rb"^event: \S+[._]delta$", re.MULTILINE)


class Stream(Protocol):
    """The stream of one answer, which is passed to a client or assembled into a whole answer."""

    usage: Usage | None
    """The engine's count at the end of the stream."""
    done: bool
    """Whether the engine ended the stream."""
    is_opening: bool
    """Whether the events so far only announce an answer, and nothing has been generated."""

    def feed(self, data: bytes) -> bytes:
        """The events that `data` completes, with our additions."""

    def count(self, events: bytes) -> int:
        """How many of the events contain generated output."""

    def refusal(self, events: bytes) -> ApiError | None:
        """The engine's error, if these first events contain one."""

    def usage_so_far(self, num_choices: int) -> Usage | None:
        """Usage so far, with `num_choices` choices per prompt; None if nothing came. An unknown prompt counts as 0 tokens."""

    def answer(self) -> bytes:
        """The whole answer, without our additions."""

    def cut_answer(self, usage: Usage) -> bytes:
        """What there is of the answer, as a whole answer that was cut short."""

    def cut_events(self, usage: Usage, additions: Additions) -> bytes:
        """Events that end the stream as if its maximum length were reached."""


class Form(Protocol):
    """The answer format of one API."""

    def read_usage(self, body: bytes) -> Usage | None:
        """The engine's usage in a whole answer."""

    def whole(self, body: bytes, additions: Additions) -> bytes:
        """A whole answer with our additions."""

    def stream(self, call: Call, additions: Additions, *, name: str, at_end: AtEnd | None) -> Stream:
        """A stream. `name` is the model's name, for events that the gateway writes."""

    def error_event(self, error: ApiError) -> bytes:
        """The event of an error in a stream that has begun."""


class _SplicedStream(EventSplicer):
    """A stream of a completion or a chat."""

    is_opening = False

    def __init__(self, call: Call, additions: Additions, *, name: str, at_end: AtEnd | None) -> None:
        super().__init__(
            additions,
            keep_usage=call.has_usage,
            at_end=at_end,
            has_running_usage=True,
            hide_running_usage=not call.has_running_usage,
        )
        self._call = call
        self._name, self._is_chat = name, call.kind == "chat"
        self._assembly = Assembly() if call.streams_from_engine and not call.streams else None

    def feed(self, data: bytes) -> bytes:
        events = super().feed(data)
        if self._assembly is not None:
            self._assembly.feed(events)
        return events

    def count(self, events: bytes) -> int:
        return events.count(b"\n\n")

    def refusal(self, events: bytes) -> ApiError | None:
        if (start := events.find(ERROR)) < 0:
            return None
        error = events[start:].partition(b"\n\n")[0].removeprefix(b"data: ")
        return engine_error(error_status(error), error)

    def answer(self) -> bytes:
        assert self._assembly is not None, "only an answer that is not streamed to the client is assembled"
        return self._assembly.answer()

    def cut_answer(self, usage: Usage) -> bytes:
        if self._assembly is None or self._assembly.is_empty:
            num_choices = self._call.size.num_prompts * self._call.size.num_choices
            return empty_answer(self._name, is_chat=self._is_chat, num_choices=num_choices, usage=usage)
        return self._assembly.answer(cut=usage)

    def cut_events(self, usage: Usage, additions: Additions) -> bytes:
        indices = list(range(self._call.size.num_prompts * self._call.size.num_choices))
        event = last_event(self._name, is_chat=self._is_chat, indices=indices, like=self.head)
        events = Additions(population=additions.population, model=None).splice(event)
        if self._call.has_usage:
            events += usage_event(self._name, is_chat=self._is_chat, usage=usage, like=self.head)
        return events + _DONE


class Spliced:
    """The format of completions and chats."""

    def read_usage(self, body: bytes) -> Usage | None:
        check_answer(body)
        return read_usage(body)

    def whole(self, body: bytes, additions: Additions) -> bytes:
        return additions.splice(body)

    def stream(self, call: Call, additions: Additions, *, name: str, at_end: AtEnd | None) -> Stream:
        return _SplicedStream(call, additions, name=name, at_end=at_end)

    def error_event(self, error: ApiError) -> bytes:
        return error.event()


class _NamedStream:
    """A stream of an API whose events have names. It tracks every event, so that it can end the answer or return it at any time."""

    opening: frozenset[str]
    """Events before the first output. They are held until then, so that an early failure can be answered with its status."""
    last: frozenset[str]

    @staticmethod
    def error_event(error: ApiError) -> bytes:
        """An error as an event of this API."""
        raise NotImplementedError

    def __init__(self, call: Call, additions: Additions, *, name: str, at_end: AtEnd | None) -> None:
        self._additions = additions
        self._name = name
        self._at_end = at_end
        self._rest = self._held = b""
        self._num_deltas = 0
        self.usage: Usage | None = None
        self.done = False
        self.is_opening = True

    def feed(self, data: bytes) -> bytes:
        *events, self._rest = (self._rest + data).split(b"\n\n")
        out = b""
        for event in events:
            name, fields = _parse(event)
            if name in self.last or name == "error":
                self.done = True
            if not self.is_opening and (error := self.refusal(event)) is not None:
                out += self.error_event(error)  # hides the engine's message if the engine failed
                continue
            if fields is None:
                out += b"" if self.is_opening else event + b"\n\n"
                continue
            self._num_deltas += name.endswith("delta") and name not in self.last and name != "message_delta"
            self._take(name, fields)
            self._add(name, fields)
            written = _event(fields, name)
            if self.is_opening and name in self.opening:
                self._held += written
                continue
            self.is_opening = False
            if name == "error":
                self._held = b""  # the error then comes first and can be answered with its status
            out, self._held = out + self._held + written, b""
        return out

    def count(self, events: bytes) -> int:
        return len(_DELTA.findall(events))

    def refusal(self, events: bytes) -> ApiError | None:
        name, fields = _parse(events.partition(b"\n\n")[0])
        if name != "error" or fields is None:
            return None
        error = fields if "error" in fields else {"error": fields}
        body = json.dumps(error).encode()
        return engine_error(error_status(body), body)

    def _population(self, *, at_end: bool = False) -> Any:
        made = self._at_end(b"")[1] if at_end and self._at_end is not None else self._additions.population
        return json.loads(made)

    def _take(self, name: str, fields: dict[str, Any]) -> None:
        raise NotImplementedError

    def _add(self, name: str, fields: dict[str, Any]) -> None:
        raise NotImplementedError


class _ResponseStream(_NamedStream):
    """A stream of OpenAI's Responses."""

    opening = frozenset({"response.created", "response.in_progress"})
    last = frozenset({"response.completed", "response.incomplete", "response.failed"})

    @staticmethod
    def error_event(error: ApiError) -> bytes:
        return _response_error(error)

    def __init__(self, call: Call, additions: Additions, *, name: str, at_end: AtEnd | None) -> None:
        super().__init__(call, additions, name=name, at_end=at_end)
        self._response: dict[str, Any] = {}
        self._items: dict[int, dict[str, Any]] = {}
        self._open: set[int] = set()
        self._number = 0

    def _take(self, name: str, fields: dict[str, Any]) -> None:
        self._number = fields.get("sequence_number", self._number) + 1
        if isinstance(fields.get("response"), dict):
            self._response = fields["response"]
            self.usage = _usage_of(self._response.get("usage")) or self.usage
        if (idx := fields.get("output_index")) is None:
            return
        if isinstance(fields.get("item"), dict):
            self._items[idx] = copy.deepcopy(fields["item"])
            (self._open.discard if name.endswith(".done") else self._open.add)(idx)
        elif name.endswith(".delta") and idx in self._items and isinstance(fields.get("delta"), str):
            item = self._items[idx]
            if "content_index" in fields:
                kind = "reasoning_text" if item.get("type") == "reasoning" else "output_text"
                parts = item["content"] = item.get("content") or [{"type": kind, "text": "", "annotations": []}]
                parts[-1]["text"] = parts[-1].get("text", "") + fields["delta"]
            else:
                key = "input" if item.get("type") == "custom_tool_call" else "arguments"
                item[key] = (item.get(key) or "") + fields["delta"]

    def _add(self, name: str, fields: dict[str, Any]) -> None:
        if isinstance(fields.get("response"), dict):
            _add_to(fields["response"], self._additions.model, self._population(at_end=name in self.last))

    def usage_so_far(self, num_choices: int) -> Usage | None:
        return None if not self._num_deltas else Usage(prompt_tokens=0, completion_tokens=self._num_deltas)

    def answer(self) -> bytes:
        return _dumps(self._response)

    def cut_answer(self, usage: Usage) -> bytes:
        return _dumps(self._cut(usage))

    def cut_events(self, usage: Usage, additions: Additions) -> bytes:
        response = self._cut(usage)
        _add_to(response, additions.model, json.loads(additions.population))
        events: list[tuple[str, dict[str, Any]]] = []
        if self.is_opening:
            begun = {**response, "status": "in_progress", "incomplete_details": None, "usage": None}
            events += [(name, {"response": begun}) for name in ("response.created", "response.in_progress")]
            self._number = 0
        events += [
            ("response.output_item.done", {"output_index": idx, "item": self._items[idx]}) for idx in sorted(self._open)
        ]
        events.append(("response.incomplete", {"response": response}))
        written = b""
        for name, fields in events:
            written += _event({"type": name, "sequence_number": self._number, **fields}, name)
            self._number += 1
        return written

    def _cut(self, usage: Usage) -> dict[str, Any]:
        for idx in self._open:
            self._items[idx]["status"] = "incomplete"
        known = {"id": f"resp_{uuid.uuid4().hex}", "created_at": int(time.time()), "model": self._name}
        nothing = {**known, "object": "response", "tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
        details: dict[str, Any] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        return {
            **(self._response or nothing),
            "status": "incomplete",
            "incomplete_details": {"reason": "max_output_tokens"},
            "output": [self._items[idx] for idx in sorted(self._items)],
            "usage": details,
        }


class _MessageStream(_NamedStream):
    """A stream of Anthropic's Messages."""

    opening = frozenset({"message_start", "ping"})
    last = frozenset({"message_stop"})

    @staticmethod
    def error_event(error: ApiError) -> bytes:
        return _message_error(error)

    def __init__(self, call: Call, additions: Additions, *, name: str, at_end: AtEnd | None) -> None:
        super().__init__(call, additions, name=name, at_end=at_end)
        self._message: dict[str, Any] = {}
        self._blocks: dict[int, dict[str, Any]] = {}
        self._json: dict[int, str] = {}
        self._open: int | None = None
        self._has_stopped = False

    def _take(self, name: str, fields: dict[str, Any]) -> None:
        match name:
            case "message_start":
                self._message = dict(copy.deepcopy(fields["message"]))
            case "content_block_start":
                self._open = fields["index"]
                self._blocks[self._open] = dict(copy.deepcopy(fields["content_block"]))
            case "content_block_delta":
                self._grow(fields["index"], fields["delta"])
            case "content_block_stop":
                self._open = None
            case "message_delta":
                self._has_stopped = True
                self._message |= fields.get("delta", {})
                self._message["usage"] = {**(self._message.get("usage") or {}), **(fields.get("usage") or {})}
                self.usage = _usage_of(self._message["usage"])

    def _grow(self, idx: int, delta: dict[str, Any]) -> None:
        block = self._blocks.setdefault(idx, {"type": "text", "text": ""})
        for key in ("text", "thinking", "signature"):
            if isinstance(delta.get(key), str):
                block[key] = (block.get(key) or "") + delta[key]
        if isinstance(delta.get("partial_json"), str):
            self._json[idx] = self._json.get(idx, "") + delta["partial_json"]

    def _add(self, name: str, fields: dict[str, Any]) -> None:
        if name == "message_start":
            _add_to(fields["message"], self._additions.model, self._population())
        elif name == "message_delta":
            fields["population"] = self._population(at_end=True)

    def usage_so_far(self, num_choices: int) -> Usage | None:
        begun = _usage_of(self._message.get("usage"))
        return None if begun is None else Usage(prompt_tokens=begun.prompt_tokens, completion_tokens=self._num_deltas)

    def answer(self) -> bytes:
        return _dumps(self._whole())

    def cut_answer(self, usage: Usage) -> bytes:
        return _dumps({**self._whole(), **_cut_message(usage)})

    def cut_events(self, usage: Usage, additions: Additions) -> bytes:
        written = b""
        if self.is_opening:
            message = {**self._whole(), "content": []}
            _add_to(message, additions.model, self._population())
            written += _event({"type": "message_start", "message": message}, "message_start")
        if self._open is not None:
            written += _event({"type": "content_block_stop", "index": self._open}, "content_block_stop")
        if not self._has_stopped:
            end = _cut_message(usage)
            delta = {key: end[key] for key in ("stop_reason", "stop_sequence")}
            fields = {"type": "message_delta", "delta": delta, "usage": end["usage"]}
            written += _event({**fields, "population": json.loads(additions.population)}, "message_delta")
        return written + _event({"type": "message_stop"}, "message_stop")

    def _whole(self) -> dict[str, Any]:
        content = []
        for idx in sorted(self._blocks):
            block = self._blocks[idx]
            if block.get("type") == "tool_use":
                try:
                    block = {**block, "input": json.loads(self._json.get(idx) or "{}")}
                except ValueError:
                    continue  # a tool call that was cut short must not run
            content.append(block)
        known = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": self._name}
        usage = {"input_tokens": 0, "output_tokens": 0}
        return {
            **known,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
            **self._message,
            "content": content or [{"type": "text", "text": ""}],
        }


class _Parsed:
    """What Responses and Messages share: their whole answers are parsed."""

    key: str
    """Key of the list that every answer contains."""

    def read_usage(self, body: bytes) -> Usage | None:
        check_answer(body, self.key)
        return _usage_of(json.loads(body).get("usage"))

    def whole(self, body: bytes, additions: Additions) -> bytes:
        fields = json.loads(body)
        _add_to(fields, additions.model, json.loads(additions.population))
        return _dumps(fields)


class Responses(_Parsed):
    """The format of OpenAI's Responses."""

    key = "output"

    def stream(self, call: Call, additions: Additions, *, name: str, at_end: AtEnd | None) -> Stream:
        return _ResponseStream(call, additions, name=name, at_end=at_end)

    def error_event(self, error: ApiError) -> bytes:
        return _response_error(error)


class Messages(_Parsed):
    """The format of Anthropic's Messages."""

    key = "content"

    def stream(self, call: Call, additions: Additions, *, name: str, at_end: AtEnd | None) -> Stream:
        return _MessageStream(call, additions, name=name, at_end=at_end)

    def error_event(self, error: ApiError) -> bytes:
        return _message_error(error)


FORMS: dict[Kind, Form] = {"completion": Spliced(), "chat": Spliced(), "responses": Responses(), "messages": Messages()}


def _parse(event: bytes) -> tuple[str, dict[str, Any] | None]:
    """An event's name and its data; None for a comment, which keeps a connection alive."""
    name, data = "", b""
    for line in event.split(b"\n"):
        key, _, value = line.partition(b":")
        if key == b"event":
            name = value.strip().decode(errors="replace")
        elif key == b"data":
            data = value
    if not data:
        return name, None
    if not isinstance(fields := json.loads(data), dict):
        raise ValueError(f"the data of an event is a {type(fields).__name__}, not an object")
    return name, fields


def _event(fields: dict[str, Any], name: str) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + _dumps(fields) + b"\n\n"


def _response_error(error: ApiError) -> bytes:
    fields = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
    return _event({**fields, "sequence_number": 0}, "error")


def _message_error(error: ApiError) -> bytes:
    return _event(anthropic_body(error), "error")


def _add_to(answer: dict[str, Any], model: str | None, population: Any) -> None:
    if model is not None:
        answer["model"] = model
    answer["population"] = population


def _usage_of(usage: Any) -> Usage | None:
    """Usage in our form. Cached tokens are added, since Anthropic's `input_tokens` exclude them."""
    if not isinstance(usage, dict) or not isinstance(usage.get("input_tokens"), int):
        return None
    cached = sum(usage.get(key) or 0 for key in ("cache_read_input_tokens", "cache_creation_input_tokens"))
    return Usage(prompt_tokens=usage["input_tokens"] + cached, completion_tokens=usage.get("output_tokens") or 0)


def _cut_message(usage: Usage) -> dict[str, Any]:
    used = {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
    return {"stop_reason": "max_tokens", "stop_sequence": None, "usage": used}


def _dumps(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
