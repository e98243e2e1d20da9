"""What strangers can do to the gateway over a bare socket: nothing that others notice."""

import contextlib
import gzip
import http.client
import json
import resource
import select
import socket
import time
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from chorus.population.errors import ChorusError
from chorus.population.manifest import Population
from chorus.serve.gateway.request.keys import Keys
from chorus.serve.gateway.transport import connections
from chorus.serve.gateway.transport.connections import MAX_HEAD_BYTES, MAX_HEAD_FIELDS, ConnectionLimits
from tests.live import wait_for
from tests.serve.gateway.conftest import Pair, gateway_before
from tests.serve.gateway.scripted import DONE, USAGE, WHOLE, ScriptedEngine, event
from tests.serve.gateway.test_keys import ALICE, entry, text

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
PROMPT = json.dumps({"prompt": "def", "max_tokens": 2}).encode()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that a test can wait for."""
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.6)
    monkeypatch.setattr(connections, "_LINGER_S", 0.6)
    monkeypatch.setattr(connections, "_SWEEP_S", 0.1)


def answering_whole() -> ScriptedEngine:
    engine = ScriptedEngine([WHOLE])
    engine.content_type = "application/json"
    return engine


@contextlib.contextmanager
def connected(pair: Pair) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", httpx.URL(pair.url).port or 0), timeout=20) as client:
        yield client


def post(body: bytes, *fields: bytes, version: bytes = b"1.1", path: bytes = b"/v1/completions") -> bytes:
    lines = [b"POST %s HTTP/%s" % (path, version), b"Host: x", b"Content-Length: %d" % len(body), *fields]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def read_all(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def read_answer(client: socket.socket) -> tuple[int, bytes]:
    answer = http.client.HTTPResponse(client)
    with contextlib.closing(answer):
        answer.begin()
        return answer.status, answer.read()


def is_well(pair: Pair) -> bool:
    return httpx.get(f"{pair.url}/health", timeout=5).status_code == 200


def flood(client: socket.socket, part: bytes, num_bytes: int) -> int:
    """Send `part` again and again; how many bytes were taken before the server closed."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < num_bytes:
            client.sendall(part)
            sent += len(part)
    return sent


# heads


@pytest.mark.parametrize(
    ("start", "part", "status"),
    [
        (b"GET /", b"a" * 65536, b" 414 "),
        (GET, b"a:\r\n" * 16384, b" 431 "),
        (GET, b"".join(b"x-%d: %s\r\n" % (i, b"a" * 1000) for i in range(64)), b" 431 "),
        (GET + b"X: ", b"a" * 65536, b" 431 "),
        (b"", b"\r\n" * 32768, b" 414 "),
        (b"", b"\x16\x03\x01" * 20000, b" 400 "),
    ],
    ids=["path", "fields", "long fields", "one field", "empty lines", "TLS"],
)
def test_a_head_without_end_is_refused_and_its_connection_closed(
    pair: Pair, start: bytes, part: bytes, status: bytes
) -> None:
    with connected(pair) as client:
        client.sendall(start)
        assert flood(client, part, 64 * 2**20) < 32 * 2**20
        answer = read_all(client)
    if answer:  # else it went with the reset
        assert status in answer.split(b"\r\n")[0]
    with connected(pair) as client:
        client.sendall(start + part[: 2 * MAX_HEAD_BYTES])
        answer = read_all(client)
    assert status in answer.split(b"\r\n")[0]
    assert b"connection: close" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert is_well(pair)


def test_an_endless_request_line_holds_nobody_up(pair: Pair) -> None:
    with connected(pair) as client:
        client.sendall(b"GET /")
        worst_s = 0.0
        for _ in range(20):
            flood(client, b"a" * 2**20, 5 * 2**20)
            began_at = time.monotonic()
            assert is_well(pair)
            worst_s = max(worst_s, time.monotonic() - began_at)
    assert worst_s < 1.0


