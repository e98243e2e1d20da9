"""The record of each request, and the middleware that opens it, closes it and logs it."""

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
    """The trace of one request."""

    def headers(self) -> dict[str, str]:
        """Headers for the engine, which make its spans children of this one."""

    def end(self, method: str, record: "Record") -> None:
        """End the trace with the record of the answered request."""


@dataclass(kw_only=True)
class Record:
    """One request, filled in by the modules that serve it."""

    request_id: str
    client: str | None = None
    """Address of the client; behind a trusted proxy, the address that the proxy forwards."""
    route: str = "none"
    status: int = CLIENT_CLOSED_REQUEST
    """HTTP status of the answer; 499 if the client left before one began."""
    tier_asked: str | None = None
    tier_served: str | None = None
    first_token_s: float | None = None
    usage: Usage | None = None
    tenant: str | None = None
    engine: str | None = None
    """Address of the engine that was tried last."""
    waited_s: float = 0.0
    """Seconds in the queue."""
    budget_s: float | None = None
    is_deadline_met: bool | None = None
    """None if there was no deadline, or no answer."""
    is_truncated: bool = False
    is_shrunk: bool = False
    """Whether it was served at a smaller tier than it requested."""
    num_drops: int = 0
    """Members that were dropped, if the engine reports it."""
    is_broken: bool = False
    """Whether its stream ended with an error event."""
    trace: Trace | None = None
    duration_s: float = 0.0
    began_at: float = field(default_factory=time.perf_counter)

    @property
    def token_s(self) -> float | None:
        """Mean seconds per token after the first, of a complete stream; None if unknown or for fewer than two tokens."""
        if self.first_token_s is None or self.usage is None or self.usage.completion_tokens < 2:
            return None
        return (self.duration_s - self.first_token_s) / (self.usage.completion_tokens - 1)

    def fields(self, method: str) -> dict[str, object]:
        """The known fields, for a log. They contain nothing of a body or a key."""
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
        """Seconds since the request's head arrived."""
        return time.perf_counter() - self.began_at


class RecordMiddleware:
    """Gives each request an id and a `Record` (`request.state.record`), and passes the record to `observe` when it is answered."""

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
                    headers["connection"] = "close"  # so that the client's next request goes to another gateway
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
