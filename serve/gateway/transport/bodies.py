"""Read and decode request bodies, with bounds on length, time and the memory held by all of them together."""

import asyncio
import zlib

from fastapi import Request

from chorus.serve.gateway.request.errors import ApiError, bad_request

_IDENTITY = ("", "identity")
_ZLIB = ("gzip", "x-gzip", "deflate")
_EITHER_HEADER = 32 + zlib.MAX_WBITS
"""Makes zlib detect whether a stream is gzip's or zlib's (`deflate`)."""


class Bodies:
    """Reads bodies. When the bodies still arriving hold too much together, the one that began first is given up."""

    def __init__(self, *, max_bytes: int, max_total_bytes: int, timeout_s: float) -> None:
        self._max_bytes = max_bytes
        self._max_total_bytes = max_total_bytes
        self._timeout_s = timeout_s
        self._held_bytes = 0
        self._reading: dict[asyncio.Timeout, int] = {}
        """Bytes held by each body still arriving; one that is given up is removed."""

    async def read(self, request: Request, max_bytes: int | None = None) -> bytes:
        """The request's body, decoded. It is refused as soon as it exceeds `max_bytes` (by default the limit for all bodies).

        Raises:
            ApiError: 413 if it is too long, 408 if it is late or was given up, 415 for an unknown coding, 400 if it is not
                valid in its coding.
        """
        max_bytes = self._max_bytes if max_bytes is None else max_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > max_bytes:
            raise _too_long(max_bytes)
        coding = request.headers.get("content-encoding", "").strip().lower()
        if coding not in (*_IDENTITY, *_ZLIB):
            raise ApiError(
                415,
                f"content-encoding {coding[:40]!r} is not supported; use gzip, deflate or none.",
                code="unsupported_content_encoding",
                headers={"Accept-Encoding": "gzip, deflate"},
            )
        body = await self._collect(request, max_bytes)
        return _decode(body, coding, max_bytes) if coding in _ZLIB else body

    async def _collect(self, request: Request, max_bytes: int) -> bytes:
        parts, length = [], 0
        try:
            async with asyncio.timeout(self._timeout_s) as timeout:
                self._reading[timeout] = 0
                try:
                    async for part in request.stream():
                        parts.append(part)
                        length += len(part)
                        if length > max_bytes:
                            raise _too_long(max_bytes)
                        if timeout in self._reading:
                            self._reading[timeout] += len(part)
                            self._held_bytes += len(part)
                        while self._held_bytes > self._max_total_bytes:
                            self._cancel_oldest()
                finally:
                    self._held_bytes -= self._reading.pop(timeout, 0)
        except TimeoutError:
            message = f"the body did not arrive within {self._timeout_s:g} s, or memory for bodies ran out; send the request again."
            raise ApiError(408, message, code="body_timeout", headers={"Connection": "close"}) from None
        return b"".join(parts)

    def _cancel_oldest(self) -> None:
        oldest = next(iter(self._reading))
        self._held_bytes -= self._reading.pop(oldest)
        if not oldest.expired():
            oldest.reschedule(asyncio.get_running_loop().time())


def _decode(body: bytes, coding: str, max_bytes: int) -> bytes:
    decoder = zlib.decompressobj(_EITHER_HEADER)
    try:
        decoded = decoder.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise bad_request(f"the body is not valid {coding}: {error}.", code="malformed_encoding") from None
    if len(decoded) > max_bytes:
        raise _too_long(max_bytes)
    if not decoder.eof or decoder.unused_data:
        what = "has data after its end" if decoder.eof else "is truncated"
        raise bad_request(f"the body's {coding} stream {what}.", code="malformed_encoding")
    return decoded


def _too_long(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body exceeds the limit of {max_bytes} bytes; send a smaller one.", code="body_too_long")
