"""Adds fields to an engine's answer without parsing it: bytes are spliced in at the front, the rest passes through.

Inside a JSON string every quote is escaped, so `"model":"` can only be a key and its value, never generated text. The engine
writes `model` before `choices`, so the first match is the answer's own.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from chorus.serve.gateway.request.errors import engine_error, error_status
from chorus.serve.gateway.request.size import Usage

DONE = b"data: [DONE]"
ERROR = b'data: {"error"'
"""The start of an engine's error event."""
_OBJECT = b"data: {"
_COMMENT = b":"
"""The start of a comment event, which keeps a connection alive."""
_MODEL = re.compile(rb'"model"\s*:\s*"(?:[^"\\]|\\.)*"')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
_INDEX = re.compile(rb'"choices"\s*:\s*\[\s*\{\s*"index"\s*:\s*(\d{1,15})')
_USAGE_SO_FAR = re.compile(
    rb',\s*"usage"\s*:\s*\{\s*"prompt_tokens"\s*:\s*(\d{1,15}),\s*"total_tokens"\s*:\s*\d+,\s*"completion_tokens"\s*:\s*(\d{1,15})'
    rb"(?:[^{}]|\{[^{}]*\})*\}"
)
_PROMPT_TOKENS = re.compile(rb'"usage"\s*:\s*\{.*?"prompt_tokens"\s*:\s*(\d{1,15})(?!\d)', re.DOTALL)
_COMPLETION_TOKENS = re.compile(rb'"usage"\s*:\s*\{.*?"completion_tokens"\s*:\s*(\d{1,15})(?!\d)', re.DOTALL)


def read_usage(body: bytes) -> Usage | None:
    """The engine's `usage` in a JSON object; None if there is none."""
    start = max(body.rfind(b'"usage":'), 0)
    prompt, completion = _PROMPT_TOKENS.search(body, start), _COMPLETION_TOKENS.search(body, start)
    if not prompt:
        return None
    return Usage(prompt_tokens=int(prompt[1]), completion_tokens=int(completion[1]) if completion else 0)


def check_answer(body: bytes, key: str = "choices") -> None:
    """Check that `body` is an answer, or an event of one, with a list under `key`.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: it is not.
    """
    if not isinstance(json.loads(body)[key], list):
        raise TypeError(f"{key} is not a list")


@dataclass(frozen=True, kw_only=True)
class Additions:
    """What the gateway adds to an answer."""

    population: bytes
    """The `population` object, as JSON."""
    model: str | None
    """The model name that replaces the engine's; None keeps it."""

    def splice(self, body: bytes, *, first: bool = True) -> bytes:
        """A JSON object, or an event with one, with the additions; `population` is added only if `first`."""
        if self.model is not None:
            name = b'"model":' + json.dumps(self.model).encode()
            body = _MODEL.sub(lambda match: name, body, count=1)
        if first:
            brace = body.index(b"{") + 1
            comma = b"" if body[brace:].lstrip().startswith(b"}") else b","
            body = body[:brace] + b'"population":' + self.population + comma + body[brace:]
        return body


class EventSplicer:
    """Takes server-sent events in pieces cut anywhere and returns whole events, the first with the additions.

    Whole events only, so that an error event can follow at any time. `at_end`, if given, receives each event that ends a choice and
    returns the event to send and a new `population` object for it. With `has_running_usage`, each of the engine's events carries
    usage; `hide_running_usage` removes it.
    """

    def __init__(
        self,
        additions: Additions,
        *,
        keep_usage: bool,
        at_end: Callable[[bytes], tuple[bytes, bytes]] | None = None,
        has_running_usage: bool = False,
        hide_running_usage: bool = True,
    ) -> None:
        self._additions = additions
        self._keep_usage = keep_usage
        self._at_end = at_end
        self._has_running_usage = has_running_usage
        self._hide_running_usage = hide_running_usage
        self._used: dict[int, tuple[int, int]] = {}
        """Prompt tokens and completion tokens so far, by choice."""
        self._rest = b""
        self._saw_first = False
        self._first = b""
        self.usage: Usage | None = None
        self.done = False
        """Whether the engine ended the stream."""

    @property
    def head(self) -> dict[str, Any]:
        """The fields that the stream's events share, `id` and `created`; empty before the first event."""
        known = json.loads(self._first[6:]) if self._first else {}
        return {key: known[key] for key in ("id", "created") if key in known}

    def usage_so_far(self, num_choices: int) -> Usage | None:
        """Usage up to the last event, with `num_choices` choices per prompt; None before the first event that carries usage."""
        if not self._used:
            return None
        # A prompt's choices have consecutive indices, and each counts the prompt's tokens.
        prompts = {idx // num_choices: prompt_tokens for idx, (prompt_tokens, _) in self._used.items()}
        completion_tokens = sum(tokens for _, tokens in self._used.values())
        return Usage(prompt_tokens=sum(prompts.values()), completion_tokens=completion_tokens)

    def feed(self, data: bytes) -> bytes:
        """The events that `data` completes; often exactly one, sometimes none.

        Raises:
            ValueError, or another error of reading unexpected JSON: this is not an engine's stream.
        """
        if self._rest:
            data = self._rest + data
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            self._rest = data
            return b""
        self._rest = data[end:]
        events = data[:end] if self._rest else data
        if DONE in events:
            self.done = events.startswith(DONE) or b"\n" + DONE in events
        is_last = self._at_end is not None and FINISHED.search(events)
        has_more = self._has_running_usage or is_last or ERROR in events or _NO_CHOICES.search(events)
        if self._saw_first and self._additions.model is None and not has_more:
            return events  # the common case: nothing to add or remove
        return b"".join([self._splice(event + b"\n\n") for event in events[:-2].split(b"\n\n")])

    def _splice(self, event: bytes) -> bytes:
        if event.startswith(_COMMENT) or (event.startswith(DONE) and self._saw_first):
            return event
        if event.startswith(ERROR):  # an error as the first event passes unchanged: the caller answers with its status
            first, self._saw_first = not self._saw_first, True
            return event if first else engine_error(error_status(event[6:]), event[6:]).event()
        if not self._saw_first:
            check_answer(event.removeprefix(b"data: "))
        elif not event.startswith(_OBJECT):
            raise ValueError(f"an event begins with {event[:40]!r}, not with {_OBJECT!r}")
        if _NO_CHOICES.search(event) and (usage := read_usage(event)):
            self.usage = usage
            if not self._keep_usage:
                return b""
        elif self._has_running_usage:
            event = self._count(event)
        first, self._saw_first = not self._saw_first, True
        self._first = self._first or event
        if self._at_end is not None and FINISHED.search(event):
            event, population = self._at_end(event)
            return replace(self._additions, population=population).splice(event)
        return self._additions.splice(event, first=first)

    def _count(self, event: bytes) -> bytes:
        if (used := _USAGE_SO_FAR.search(event, max(0, event.rfind(b'"usage"') - 8))) is None:
            return event
        if index := _INDEX.search(event):
            self._used[int(index[1])] = int(used[1]), int(used[2])
        return event[: used.start()] + event[used.end() :] if self._hide_running_usage else event
