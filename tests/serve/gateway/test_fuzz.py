"""Whatever a client sends, it is told what is wrong with it: never a failure of the gateway, never another tenant's rights."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from chorus.population.manifest import Population
from chorus.serve.gateway.request.keys import Keys
from tests.serve.gateway.conftest import Pair, gateway_before
from tests.serve.gateway.scripted import ScriptedEngine
from tests.serve.gateway.test_keys import ALICE, BOB, entry, text

ROUTES = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
EXAMPLES = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
OURS = ("model", "budget", "min_budget", "latency_budget_ms", "on_deadline", "vllm_xargs", "stream", "stream_options")
SIZES = ("prompt", "messages", "max_tokens", "max_completion_tokens", "n", "prompt_embeds", "tokens")
fields = st.fixed_dictionaries({}, optional=dict.fromkeys((*OURS, *SIZES), values))


@pytest.fixture(scope="module")
def guarded(tiny: Population) -> Iterator[Pair]:
    engine = ScriptedEngine()
    engine.echo = True
    keys = Keys(text=text(entry("alice", ALICE, tiers=["economy"]), entry("bob", BOB)))
    with gateway_before(engine, tiny, keys=keys) as pair:
        yield pair


def send(pair: Pair, route: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
    return httpx.post(pair.url + route, content=body, headers=headers, timeout=20)


def check(answer: httpx.Response) -> None:
    """Refused as the client's fault, in OpenAI's shape, or served."""
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert answer.json()["error"]["type"] == "invalid_request_error"


@EXAMPLES
@given(st.sampled_from(ROUTES), st.binary(max_size=200))
@example("/v1/completions", b"[" * 100_000)
@example("/v1/completions", b'{"prompt": ' + b"9" * 5000 + b"}")
@example("/v1/completions", b'{"prompt": "\\ud800"}')
@example("/v1/completions", b'{"prompt": "a", "n": 1e400}')
@example("/v1/completions", b"\xff\xfe{\x00}\x00")
def test_bytes_that_are_no_request_are_refused(guarded: Pair, route: str, body: bytes) -> None:
    assume(body.strip() != b"{}")  # which is a request, to cut nothing into tokens
    answer = send(guarded, route, body, {"Authorization": f"Bearer {BOB}"})
    check(answer)
    assert answer.status_code != 200


@EXAMPLES
@given(st.sampled_from(ROUTES[:2]), fields)
@example("/v1/completions", {"prompt": "a", "n": 2**70})
@example("/v1/completions", {"prompt": "a", "latency_budget_ms": 5e-324})
@example("/v1/completions", {"prompt": [[]], "max_tokens": 2**70})
@example("/v1/chat/completions", {"messages": {"a": 1}, "prompt": "x"})
def test_fields_of_any_kind_are_served_or_refused(guarded: Pair, route: str, body: dict[str, Any]) -> None:
    seen = len(guarded.engine.bodies)
    answer = send(
        guarded, route, json.dumps({**{"prompt": "a"}, **body}).encode(), {"Authorization": f"Bearer {ALICE}"}
    )
    check(answer)
    for sent in guarded.engine.bodies[seen:]:  # alice has one tier, whatever she says
        assert sent["vllm_xargs"]["chorus_tier"] == "economy"


header_values = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60)
headers = st.dictionaries(
    st.sampled_from(
        ["x-request-id", "traceparent", "tracestate", "content-type", "accept", "x-chorus-tier", "cookie", "te"]
    ),
    header_values,
    max_size=5,
)


@EXAMPLES
@given(headers, header_values)
@example({"x-chorus-tier": "max"}, f"Bearer {ALICE}")
def test_headers_of_any_kind_open_nothing(guarded: Pair, sent: dict[str, str], authorization: str) -> None:
    body = b'{"prompt": "a", "budget": "max"}'
    refused = send(guarded, "/v1/completions", body, {**sent, "Authorization": authorization})
    check(refused)
    assert refused.status_code in (401, 403)
    check(send(guarded, "/v1/completions", b'{"prompt": "a"}', {**sent, "Authorization": f"Bearer {BOB}"}))


@settings(EXAMPLES, max_examples=40)
@given(st.binary(min_size=1, max_size=120))
@example(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n")
@example(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nzz\r\n")
@example(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n")
@example(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n")
@example(b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 70_000 + b"\r\n\r\n")
def test_what_is_not_http_is_refused_and_the_gateway_goes_on(guarded: Pair, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", httpx.URL(guarded.url).port or 0), timeout=10) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        head = client.recv(100)
    assert not head.startswith(b"HTTP/1.1 5"), head
    assert httpx.get(f"{guarded.url}/health").status_code == 200
