"""Engines that answer with something else, and clients that leave: a sentence, and nothing that runs on for nobody."""

import json
import socket
import time
from typing import Any

import httpx
import pytest

from chorus.population.manifest import Population
from tests.live import wait_for
from tests.serve.gateway.conftest import Pair, gateway_before
from tests.serve.gateway.scripted import DONE, USAGE, WHOLE, ScriptedEngine, event
from tests.serve.gateway.test_keys import ALICE, entry, guarded
from tests.serve.gateway.test_keys import post as post_with_key

STREAM, JSON, HTML = "text/event-stream", "application/json", "text/html"
BUDGET = {"latency_budget_ms": 20_000, "on_deadline": "truncate"}
HUGE = USAGE.replace(b'"prompt_tokens":4', b'"prompt_tokens":' + b"9" * 5000)


def post(pair: Pair, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
    return httpx.post(pair.url + path, json={"prompt": "a", "max_tokens": 3, **fields}, timeout=20)


@pytest.mark.parametrize(
    "body", [b"\xff\xfegarbage", b"{}", b"[1,2]", b"", b"{not json", b'{"choices":' + b"[" * 10_000]
)
@pytest.mark.parametrize("fields", [{}, BUDGET])
def test_an_invalid_whole_answer_is_a_502(pair: Pair, body: bytes, fields: dict[str, Any]) -> None:
    pair.engine.steps, pair.engine.content_type = [body], JSON
    for path in ("/v1/completions", "/tokenize"):
        answer = post(pair, path, **fields)
        if path == "/tokenize" and body == b"{}":
            continue  # as good as any other object
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_error")


@pytest.mark.parametrize(
    "steps",
    [
        [b"\xff\xfe\x00garbage\n\n", DONE],
        [b"data: {not json\n\n", DONE],
        [b"data: {}\n\n", DONE],
        [b"data: [1]\n\n", DONE],
        [DONE],
        [b'data: {"choices":"' + b"a" * 100 + b'"}\n\n', DONE],
    ],
)
@pytest.mark.parametrize("fields", [{"stream": True}, BUDGET, {"stream": True, **BUDGET}])
def test_an_invalid_stream_is_a_502(pair: Pair, steps: list[bytes], fields: dict[str, Any]) -> None:
    pair.engine.steps = steps
    answer = post(pair, **fields)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_error")


def test_a_stream_that_turns_into_something_else_ends_with_an_error_event(pair: Pair) -> None:
    pair.engine.steps = [event("a"), 0.2, b"<html>/usr/lib/x.py\n\n", DONE]
    answer = post(pair, stream=True, model="tiny:standard")
    assert '"code":"engine_error"' in answer.text
    assert "/usr/lib/x.py" not in answer.text
    assert "[DONE]" not in answer.text


def test_a_usage_beyond_all_numbers_is_not_counted(pair: Pair) -> None:
    pair.engine.steps = [event("a"), HUGE, DONE]
    assert post(pair, stream=True).status_code == 200
    pair.engine.steps, pair.engine.content_type = [HUGE[6:-2]], JSON
    assert post(pair).status_code == 502


@pytest.mark.parametrize(
    ("status", "answered"),
    [(204, 502), (302, 502), (500, 500), (501, 502), (502, 502), (503, 503), (599, 502), (418, 418)],
)
def test_no_page_of_an_engine_reaches_a_client(pair: Pair, status: int, answered: int) -> None:
    pair.engine.status, pair.engine.content_type = status, HTML
    pair.engine.steps = [b"" if status == 204 else b"<html>/usr/lib/secret.py Traceback</html>"]
    for path, fields in (("/v1/completions", {}), ("/v1/completions", {"stream": True}), ("/tokenize", {})):
        answer = post(pair, path, **fields)
        assert answer.status_code == answered
        assert "secret.py" not in answer.text
        assert answer.json()["error"]["message"]


def test_redirects_of_an_engine_are_not_followed(tiny: Population) -> None:
    paths = []

    async def redirecting(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            paths.append(scope["path"])
            headers = [(b"location", b"/secret")]
            await send({"type": "http.response.start", "status": 307, "headers": headers})
            await send({"type": "http.response.body"})
        else:
            await ScriptedEngine()(scope, receive, send)

    with gateway_before(redirecting, tiny) as pair:  # type: ignore[arg-type]
        assert post(pair).status_code == 502
        assert post(pair, "/tokenize").status_code == 502
    assert "/secret" not in paths


def test_invalid_member_answers_are_a_502_and_infinities_are_clamped(pair: Pair) -> None:
    fields = {"prompt": [1, 2, 3], "budget": "standard"}
    for odd in ([None, "a"], [[], 1], [1]):
        pair.engine.member_logprobs = dict.fromkeys(("t0-c00", "t0-c01"), odd)  # type: ignore[arg-type]
        assert post(pair, "/v1/population/disagreement", **fields).status_code == 502
    beyond = [float("inf"), float("nan")]
    pair.engine.member_logprobs = {"t0-c00": beyond, "t0-c01": beyond}
    answer = post(pair, "/v1/population/disagreement", **fields)
    assert answer.json()["disagreement_nats"] == [None, 0.0, 0.0]


ROUTES = {
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/v1/population/disagreement": {"prompt": [1, 2, 3], "budget": "standard"},
}


@pytest.mark.parametrize("path", ROUTES)
def test_a_client_that_leaves_takes_short_requests_with_it(pair: Pair, path: str) -> None:
    pair.engine.is_slow_for_members = True
    pair.engine.steps, pair.engine.content_type = [30.0], JSON
    body = json.dumps(ROUTES[path]).encode()
    with socket.create_connection(("127.0.0.1", httpx.URL(pair.url).port or 0)) as client:
        client.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body)) + body)
        wait_for("the engine to get the request", lambda: pair.engine.bodies, timeout_s=10)
        assert not pair.engine.client_left.wait(0.2)
    assert pair.engine.client_left.wait(5.0)
    wait_for("nothing in flight", lambda: not pair.gateway.pool.engines[0].traffic.in_flight, timeout_s=5)