def test_a_head_within_the_limits_passes(pair: Pair) -> None:
    fields = b"".join(b"x-%d: %s\r\n" % (i, b"a" * 200) for i in range(MAX_HEAD_FIELDS - 2))
    with connected(pair) as client:
        for part in (GET[:10], GET[10:], fields[:9999], fields[9999:], b"\r\n"):
            client.sendall(part)
        assert read_answer(client)[0] == 200


@pytest.mark.parametrize(
    "line", [b"GET /health HTTP/2.0", b"CONNECT x:1 HTTP/1.1", b"GET /\xff HTTP/1.1", b"PRI * HTTP/2.0"]
)
def test_what_is_not_http_1_is_refused_with_a_sentence(pair: Pair, line: bytes) -> None:
    with connected(pair) as client:
        client.sendall(line + b"\r\nHost: x\r\n\r\n")
        answer = read_all(client)
    assert 400 <= int(answer.split(b" ")[1]) < 600
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert is_well(pair)


def test_trailers_are_bounded_and_never_become_headers(pair: Pair) -> None:
    pair.engine.steps, pair.engine.content_type = [WHOLE], "application/json"
    chunked = post(b"", b"Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
    body = b"%x\r\n%s\r\n0\r\n" % (len(PROMPT), PROMPT)
    with connected(pair) as client:
        client.sendall(chunked + body + b"traceparent: 00-1\r\n\r\n")
        assert read_answer(client)[0] == 200
    assert "traceparent" not in pair.engine.headers[-1]
    for trailer in (b"x: " + b"a" * 65536, b"a: b\r\n" * 4096):
        with connected(pair) as client:
            client.sendall(chunked + body)
            flood(client, trailer, 8 * 2**20)
            assert b" 431 " in (read_all(client) or b" 431 ").split(b"\r\n")[0]
    with connected(pair) as client:
        client.sendall(chunked + b"1;")
        assert flood(client, b"a" * 65536, 64 * 2**20) < 32 * 2**20  # a chunk's extension


@pytest.mark.usefixtures("hurried")
def test_half_heads_time_out(pair: Pair) -> None:
    with connected(pair) as silent, connected(pair) as half, connected(pair) as lines:
        half.sendall(GET + b"X: ")
        began_at = time.monotonic()
        lines.settimeout(0.05)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < began_at + 10:  # a byte now and then does not help
                lines.sendall(b"\r\n")
                with contextlib.suppress(TimeoutError):
                    if not lines.recv(1000):
                        break
        assert b" 408 " in read_all(half)
        assert read_all(silent) == b""
        assert time.monotonic() - began_at < 8


@pytest.mark.usefixtures("hurried")
def test_a_half_head_behind_a_running_answer_does_not_cut_it(tiny: Population) -> None:
    steps = [event("a"), *([0.1, event("b")] * 12), USAGE, DONE]
    with gateway_before(ScriptedEngine(steps), tiny) as pair, connected(pair) as client:
        stream = json.dumps({"prompt": "a", "stream": True}).encode()
        client.sendall(post(stream) + b"GET /he")
        answer = read_all(client)
    assert answer.index(b"[DONE]") < answer.index(b" 408 ")


def test_requests_on_one_connection_are_answered_in_order_and_not_without_bound(pair: Pair) -> None:
    with connected(pair) as client:
        client.sendall((GET + b"\r\n") * 10)
        heard = b""
        while heard.count(b'{"status":"ok"}') < 10:
            heard += client.recv(65536)
        assert heard.count(b" 200 OK") == 10
        client.sendall((GET + b"\r\n") * 1000)
        answer = read_all(client)
    assert 1 <= answer.count(b" 200 OK") < 1000
    assert is_well(pair)


# connections


@pytest.mark.usefixtures("hurried")
def test_idle_connections_close_after_their_time(tiny: Population) -> None:
    limits = ConnectionLimits(idle_timeout_s=1)
    with gateway_before(answering_whole(), tiny, connections=limits) as pair, connected(pair) as client:
        for _ in range(2):
            client.sendall(GET + b"\r\n")
            assert read_answer(client)[0] == 200
            time.sleep(0.3)
        began_at = time.monotonic()
        assert client.recv(1) == b""
        assert 0.2 < time.monotonic() - began_at < 5


def test_connections_that_wait_make_room_for_new_ones(tiny: Population) -> None:
    limits = ConnectionLimits(max_connections=40, max_per_address=20)
    with gateway_before(ScriptedEngine(), tiny, connections=limits) as pair, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(pair)) for _ in range(200)]
        for client in held:
            with contextlib.suppress(ConnectionError):
                client.sendall(GET + b"X: ")
        assert is_well(pair)
        server = pair.server.server.server_state
        wait_for("the rest to be gone", lambda: len(server.connections) <= 20, timeout_s=5)


