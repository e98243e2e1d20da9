"""What is noted about each request while it is answered, and the middleware that opens and closes these notes."""

import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chorus.serve.gateway.request.errors import CLIENT_CLOSED_REQUEST
from chorus.serve.gateway.request.size import Usage

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
_ACCEPTABLE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Trace(Protocol):
    """A request as a trace knows it."""

    def headers(self) -> dict[str, str]:
        """What tells the engine to which span its own belong."""

    def end(self, method: str, record: "Record") -> None:
        """The request was answered, and this is what is known of it."""


@dataclass(kw_only=True)
class Record:
    """One request, filled in by whoever learns a part of it."""

    request_id: str
    client: str | None = None
    """Its address; as a trusted proxy tells, if one stands between."""
    route: str = "none"
    status: int = CLIENT_CLOSED_REQUEST
    """Of the answer; if none was begun, the client left before."""
    tier_asked: str | None = None
    tier_served: str | None = None
    first_token_s: float | None = None
    usage: Usage | None = None
    tenant: str | None = None
    engine: str | None = None
    """Address of the engine that it went to last."""
    waited_s: float = 0.0
    """In the queue."""
    budget_s: float | None = None
    is_deadline_met: bool | None = None
    """None if there was no deadline, or no answer."""
    is_truncated: bool = False
    is_shrunk: bool = False
    """Whether it was served at a smaller tier than it asked for."""
    num_drops: int = 0
    """Members that left on the way, where the engine said so."""
    is_broken: bool = False
    """Whether its stream ended with an error event."""
    trace: Trace | None = None
    duration_s: float = 0.0
    began_at: float = field(default_factory=time.perf_counter)

    @property
    def token_s(self) -> float | None:
        """Mean time per token after the first, of a stream that was complete."""
        if self.first_token_s is None or self.usage is None or self.usage.completion_tokens < 2:
            return None
        return (self.duration_s - self.first_token_s) / (self.usage.completion_tokens - 1)

    def fields(self, method: str) -> dict[str, object]:
        """All of it for a log, without what is not known. No part of a body or a key is in it."""
        known: dict[str, object] = {
            "request_id": self.request_id,
            "client": self.client,
            "method": method,
            "route": self.route,
            "status": self.status,
            "duration_ms": round(1000 * self.duration_s, 1),
            "tenant": self.tenant,
            "tier_asked": self.tier_asked,
            "tier_served": self.tier_served,
            "engine": self.engine,
            "queue_ms": round(1000 * self.waited_s, 1) or None,
            "first_token_ms": None if self.first_token_s is None else round(1000 * self.first_token_s, 1),
            "prompt_tokens": None if self.usage is None else self.usage.prompt_tokens,
            "completion_tokens": None if self.usage is None else self.usage.completion_tokens,
            "budget_ms": None if self.budget_s is None else round(1000 * self.budget_s, 1),
            "deadline_met": self.is_deadline_met,
            "truncated": self.is_truncated or None,
            "drops": self.num_drops or None,
            "broken": self.is_broken or None,
        }
        return {name: value for name, value in known.items() if value is not None}

    def elapsed_s(self) -> float:
        """Since the request's head arrived."""
        return time.perf_counter() - self.began_at


class RecordMiddleware:
    """Gives each request an id and a `Record` (`request.state.record`), and hands that to `observe` when it has been answered."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        begin: Callable[[], None],
        observe: Callable[[Record], None],
        is_draining: Callable[[], bool] = lambda: False,
        begin_trace: Callable[[str, Mapping[str, str]], Trace] | None = None,
    ) -> None:
        self.app = app
        self._begin_trace = begin_trace
        self._is_draining = is_draining
        self._begin = begin
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        record = Record(
            request_id=given if _ACCEPTABLE_ID.fullmatch(given) else uuid.uuid4().hex,
            client=scope["client"][0] if scope.get("client") else None,
        )
        scope.setdefault("state", {})["record"] = record
        if self._begin_trace is not None:
            record.trace = self._begin_trace(scope["method"], headers)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = record.request_id
                if self._is_draining():
                    headers["connection"] = "close"  # the client's next request is to find another gateway
            await send(message)

        self._begin()
        # HEAD is answered as GET; the server leaves the body out.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self.app(inner, receive, send_with_id)
        except Exception:
            record.status = 500
            logger.exception("request %s failed", record.request_id)
            raise
        finally:
            record.duration_s = record.elapsed_s()
            route = inner.get("route")
            record.route = getattr(route, "path", "none")
            self._observe(record)
            if record.trace is not None:
                record.trace.end(scope["method"], record)
            logger.info(
                "%s %s %d in %.1f ms, tier %s, request %s",
                scope["method"],
                record.route,
                record.status,
                1000 * record.duration_s,
                record.tier_served or "none",
                record.request_id,
                extra={"fields": record.fields(scope["method"])},
            )
