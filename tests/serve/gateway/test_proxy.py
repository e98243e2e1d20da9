"""What the gateway does with an engine's answers, on live servers; the engine does what the test says."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from chorus.population.manifest import Population
from tests.live import wait_for
from tests.serve.gateway.conftest import Pair, gateway_before, known
from tests.serve.gateway.scripted import DONE, USAGE, WHOLE, ScriptedEngine, event

BODY: dict[str, Any] = {"prompt": "a", "max_tokens": 3}
STREAM = {**BODY, "stream": True}


def metric(pair: Pair, sample: str) -> float:
    lines = httpx.get(f"{pair.url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(sample))


def complete(pair: Pair, **fields: Any) -> httpx.Response:
    return httpx.post(f"{pair.url}/v1/completions", json={**BODY, **fields}, timeout=20)


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: {")]


def test_a_stream_carries_the_population_first_and_hides_the_usage_nobody_asked_for(pair: Pair) -> None:
    pair.engine.steps = [event("a"), event("b"), USAGE, DONE]
    answer = complete(pair, stream=True, model="tiny:standard")

    first, second = events(answer.text)
    assert first["population"]["tier"] == answer.headers["x-chorus-tier"] == "standard"
    assert first["population"]["members"] == ["t0-c00", "t0-c01"]
    assert "population" not in second
    assert {first["model"], second["model"]} == {"tiny:standard"}
    assert answer.text.endswith(DONE.decode())
    assert metric(pair, 'chorus_gateway_completion_tokens_total{tier_served="standard"}') == 3
    assert metric(pair, 'chorus_gateway_time_to_first_token_seconds_count{tier_served="standard"}') == 1


def test_a_whole_answer_carries_the_population_and_the_engines_usage(pair: Pair) -> None:
    pair.engine.steps, pair.engine.content_type = [WHOLE], "application/json"
    answer = complete(pair, budget="economy").json()
    assert answer["population"] == {"tier": "economy", "members": ["t0-c00"], "weights": [1.0], "prior_version": 0}
    assert answer["usage"]["completion_tokens"] == 3
    assert pair.engine.bodies[-1]["vllm_xargs"] == {"chorus_tier": "economy", "chorus_report_in_stop_reason": ""}


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({}, 6),  # 33 ms between events, 5 ms a token
        ({"stream_interval": 1}, None),
        ({"stream_interval": 7}, 7),
        ({"stream_interval": 100_000}, 64),
        ({"stream_interval": None}, 6),
        ({"tools": [{"type": "function"}]}, None),
        ({"latency_budget_ms": 5000}, 6),
        ({"latency_budget_ms": 5000, "on_deadline": "truncate"}, None),
        ({"latency_budget_ms": 5000, "on_deadline": "truncate", "stream": False, "stream_interval": 9}, None),
        ({"stream": False}, None),
    ],
)
def test_tokens_of_a_fast_engine_come_several_to_an_event(pair: Pair, fields: dict[str, Any], sent: Any) -> None:
    pair.engine.steps = [event("a"), USAGE, DONE]
    pair.gateway.pool.engines[0].model = known(member_s=0.005, row_s=0.0)
    complete(pair, **{"budget": "economy", "stream": True, **fields})
    assert pair.engine.bodies[-1].get("stream_interval") == sent


@pytest.mark.parametrize("value", [0, -1, 1.5, "7", True])
def test_a_stream_interval_is_a_number_of_tokens(pair: Pair, value: Any) -> None:
    answer = complete(pair, stream=True, stream_interval=value)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "stream_interval"
    assert not pair.engine.bodies


def test_a_slow_engine_is_asked_for_every_token(pair: Pair) -> None:
    pair.engine.steps = [event("a"), USAGE, DONE]
    pair.gateway.pool.engines[0].model = known(member_s=0.02, row_s=0.0)
    complete(pair, stream=True)
    assert "stream_interval" not in pair.engine.bodies[-1]


def test_the_request_id_goes_to_the_engine_and_back(pair: Pair) -> None:
    pair.engine.steps, pair.engine.content_type = [WHOLE], "application/json"
    url = f"{pair.url}/v1/completions"
    given = httpx.post(url, json=BODY, headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == pair.engine.headers[-1]["x-request-id"] == "mine-1"
    generated = httpx.post(url, json=BODY, headers={"x-request-id": "not one\tid"})
    assert generated.headers["x-request-id"] == pair.engine.headers[-1]["x-request-id"] != "not one\tid"


@pytest.mark.parametrize("steps", [[event("a"), event("b")[:30]], [event("a")], [event("a"), 0.2]])
def test_an_engine_that_dies_mid_stream_leaves_an_error_event(pair: Pair, steps: list[Any]) -> None:
    pair.engine.steps, pair.engine.then_break = steps, True
    answer = complete(pair, stream=True)
    first, last = events(answer.text)
    assert first["choices"][0]["text"] == "a"
    assert last["error"]["code"] == "stream_broken"
    assert "connection to the engine was lost" in last["error"]["message"]
    assert answer.text.endswith("}\n\n")
    assert "[DONE]" not in answer.text
    assert metric(pair, "chorus_gateway_broken_streams_total") == 1


def test_an_error_that_the_engine_streams_first_is_answered_with_its_status(pair: Pair) -> None:
    error = {"message": "token 9 is out of vocabulary", "type": "BadRequestError", "param": None, "code": 400}
    pair.engine.steps = [b"data: " + json.dumps({"error": error}).encode() + b"\n\n", DONE]
    answer = complete(pair, stream=True)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == error["message"]


def test_an_error_that_the_engine_streams_later_passes_without_its_words(pair: Pair) -> None:
    error = b'data: {"error":{"message":"/root/x.py","type":"InternalServerError","param":null,"code":500}}\n\n'
    for steps in ([event("a"), 0.2, error, DONE], [event("a"), 0.2, error + DONE]):
        pair.engine.steps = steps
        answer = complete(pair, stream=True)
        # What comes together with the first event is still answered with its status.
        assert answer.text.endswith(DONE.decode()) or answer.status_code == 500
        assert '"code":"engine_error"' in answer.text
        assert "/root/x.py" not in answer.text


def test_the_openai_client_raises_on_a_stream_that_broke(pair: Pair) -> None:
    pair.engine.steps, pair.engine.then_break = [event("a")], True
    client = openai.OpenAI(base_url=f"{pair.url}/v1", api_key="none", max_retries=0)
    with client.completions.create(model="tiny", prompt="a", stream=True) as stream:
        assert next(stream).choices[0].text == "a"
        with pytest.raises(openai.APIError, match="connection to the engine was lost"):
            next(stream)


def test_a_stream_that_ends_cleanly_but_too_early_is_an_error_too(pair: Pair) -> None:
    pair.engine.steps = [event("a")]
    assert events(complete(pair, stream=True).text)[-1]["error"]["code"] == "stream_broken"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("steps", [[30.0], [event("a"), 30.0]])
def test_a_client_that_leaves_takes_the_engines_request_with_it(pair: Pair, stream: bool, steps: list[Any]) -> None:
    pair.engine.steps = steps
    if not stream:
        pair.engine.content_type = "application/json"
    body = json.dumps({**BODY, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", httpx.URL(pair.url).port or 0)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        wait_for("the engine to get the request", lambda: pair.engine.bodies, timeout_s=5)
        assert not pair.engine.client_left.wait(0.2)
    assert pair.engine.client_left.wait(1.0)
    wait_for("no request in flight", lambda: metric(pair, "chorus_gateway_requests_in_flight") == 1, timeout_s=2)
    assert metric(pair, "chorus_gateway_broken_streams_total") == 0


def test_a_connection_lost_before_the_first_byte_is_tried_once_more(pair: Pair) -> None:
    pair.engine.steps, pair.engine.content_type = [WHOLE], "application/json"
    pair.engine.break_before_answer = 1
    assert complete(pair).status_code == 200
    assert len(pair.engine.bodies) == 2


def test_a_stream_that_is_lost_between_its_head_and_its_first_byte_is_tried_once_more(pair: Pair) -> None:
    pair.engine.steps = [event("a"), event("b"), DONE]
    pair.engine.break_after_head = 1
    answer = complete(pair, stream=True)
    assert answer.status_code == 200
    assert [part["choices"][0]["text"] for part in events(answer.text)] == ["a", "b"]
    assert len(pair.engine.bodies) == 2
    pair.engine.break_after_head = 2
    assert complete(pair, stream=True).status_code == 503
    assert len(pair.engine.bodies) == 4


def test_a_second_loss_is_a_503_that_says_when_to_come_back(pair: Pair) -> None:
    pair.engine.break_before_answer = 2
    answer = complete(pair)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "engine_unavailable"
    assert len(pair.engine.bodies) == 2


@pytest.mark.parametrize("stream", [True, False])
def test_nothing_is_tried_again_after_the_first_byte(pair: Pair, stream: bool) -> None:
    pair.engine.steps, pair.engine.then_break = [WHOLE[:20]], True
    if not stream:
        pair.engine.content_type = "application/json"
    answer = complete(pair, stream=stream)
    assert len(pair.engine.bodies) == 1
    assert answer.status_code == 503


def test_the_engines_refusal_keeps_its_sentence_and_its_parameter(pair: Pair) -> None:
    error = {
        "message": "too long: 300 tokens, at most 256",
        "type": "BadRequestError",
        "param": "body.prompt",
        "code": 400,
    }
    pair.engine.steps, pair.engine.status = [json.dumps({"error": error}).encode()], 400
    pair.engine.content_type = "application/json"
    answer = complete(pair)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": error["message"],
        "type": "invalid_request_error",
        "param": "prompt",
        "code": "rejected_by_engine",
    }


LONG = (
    "This model's maximum context length is 200 tokens. However, your prompt contains at least 185 input tokens, which exceeds "
    "this limit even without any output tokens. Please reduce the length of the input prompt."
)


@pytest.mark.parametrize(
    ("message", "fields", "parts"),
    [
        (LONG, {"max_tokens": 16}, ("leaves 184 tokens", "context of 200", "max_tokens (16)")),
        ("max_tokens must be at least 1, got 0.", {}, ("leaves 240 tokens", "context of 256", "max_tokens (16)")),
        ("max_tokens must be at least 1, got 0.", {"max_tokens": 256}, ("leaves 255 tokens", "1 token of answer")),
    ],
)
def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_with_what_has_to_fit(
    pair: Pair, message: str, fields: dict[str, Any], parts: tuple[str, ...]
) -> None:
    pair.engine.status, pair.engine.content_type = 400, "application/json"
    pair.engine.steps = [json.dumps({"error": {"message": message, "param": "input_tokens", "code": 400}}).encode()]
    error = httpx.post(f"{pair.url}/v1/completions", json={"prompt": "a", **fields}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert all(part in error["message"] for part in parts), error["message"]


def test_an_answer_of_no_tokens_that_was_asked_for_is_the_clients_own(pair: Pair) -> None:
    pair.engine.status, pair.engine.content_type = 400, "application/json"
    pair.engine.steps = [b'{"error": {"message": "max_tokens must be at least 1, got 0."}}']
    error = httpx.post(f"{pair.url}/v1/completions", json={"prompt": "a", "max_tokens": 0}).json()["error"]
    assert error["message"] == "max_tokens must be at least 1, got 0."


def test_a_failure_of_a_healthy_engine_is_its_own_and_of_a_sick_one_a_503(pair: Pair) -> None:
    pair.engine.steps, pair.engine.status, pair.engine.content_type = [b"oops"], 500, "text/plain"
    healthy = complete(pair)
    assert (healthy.status_code, healthy.json()["error"]["message"]) == (500, "the engine failed on this request.")
    pair.engine.is_healthy = False
    sick = complete(pair)
    assert sick.status_code == 503
    assert "retry-after" in sick.headers


def test_an_unhealthy_engine_turns_ready_red_and_back(pair: Pair) -> None:
    def ready() -> int:
        return httpx.get(f"{pair.url}/ready").status_code

    assert ready() == 200
    pair.engine.is_healthy = False
    wait_for("red", lambda: ready() == 503, timeout_s=3)
    refused = complete(pair)
    assert refused.status_code == 503
    assert refused.json()["error"]["type"] == "server_error"
    assert metric(pair, "chorus_gateway_engine_up") == 0
    assert httpx.get(f"{pair.url}/health").status_code == 200
    pair.engine.is_healthy = True
    wait_for("green", lambda: ready() == 200, timeout_s=3)


def test_a_body_that_is_too_long_is_refused_declared_or_not(tiny: Population) -> None:
    def in_parts() -> Iterator[bytes]:
        yield b'{"prompt": "'
        yield b"a" * 2_000

    with gateway_before(ScriptedEngine(), tiny, max_body_bytes=1_000) as pair:
        url = f"{pair.url}/v1/completions"
        for content in (b"a" * 1_001, in_parts()):
            answer = httpx.post(url, content=content)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "body_too_long"
        assert not pair.engine.bodies


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("POST", "/tokenize", 422, "malformed_json"),
    ],
)
def test_every_error_has_openais_shape(pair: Pair, method: str, path: str, status: int, code: str) -> None:
    answer = httpx.request(method, pair.url + path)
    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert answer.json()["error"]["code"] == code
    assert answer.headers["x-request-id"]


def test_streams_running_when_the_gateway_has_waited_long_enough_end_with_an_error_event(tiny: Population) -> None:
    with gateway_before(ScriptedEngine([event("a"), 30.0]), tiny) as pair:
        with httpx.stream("POST", f"{pair.url}/v1/completions", json=STREAM, timeout=20) as answer:
            parts = answer.iter_text()
            text = next(parts)
            began_at = time.monotonic()
            pair.server.begin_to_stop()
            text += "".join(parts)
        assert "gateway shut down" in events(text)[-1]["error"]["message"]
        assert time.monotonic() - began_at < 5


def test_metrics_stay_bounded_whatever_clients_send(pair: Pair) -> None:
    pair.engine.steps, pair.engine.content_type = [WHOLE], "application/json"
    for idx in range(5):
        complete(pair, model=f"other-{idx}")
        complete(pair, budget=f"gold-{idx}")
        httpx.get(f"{pair.url}/nothing/{idx}")
    text = httpx.get(f"{pair.url}/metrics").text
    assert "other-" not in text
    assert "gold-" not in text
    assert "nothing" not in text
    assert 'chorus_gateway_requests_total{route="/v1/completions",status="404"' in text