def test_one_address_cannot_take_all_connections(tiny: Population) -> None:
    limits = ConnectionLimits(max_connections=8, max_per_address=4)
    with gateway_before(ScriptedEngine([event("a"), 30.0]), tiny, connections=limits) as pair:
        stream = post(json.dumps({"prompt": "a", "stream": True}).encode())
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                client = stack.enter_context(connected(pair))
                client.sendall(stream)
                assert client.recv(100)
            with connected(pair) as fifth:
                status, body = read_answer(fifth)
            assert status == 429
            assert json.loads(body)["error"]["code"] == "too_many_connections"
            elsewhere = httpx.HTTPTransport(local_address="127.0.0.2")
            with httpx.Client(transport=elsewhere) as other:
                assert other.get(f"{pair.url}/health").status_code == 200
        wait_for("room", lambda: httpx.get(f"{pair.url}/health").status_code == 200, timeout_s=10)


def test_a_trusted_proxy_has_no_limit_of_its_own(tiny: Population) -> None:
    limits = ConnectionLimits(max_connections=8, max_per_address=2, trusted_proxies=("127.0.0.0/8",))
    engine = ScriptedEngine([event("a"), 30.0])
    with gateway_before(engine, tiny, connections=limits) as pair, contextlib.ExitStack() as stack:
        for _ in range(8):
            client = stack.enter_context(connected(pair))
            client.sendall(post(json.dumps({"prompt": "a", "stream": True}).encode()))
            assert b" 200 " in client.recv(100)
        with connected(pair) as ninth:
            assert read_answer(ninth)[0] == 503


def test_addresses_are_counted_as_their_networks() -> None:
    harness = connections.Connections(ConnectionLimits(trusted_proxies=("10.0.0.0/8", "fd00::/8")))
    assert harness._address("192.0.2.7") == "192.0.2.7"
    assert harness._address("::ffff:192.0.2.7") == "192.0.2.7"
    assert harness._address("2001:db8:1:2::9") == harness._address("2001:db8:1:2:ffff::1") == "2001:db8:1:2::/64"
    assert harness._address("10.1.2.3") is harness._address("::ffff:10.1.2.3") is harness._address("fd00::1") is None


def test_more_connections_than_open_files_allow_are_refused_at_the_start() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.raises(ChorusError, match="ulimit -n"):
        ConnectionLimits(max_connections=hard).resolved()
    assert ConnectionLimits(max_connections=8).resolved() == (8, 2)
    with pytest.raises(ChorusError, match=r"10\.0\.0\.0/8"):
        ConnectionLimits(trusted_proxies=("proxy.example",))


# bodies


@pytest.mark.parametrize("is_declared", [True, False])
def test_a_refused_body_is_not_swallowed(tiny: Population, is_declared: bool) -> None:
    limits = ConnectionLimits(max_discarded_bytes=200_000)
    with gateway_before(ScriptedEngine(), tiny, connections=limits, max_body_bytes=100_000) as pair:
        head = b"Content-Length: 1000000000" if is_declared else b"Transfer-Encoding: chunked"
        part = b"a" * 2**16 if is_declared else b"10000\r\n" + b"a" * 2**16 + b"\r\n"
        with connected(pair) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
            assert flood(client, part, 2**30) < 64 * 2**20
            assert b" 413 " in (read_all(client) or b" 413 ")
        with httpx.Client() as client:
            # A little too much is read to its end, so that every client sees the answer.
            for _ in range(3):
                answer = client.post(f"{pair.url}/v1/completions", content=b"a" * 150_000)
                assert answer.status_code == 413
            assert client.get(f"{pair.url}/health").status_code == 200
        assert not pair.engine.bodies


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("POST", "/nothing"), ("POST", "/v1/completions")])
@pytest.mark.usefixtures("hurried")
def test_half_bodies_time_out(tiny: Population, method: str, path: str) -> None:
    with gateway_before(ScriptedEngine(), tiny, body_timeout_s=0.5) as pair, connected(pair) as client:
        client.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc".encode())
        began_at = time.monotonic()
        answer = read_all(client)
        assert time.monotonic() - began_at < 8
        status = {"/health": b"200", "/nothing": b"404"}.get(path, b"408")
        assert answer.startswith(b"HTTP/1.1 " + status)


