"""The client's side of a request: the head, events or body of its answer, and how that ends."""

import asyncio

from starlette.types import Send

from chorus.serve.gateway.observe.record import Record
from chorus.serve.gateway.relay.forms import Form
from chorus.serve.gateway.request.errors import ApiError

TIER_HEADER = b"x-chorus-tier"
EVENT_STREAM = "text/event-stream"


class Reply:
    """What was sent to the client so far. Errors can have their own status until it `has_begun`, and are events from then on."""

    def __init__(self, send: Send, record: Record, form: Form, *, stall_s: float) -> None:
        """`stall_s`: longest time, in seconds, that a client may take for the end of its answer."""
        self._send = send
        self._stall_s = stall_s
        self._record = record
        self._form = form
        self.has_begun = False
        self.is_complete = False

    async def begin_stream(self, tier: str) -> None:
        """Send the head of a stream, answered by `tier`."""
        # No proxy is to hold events back.
        headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self._begin(tier, f"{EVENT_STREAM}; charset=utf-8", headers)

    async def send_events(self, events: bytes) -> None:
        """Pass whole events on."""
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def send_whole(self, tier: str, body: bytes) -> None:
        """Send a whole answer, by `tier`."""
        await self._begin(tier, "application/json", [(b"content-length", str(len(body)).encode())])
        await self.end(body)

    async def end(self, body: bytes = b"") -> None:
        """Send the last of it. If the client does not take it, the answer is cut off: the server then closes the connection."""
        self.is_complete = True
        try:
            async with asyncio.timeout(self._stall_s):
                await self._send({"type": "http.response.body", "body": body})
        except TimeoutError:
            self._record.is_broken = True

    async def fail(self, error: ApiError) -> None:
        """End a stream that has begun with an error event.

        Raises:
            ApiError: `error`, if nothing was sent yet: it is answered with its own status.
        """
        if not self.has_begun:
            raise error
        self._record.is_broken = True
        await self.end(self._form.error_event(error))

    async def _begin(self, tier: str, content_type: str, headers: list[tuple[bytes, bytes]]) -> None:
        self.has_begun = True
        known = [(b"content-type", content_type.encode()), (TIER_HEADER, tier.encode())]
        await self._send({"type": "http.response.start", "status": 200, "headers": [*known, *headers]})


def stream_broken(why: str) -> ApiError:
    """The error of a stream that cannot go on."""
    return ApiError(503, f"{why} before the stream was complete; send the request again.", code="stream_broken")
