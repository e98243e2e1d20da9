"""Client connections: uvicorn's HTTP/1 protocol, with bounds on what a stranger can send or hold.

httptools parses fast but bounds nothing, so this module bounds heads, framing, time and the number of connections; `bodies` bounds
bodies where they are read. h11 bounds heads only, and takes three times as long per request and five times per streamed event
(bench/LOG.md). Depends on internals of uvicorn 0.54's `HttpToolsProtocol`.
"""

import asyncio
import ipaddress
import json
import logging
import resource
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from chorus.population.errors import ChorusError
from chorus.serve.gateway.request.errors import ApiError

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 32 * 2**10
MAX_HEAD_FIELDS = 128
MAX_PIPELINED = 16
HEAD_TIMEOUT_S = 10.0
"""From the first byte of a request to the end of its head, and from the opening of a connection to its first byte."""
_LINGER_S = 5.0
"""How long the rest of an unread body is still accepted, so that its sender sees the answer before the connection closes."""
_MIN_READ_BYTES_PER_S = 16 * 2**10
"""Rate at which a client must take its buffered data, after `_WRITE_GRACE_S`."""
_WRITE_GRACE_S = 60.0
_SWEEP_S = 1.0
_REPORT_S = 60.0

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """How many connections are kept open, and for how long."""

    max_connections: int | None = None
    """Connections in all, at most half of this process's limit on open files; None for 4,096 or that half, if it is less."""
    max_per_address: int | None = None
    """Connections from one IPv4 address or IPv6 /64 network; None for a quarter of all."""
    idle_timeout_s: int = 75
    """Longest time between two requests on a connection."""
    max_discarded_bytes: int = 2 * 2**20
    """How much of the rest of a refused body is read and discarded before the connection closes."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses and networks whose X-Forwarded-For and X-Forwarded-Proto are trusted, and which have no limit per address."""

    def __post_init__(self) -> None:
        for proxy in self.trusted_proxies:
            _network(proxy)

    @property
    def networks(self) -> tuple[Network, ...]:
        """The trusted proxies."""
        return tuple(map(_network, self.trusted_proxies))

    def resolved(self) -> "tuple[int, int]":
        """Most connections in all and from one address. Raises this process's limit on open files as far as allowed.

        Raises:
            ChorusError: the limit on open files is too low for `max_connections`.
        """
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
                soft = hard
            except (OSError, ValueError):
                pass  # some systems allow less than their hard limit
        limit = 2**31 if soft == resource.RLIM_INFINITY else soft // 2
        if self.max_connections is not None and self.max_connections > limit:
            raise ChorusError(
                f"--max-connections {self.max_connections} needs {2 * self.max_connections} open files, but the limit is {soft}. "
                "Raise the limit (`ulimit -n`, LimitNOFILE) or lower --max-connections."
            )
        num = self.max_connections or min(4096, limit)
        return num, min(num, self.max_per_address or max(1, num // 4))


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ChorusError(
            f"--trusted-proxy {text!r} is not an address or a network; use one such as 10.0.0.0/8."
        ) from None


def server_options(limits: ConnectionLimits) -> dict[str, Any]:
    """Options of a `uvicorn.Config` that serves under these limits."""
    return {
        "http": partial(Connection, Connections(limits)),
        "ws": "none",
        "timeout_keep_alive": limits.idle_timeout_s,
        "proxy_headers": bool(limits.trusted_proxies),
        "forwarded_allow_ips": list(limits.trusted_proxies),
        "server_header": False,
        "access_log": False,
        "log_config": None,
    }


@dataclass(kw_only=True, eq=False)
class _Peer:
    """The connections of one address."""

    count: int = 0
    waiting: "dict[Connection, None]" = field(default_factory=dict)


class Connections:
    """All open connections. At a limit, the one that has waited longest for a request is closed to make room."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._networks = limits.networks
        self._max_connections, self._max_per_address = limits.resolved()
        self._all: dict[Connection, str | None] = {}
        self._waiting: dict[Connection, None] = {}
        self._peers: dict[str | None, _Peer] = {}
        self._refused: Counter[str] = Counter()
        self._reported_at = 0.0
        self._sweeping: asyncio.TimerHandle | None = None

    def enter(self, connection: "Connection", host: str | None) -> ApiError | None:
        """Count a new connection, which waits for its first request. If there is no room for it, return the error."""
        address = self._address(host)
        peer = self._peers.setdefault(address, _Peer())
        if address is not None and peer.count >= self._max_per_address and not self._evict(peer.waiting):
            return ApiError(
                429,
                f"your address has {peer.count} open connections, the maximum; close some or try again later.",
                code="too_many_connections",
                headers={"Retry-After": "1"},
            )
        if len(self._all) >= self._max_connections and not self._evict(self._waiting):
            if not peer.count:
                del self._peers[address]
            return ApiError(
                503,
                f"the gateway has {len(self._all)} open connections, the maximum; try again later.",
                code="too_many_connections",
                headers={"Retry-After": "1"},
            )
        self._all[connection] = address
        peer = self._peers.setdefault(address, peer)  # the eviction may have removed it
        peer.count += 1
        self.note_waiting(connection)
        if self._sweeping is None:
            self._sweeping = connection.loop.call_later(_SWEEP_S, self._sweep, connection.loop)
        return None

    def leave(self, connection: "Connection") -> None:
        """The connection is closed or about to be."""
        if connection not in self._all:
            return
        self.note_busy(connection)
        address = self._all.pop(connection)
        peer = self._peers[address]
        peer.count -= 1
        if not peer.count:
            del self._peers[address]

    def note_waiting(self, connection: "Connection") -> None:
        """The connection has no request in progress."""
        if (address := self._all.get(connection, ...)) is not ...:
            self._waiting[connection] = None
            self._peers[address].waiting[connection] = None

    def note_busy(self, connection: "Connection") -> None:
        """The head of a request on the connection is complete."""
        if self._waiting.pop(connection, ...) is not ...:
            self._peers[self._all[connection]].waiting.pop(connection, None)

    def note_refused(self, code: str) -> None:
        """A connection was refused or cut."""
        self._refused[code] += 1

    def _address(self, host: str | None) -> str | None:
        """The address or network that `host` counts towards; None if it has no limit per address."""
        try:
            found = ipaddress.ip_address(host or "")
        except ValueError:
            return None  # a Unix socket
        if isinstance(found, ipaddress.IPv6Address):
            found = found.ipv4_mapped or found
        if any(found in network for network in self._networks):
            return None
        return str(found) if found.version == 4 else str(ipaddress.ip_network((found, 64), strict=False))

    def _evict(self, waiting: "dict[Connection, None]") -> bool:
        if (oldest := next(iter(waiting), None)) is None:
            return False
        self.note_refused("made_room")
        self.leave(oldest)
        oldest.transport.abort()
        return True

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in list(self._all):
            connection.check(now)
        if self._refused and now - self._reported_at >= _REPORT_S:
            logger.warning(
                "connections refused or cut: %s", ", ".join(f"{n} {why}" for why, n in self._refused.items())
            )
            self._refused.clear()
            self._reported_at = now
        self._sweeping = loop.call_later(_SWEEP_S, self._sweep, loop) if self._all else None


class Connection(HttpToolsProtocol):
    """One client's connection."""

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._connections = connections
        self._reads_head = True
        """Whether the next byte belongs to a head; else to a body, its framing or its trailers."""
        self._head_began_at: float | None = None
        self._head_bytes = 0
        self._overhead_bytes = 0
        """Bytes received since a head was complete or a body grew: parts of heads, chunk extensions, trailers."""
        self._made_progress = False
        self._num_trailers = 0
        self._discarded_bytes = 0
        self._error: ApiError | None = None
        """What to answer if a callback stopped the parser."""
        self._is_ending = False
        """Whether further input is discarded."""
        self._ends_at: float | None = None
        self._flushed_by: float | None = None
        """When the client must have taken its buffered data."""

    # transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        host = self.client[0] if self.client else None
        if error := self._connections.enter(self, host):
            self._connections.note_refused(error.code)
            self._is_ending = True
            self._answer(error)
            self.transport.close()
            return
        self.timeout_keep_alive_task = self.loop.call_later(HEAD_TIMEOUT_S, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.leave(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._flushed_by = self._flush_deadline(self.loop.time())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._flushed_by = None

    def data_received(self, data: bytes) -> None:
        if self._is_ending:
            self._discard(len(data))
            return
        self._unset_keepalive_if_required()
        if self._reads_head and self._head_began_at is None:
            self._head_began_at = self.loop.time()
        self._made_progress = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(self._error or ApiError(400, "the request is not valid HTTP/1.", code="malformed_http"))
        else:
            self._overhead_bytes = 0 if self._made_progress else self._overhead_bytes + len(data)
            if self._overhead_bytes > MAX_HEAD_BYTES:
                self._refuse(self._too_large())

    def check(self, now: float) -> None:
        """Close the connection if it takes too long."""
        if self._flushed_by is None and not self._is_answering and self.transport.get_write_buffer_size():
            self._flushed_by = self._flush_deadline(now)
        if self._flushed_by is not None and now > self._flushed_by:
            if self.transport.get_write_buffer_size():
                self._connections.note_refused("slow_reader")
                self.transport.abort()
                return
            self._flushed_by = None
        if self._ends_at is not None and now > self._ends_at:
            self.transport.close()
        elif self._head_began_at is not None and not self._is_answering and now - self._head_began_at > HEAD_TIMEOUT_S:
            self._refuse(
                ApiError(
                    408,
                    f"the request's head did not arrive within {HEAD_TIMEOUT_S:g} s; send the request again.",
                    code="head_timeout",
                )
            )

    # parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = self._num_trailers = 0
        if self._head_began_at is None:  # pipelined: received in the same read as another request
            self._head_began_at = self.loop.time()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._grow_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._reads_head:  # a trailer: not used, and must not pass for a header
            self._num_trailers += 1
            if self._num_trailers > MAX_HEAD_FIELDS:
                raise self._stop(self._too_large())
            return
        super().on_header(name, value)
        self._grow_head(len(name) + len(value))
        if len(self.headers) > MAX_HEAD_FIELDS:
            raise self._stop(self._too_large())

    def on_headers_complete(self) -> None:
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise self._stop(
                ApiError(505, f"HTTP/{version} is not supported; use HTTP/1.1.", code="http_version_not_supported")
            )
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise self._stop(
                    ApiError(405, "CONNECT is not supported: the gateway is not a proxy.", code="method_not_allowed")
                )
            return  # see _decline_upgrade
        if len(self.pipeline) >= MAX_PIPELINED:
            raise self._stop(
                ApiError(
                    429,
                    f"more than {MAX_PIPELINED} requests are pipelined on one connection; wait for answers.",
                    code="too_many_requests",
                )
            )
        super().on_headers_complete()
        self._reads_head = False
        self._head_began_at = None
        self._made_progress = True
        self._connections.note_busy(self)

    def on_body(self, body: bytes) -> None:
        self._made_progress = True
        if self.cycle.response_complete:
            self._discard(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._reads_head = True
        self._discarded_bytes, self._ends_at = 0, None
        if self.cycle.response_complete:
            self._connections.note_waiting(self)

    # uvicorn

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_answering or self.transport.is_closing():
            return
        if self._reads_head:
            self._connections.note_waiting(self)
        else:
            self._ends_at = self.loop.time() + _LINGER_S

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, _until_close(app, cycle) if cycle.scope["http_version"] == "1.0" else app)

    # own helpers

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _flush_deadline(self, now: float) -> float:
        return now + _WRITE_GRACE_S + self.transport.get_write_buffer_size() / _MIN_READ_BYTES_PER_S

    def _grow_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise self._stop(self._too_large())

    def _stop(self, error: ApiError) -> Exception:
        """Store the answer and return the error, to be raised from a callback of the parser."""
        self._error = error
        return error

    def _too_large(self) -> ApiError:
        if self._reads_head and not self.headers:
            return ApiError(414, f"the request line exceeds {MAX_HEAD_BYTES} bytes; shorten it.", code="uri_too_long")
        return ApiError(
            431,
            f"the request's head exceeds {MAX_HEAD_BYTES} bytes or {MAX_HEAD_FIELDS} fields; shorten it.",
            code="request_header_fields_too_large",
        )

    def _decline_upgrade(self, rest: bytes) -> None:
        """Answer the request as if it had offered no other protocol; every JDK's HttpClient offers one (h2c).

        The parser leaves what follows such a head to the other protocol, so a new parser reads the head again without the offer.
        """
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/1.1\r\n"]
        for name, value in self.headers:
            if name not in (b"upgrade", b"http2-settings"):
                head += [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(b"".join([*head, b"\r\n", rest]))

    def _discard(self, num_bytes: int) -> None:
        self._discarded_bytes += num_bytes
        if self._discarded_bytes > self._connections.limits.max_discarded_bytes and not self.transport.is_closing():
            self._connections.note_refused("body_dropped")
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """End the connection with `error`, after the answers to earlier complete requests."""
        self._connections.note_refused(error.code)
        self._is_ending = True
        self._head_began_at = None
        if self._is_answering:
            if self._reads_head:
                self.cycle.keep_alive = False
                return
            self.cycle.disconnected = True  # the error is in the body of the request being answered
            self.cycle.message_event.set()
            if self.cycle.response_started or self.pipeline:
                self.transport.close()
                return
        self._ends_at = self.loop.time() + _LINGER_S
        self._answer(error)
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _answer(self, error: ApiError) -> None:
        body = json.dumps(error.body(), separators=(",", ":")).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **error.headers,
        }
        lines = [f"{name}: {value}\r\n".encode() for name, value in headers.items()]
        default = [name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers]
        self.transport.write(b"".join([STATUS_LINE[error.status], *default, *lines, b"\r\n", body]))


def _until_close(app: Any, cycle: RequestResponseCycle) -> Callable[..., Awaitable[None]]:
    """For HTTP/1.0, which has no chunked encoding: an answer of unknown length ends when the connection closes."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        is_bounded = False

        async def send_plain(message: Any) -> None:
            nonlocal is_bounded
            if message["type"] == "http.response.start":
                is_bounded = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
                if not is_bounded:
                    cycle.chunked_encoding = False
            elif not is_bounded:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return answer