def test_half_bodies_hold_a_bounded_amount_and_honest_ones_pass(tiny: Population) -> None:
    options = {"max_body_bytes": 2**20, "max_bodies_bytes": 4 * 2**20}
    with gateway_before(answering_whole(), tiny, **options) as pair, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(pair)) for _ in range(20)]
        for client in clients:
            with contextlib.suppress(ConnectionError):
                client.sendall(post(b"a" * 2**20)[:-1000])
        # Those that began first are given up: four of their size stay.
        wait_for("refusals", lambda: len(select.select(clients, [], [], 0)[0]) >= 16, timeout_s=20)
        assert pair.gateway.bodies._held_bytes <= 4 * 2**20
        long = json.dumps({"prompt": "a" * 900_000, "max_tokens": 1}).encode()
        assert httpx.post(f"{pair.url}/v1/completions", content=long, timeout=20).status_code == 200
    assert pair.gateway.bodies._held_bytes == 0


def test_the_rate_is_taken_before_the_body_is_read(tiny: Population) -> None:
    keys = Keys(text=text(entry("alice", ALICE, requests_per_s=0.01)))
    with gateway_before(answering_whole(), tiny, keys=keys) as pair:
        key = b"Authorization: Bearer " + ALICE.encode()
        with connected(pair) as first, connected(pair) as second, connected(pair) as stranger:
            first.sendall(post(PROMPT, key)[:-5])
            wait_for("the first to be read", lambda: pair.gateway.bodies._reading, timeout_s=5)
            for path in (b"/v1/completions", b"/v1/chat/completions", b"/tokenize", b"/v1/population/disagreement"):
                second.sendall(post(b"12345", key, path=path)[:-5])
                assert read_answer(second)[0] == 429
                second.sendall(b"12345")  # the connection goes on after the rest of a refused body
            stranger.sendall(post(PROMPT)[:-5])
            assert read_answer(stranger)[0] == 401
            first.sendall(PROMPT[-5:])
            assert read_answer(first)[0] == 200


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "deflate", "GZIP"])
def test_a_compressed_body_is_decoded(tiny: Population, coding: str) -> None:
    packed = zlib.compress(PROMPT) if coding == "deflate" else gzip.compress(PROMPT)
    with gateway_before(answering_whole(), tiny) as pair:
        answer = httpx.post(f"{pair.url}/v1/completions", content=packed, headers={"Content-Encoding": coding})
        assert answer.status_code == 200
        assert pair.engine.bodies[-1]["prompt"] == "def"


@pytest.mark.parametrize(
    ("coding", "body", "status", "code"),
    [
        ("gzip", gzip.compress(b"a" * 5_000_000), 413, "body_too_long"),
        ("gzip", gzip.compress(PROMPT)[:-4], 400, "malformed_encoding"),
        ("gzip", gzip.compress(PROMPT) + b"more", 400, "malformed_encoding"),
        ("gzip", PROMPT, 400, "malformed_encoding"),
        ("br", PROMPT, 415, "unsupported_content_encoding"),
        ("gzip, gzip", PROMPT, 415, "unsupported_content_encoding"),
    ],
    ids=["bomb", "cut", "longer", "plain", "brotli", "twice"],
)
def test_compressed_bodies_are_bounded_and_others_refused_with_a_sentence(
    pair: Pair, coding: str, body: bytes, status: int, code: str
) -> None:
    answer = httpx.post(f"{pair.url}/v1/completions", content=body, headers={"Content-Encoding": coding})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code