@pytest.mark.parametrize("path", ROUTES)
def test_short_requests_end_after_a_time(tiny: Population, path: str) -> None:
    with gateway_before(ScriptedEngine([30.0]), tiny, stall_timeout_s=0.5) as pair:
        pair.engine.is_slow_for_members = True
        began_at = time.monotonic()
        answer = httpx.post(pair.url + path, json=ROUTES[path], timeout=20)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "engine_timeout")
        assert time.monotonic() - began_at < 10


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "a", "vllm_xargs": {"chorus_\\ud800": 1}}',
        b'{"prompt": "a", "vllm_xargs": {"\\uDFFF": 1}}',
        b'{"prompt": "a", "model": "\\ud800"}',
        b'{"prompt": "a", "budget": "\\ud800"}',
        b'{"prompt": "a", "stream_options": {"\\ud800": 1}}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"prompt": "a", "x": ' + b"[" * 101 + b"]" * 101 + b"}",
        b'{"prompt": "a", "vllm_xargs": ' + b'{"a":' * 400 + b"1" + b"}" * 401,
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/population/disagreement"]
)
def test_half_characters_and_deep_bodies_are_refused_at_the_door(pair: Pair, path: str, body: bytes) -> None:
    answer = httpx.post(pair.url + path, content=body, timeout=20)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["message"]
    assert not pair.engine.bodies


def test_whole_characters_and_bodies_of_a_usual_depth_pass(pair: Pair) -> None:
    pair.engine.steps, pair.engine.content_type = [WHOLE], JSON
    deep = b"[" * 60 + b"]" * 60
    body = b'{"prompt": "\\ud83d\\ude00", "x": ' + deep + b', "y": "' + b"[" * 1000 + b'"}'
    assert httpx.post(f"{pair.url}/v1/completions", content=body, timeout=20).status_code == 200
    assert pair.engine.bodies[-1]["prompt"] == "\U0001f600"


def test_no_answer_to_a_restricted_key_names_other_tiers(tiny: Population) -> None:
    with guarded(tiny, entry("alice", ALICE, tiers=["economy"])) as pair:
        for fields in ({"budget": "gold"}, {"min_budget": "gold"}, {"model": "tiny:gold"}, {"model": "other"}):
            refused = post_with_key(pair, **fields)
            assert refused.status_code == 404
            assert "economy" in refused.text
            assert "standard" not in refused.text
            assert "max" not in refused.json()["error"]["message"]
        assert post_with_key(pair, budget="standard").status_code == 403