# other clients


@pytest.mark.parametrize("is_chunked", [False, True])
def test_an_offer_of_another_protocol_is_ignored_and_the_body_kept(tiny: Population, is_chunked: bool) -> None:
    """Every JDK HttpClient offers h2c (quarkusio/quarkus 24383, encode/uvicorn 1501)."""
    offer = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAEAAEAAAAIAAAAA")
    request = post(PROMPT, *offer)
    if is_chunked:
        parts = [PROMPT[i : i + 9] for i in range(0, len(PROMPT), 9)]
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        length = b"Content-Length: %d" % len(PROMPT)
        request = post(PROMPT, *offer).replace(length, b"Transfer-Encoding: chunked")[: -len(PROMPT)] + chunks
    with gateway_before(answering_whole(), tiny) as pair, connected(pair) as client:
        for _ in range(2):
            client.sendall(request)
            assert read_answer(client)[0] == 200
            assert pair.engine.bodies[-1]["prompt"] == "def"
        head, rest = request[:60], request[60:]
        client.sendall(head)
        time.sleep(0.05)
        client.sendall(rest[:-10])
        time.sleep(0.05)
        client.sendall(rest[-10:])
        assert read_answer(client)[0] == 200
        client.sendall(GET + b"\r\n".join(offer) + b"\r\n\r\n")
        assert read_answer(client)[0] == 200
        client.sendall((GET + b"\r\n".join(offer) + b"\r\n\r\n") * 2000)
        assert b" 200 " in read_all(client)
        assert is_well(pair)


@pytest.mark.parametrize("streams", [True, False])
def test_http_1_0_clients_read_answers_to_their_end(tiny: Population, streams: bool) -> None:
    engine = ScriptedEngine([event("a"), 0.05, event("b"), USAGE, DONE]) if streams else answering_whole()
    with gateway_before(engine, tiny) as pair, connected(pair) as client:
        client.sendall(post(json.dumps({"prompt": "a", "stream": streams}).encode(), version=b"1.0"))
        head, _, body = read_all(client).partition(b"\r\n\r\n")
        assert b" 200 " in head
        assert b"connection: close" in head.lower()
        assert b"transfer-encoding" not in head.lower()
        if streams:
            assert body.startswith(b"data: {")
            assert body.endswith(b"data: [DONE]\n\n")
            assert all(line.startswith(b"data: ") for line in body.split(b"\n\n") if line)
        else:
            assert json.loads(body)["choices"][0]["text"] == "abc"


@pytest.mark.parametrize("path", ["/health/", "/v1/models/", "/v1/completions/", "/docs/", "//evil.example/v1/models/"])
def test_nothing_redirects(pair: Pair, path: str) -> None:
    for method in ("GET", "POST"):
        answer = httpx.request(method, pair.url + path, headers={"Host": "evil.example"})
        assert answer.status_code in (404, 405)
        assert "location" not in answer.headers


@pytest.mark.parametrize("host", [b"[x", b"evil.example/health?", b"\xff", b""])
def test_no_host_breaks_an_error(pair: Pair, host: bytes) -> None:
    with connected(pair) as client:
        client.sendall(b"GET /nothing HTTP/1.1\r\nHost: %s\r\n\r\n" % host)
        status, body = read_answer(client)
    assert status == 404
    assert json.loads(body)["error"]["message"].startswith("GET /nothing:")


@pytest.mark.parametrize(
    "path", ["/", "/health", "/ready", "/metrics", "/version", "/v1/models", "/docs", "/openapi.json"]
)
def test_head_is_answered_as_get_without_a_body(pair: Pair, path: str) -> None:
    answer = httpx.head(pair.url + path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == httpx.get(pair.url + path).headers["content-type"]
    assert not answer.content
    assert httpx.head(f"{pair.url}/v1/completions").status_code == 405


def test_forwarded_headers_count_from_trusted_proxies_only(tiny: Population, caplog: pytest.LogCaptureFixture) -> None:
    def client_logged(**limits: Any) -> object:
        caplog.clear()
        forwarded = {"X-Forwarded-For": "192.0.2.7", "X-Forwarded-Proto": "https"}
        with gateway_before(ScriptedEngine(), tiny, connections=ConnectionLimits(**limits)) as pair:
            httpx.get(f"{pair.url}/health", headers=forwarded)
        fields = [getattr(record, "fields", {}) for record in caplog.records]
        return next(each["client"] for each in fields if each.get("route") == "/health")

    caplog.set_level("INFO")
    assert client_logged() == "127.0.0.1"
    assert client_logged(trusted_proxies=("192.0.2.0/24",)) == "127.0.0.1"
    assert client_logged(trusted_proxies=("127.0.0.1",)) == "192.0.2.7"


def test_pages_of_other_origins_are_let_in_only_where_they_are_named(tiny: Population) -> None:
    origin = {"Origin": "https://app.example.com"}
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    keys = Keys(text=text(entry("alice", ALICE)))
    with gateway_before(answering_whole(), tiny, keys=keys) as pair:
        assert httpx.options(f"{pair.url}/v1/completions", headers=preflight).status_code == 405
        assert "access-control-allow-origin" not in httpx.get(f"{pair.url}/health", headers=origin).headers
    with gateway_before(answering_whole(), tiny, keys=keys, allow_origins=("https://app.example.com",)) as pair:
        allowed = httpx.options(f"{pair.url}/v1/completions", headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://app.example.com"
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        other = {**preflight, "Origin": "https://evil.example"}
        assert "access-control-allow-origin" not in httpx.options(f"{pair.url}/v1/completions", headers=other).headers
        refused = httpx.post(f"{pair.url}/v1/completions", content=PROMPT, headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example.com"
        assert "x-request-id" in refused.headers["access-control-expose-headers"]


def test_an_origin_that_no_browser_sends_is_refused_at_the_start(tiny: Population) -> None:
    with (
        pytest.raises(ChorusError, match="SCHEME://HOST"),
        gateway_before(ScriptedEngine(), tiny, allow_origins=("app.example.com/",)),
    ):
        pass


# slow readers


def resident_mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


@pytest.mark.usefixtures("hurried")
def test_a_client_that_reads_nothing_holds_little_and_not_for_ever(
    tiny: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_WRITE_GRACE_S", 0.5)
    monkeypatch.setattr(connections, "_MIN_READ_BYTES_PER_S", 2**18)
    long = event("a" * 60_000)
    engine = ScriptedEngine([long] * 4000)
    with gateway_before(engine, tiny) as pair, connected(pair) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        before = resident_mib()
        client.sendall(post(json.dumps({"prompt": "a", "stream": True}).encode()))
        server = pair.server.server.server_state
        wait_for("the answer to begin", lambda: client.recv(100), timeout_s=10)
        peak, held = 0.0, True
        deadline = time.monotonic() + 20
        while held and time.monotonic() < deadline:
            peak = max(peak, resident_mib() - before)
            time.sleep(0.05)
            held = bool(server.connections)
        assert not held
        assert peak < 60  # of 240 MB, the engine's own buffers included
        engines = pair.gateway.engines
        wait_for("its seat to be free", lambda: not any(each.traffic.num_sequences for each in engines), timeout_s=10)


@pytest.mark.usefixtures("hurried")
def test_an_unread_whole_answer_does_not_hold_its_connection_for_ever(
    tiny: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_WRITE_GRACE_S", 0.5)
    monkeypatch.setattr(connections, "_MIN_READ_BYTES_PER_S", 2**26)
    engine = answering_whole()
    engine.steps = [WHOLE.replace(b'"abc"', b'"' + b"a" * (12 * 2**20) + b'"')]
    with gateway_before(engine, tiny) as pair, connected(pair) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(post(PROMPT, b"Connection: close"))
        assert client.recv(100)
        server = pair.server.server.server_state
        wait_for("it to be cut", lambda: not server.connections, timeout_s=15)
