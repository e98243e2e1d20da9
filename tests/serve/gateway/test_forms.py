"""OpenAI's Responses and Anthropic's Messages: the same budgets, keys and deadlines, in the form that each API's clients expect."""

import json
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from chorus.population.manifest import Population
from chorus.serve.gateway.request.keys import Keys
from tests.live import wait_for
from tests.serve.gateway.conftest import Pair, gateway_before, known
from tests.serve.gateway.scripted import ScriptedEngine
from tests.serve.gateway.test_keys import ALICE, BOB, entry, text

ROUTES = ("responses", "messages")
BODIES: dict[str, dict[str, Any]] = {
    "responses": {"input": "hi", "max_output_tokens": 8},
    "messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
}
USED = {"input_tokens": 4, "output_tokens": 3}


def named(name: str, **fields: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n".encode()


def response(**fields: Any) -> dict[str, Any]:
    known = {"id": "resp_1", "object": "response", "created_at": 1, "metadata": {"model": "mine"}, "model": "tiny"}
    fixed = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "status": "completed", "usage": None}
    return {**known, **fixed, "output": [], **fields}


def answer_item(content: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": content, "annotations": []}
    return {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}


def message(**fields: Any) -> dict[str, Any]:
    known = {"id": "msg_1", "type": "message", "role": "assistant", "content": [], "model": "tiny", "usage": USED}
    return {**known, "stop_reason": "end_turn", "stop_sequence": None, **fields}


WHOLE = {
    "responses": response(output=[answer_item("abc")], usage={**USED, "total_tokens": 7}),
    "messages": message(
        content=[
            {"type": "text", "text": "abc"},
            {"type": "tool_use", "id": "t", "name": "f", "input": {"model": "not-ours"}},
        ]
    ),
}
BEGIN = {
    "responses": [
        named("response.created", sequence_number=0, response=response(status="in_progress")),
        named("response.in_progress", sequence_number=1, response=response(status="in_progress")),
    ],
    "messages": [named("message_start", message=message(stop_reason=None, usage={**USED, "output_tokens": 0}))],
}
PARTS = {
    "responses": [
        named(
            "response.output_item.added",
            sequence_number=2,
            output_index=0,
            item={**answer_item(""), "content": [], "status": "in_progress"},
        ),
        named(
            "response.content_part.added",
            sequence_number=3,
            output_index=0,
            content_index=0,
            item_id="msg_1",
            part={"type": "output_text", "text": "", "annotations": []},
        ),
        *(
            named(
                "response.output_text.delta",
                sequence_number=4 + idx,
                output_index=0,
                content_index=0,
                item_id="msg_1",
                delta=part,
                logprobs=[],
            )
            for idx, part in enumerate(("a", 'b"\n\n', "é"))
        ),
    ],
    "messages": [
        named("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        *(
            named("content_block_delta", index=0, delta={"type": "text_delta", "text": part})
            for part in ("a", 'b"\n\n', "é")
        ),
    ],
}
END = {
    "responses": [
        named("response.output_item.done", sequence_number=7, output_index=0, item=answer_item('ab"\n\né')),
        named(
            "response.completed",
            sequence_number=8,
            response=response(output=[answer_item('ab"\n\né')], usage={**USED, "total_tokens": 7}),
        ),
    ],
    "messages": [
        named("content_block_stop", index=0),
        named("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage=USED),
        named("message_stop"),
    ],
}
TEXT = 'ab"\n\né'


def complete(route: str) -> list[Any]:
    return [*BEGIN[route], *PARTS[route], *END[route]]


def post(pair: Pair, route: str, *, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return httpx.post(f"{pair.url}/v1/{route}", json={**BODIES[route], **fields}, headers=headers, timeout=20)


def whole(pair: Pair, route: str) -> None:
    pair.engine.steps, pair.engine.content_type = [json.dumps(WHOLE[route]).encode()], "application/json"


def events(answer: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for part in answer.text.split("\n\n")[:-1]:
        name, data = part.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def metric(pair: Pair, sample: str) -> float:
    lines = httpx.get(f"{pair.url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(sample))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("requested", "tier"),
    [
        ({"budget": "economy"}, "economy"),
        ({"budget": 2}, "standard"),
        ({"model": "tiny:standard"}, "standard"),
        ({"model": "tiny"}, "max"),
        ({}, "max"),
    ],
)
def test_the_tier_travels_to_the_engine_and_is_told(
    pair: Pair, route: str, requested: dict[str, Any], tier: str
) -> None:
    whole(pair, route)
    answer = post(pair, route, **requested)
    sent, body = pair.engine.bodies[-1], answer.json()
    assert sent["vllm_xargs"] == {"chorus_tier": tier}
    assert (sent["model"], "budget" in sent) == ("tiny", False)
    assert body["population"]["tier"] == answer.headers["x-chorus-tier"] == tier
    assert body["model"] == requested.get("model", "tiny")
    changed = {**body, "model": "tiny"}
    del changed["population"]
    assert changed == WHOLE[route], (
        "nothing else is touched, not even a `model` in what the client or the members wrote"
    )
    assert metric(pair, f'chorus_gateway_completion_tokens_total{{tier_served="{tier}"}}') == 3
    assert metric(pair, f'chorus_gateway_requests_total{{route="/v1/{route}"') == 1


@pytest.mark.parametrize("route", ROUTES)
def test_streams_keep_the_events_of_their_api(pair: Pair, route: str) -> None:
    pair.engine.steps = complete(route)
    answer = post(pair, route, stream=True, model="tiny:standard")
    found, sent = events(answer), [json.loads(each.split(b"data: ")[1]) for each in complete(route)]
    assert [name for name, _ in found] == [each["type"] for each in sent]
    assert all(fields["type"] == name for name, fields in found)
    first = found[0][1]["response" if route == "responses" else "message"]
    assert (first["population"]["tier"], first["model"]) == ("standard", "tiny:standard")
    assert [fields for name, fields in found if name.endswith("text.delta")] == [
        each for each in sent if each["type"].endswith("text.delta")
    ]
    assert "[DONE]" not in answer.text
    assert pair.engine.bodies[-1]["stream"] is True
    assert not {"stream_options", "stream_interval"} & pair.engine.bodies[-1].keys()
    assert metric(pair, "chorus_gateway_completion_tokens_total") == 3
    assert metric(pair, "chorus_gateway_time_to_first_token_seconds_count") == 1


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_events_cut_anywhere_arrive_whole(pair: Pair, route: str, size: int) -> None:
    data = b"".join(complete(route))
    pair.engine.steps = [data[start : start + size] for start in range(0, len(data), size)]
    found = events(post(pair, route, stream=True))
    deltas = [
        fields["delta"] for name, fields in found if name in ("response.output_text.delta", "content_block_delta")
    ]
    assert "".join(each if isinstance(each, str) else each["text"] for each in deltas) == TEXT


@pytest.mark.parametrize("route", ROUTES)
def test_a_time_budget_travels_and_the_end_says_what_became_of_it(pair: Pair, route: str) -> None:
    pair.engine.steps = complete(route)
    name, last = events(post(pair, route, stream=True, latency_budget_ms=5000, min_budget=2))[
        -1 if route == "responses" else -2
    ]
    population = last["response"]["population"] if route == "responses" else last["population"]
    assert (name, population["deadline"]) == ("response.completed" if route == "responses" else "message_delta", "met")
    extra = pair.engine.bodies[-1]["vllm_xargs"]
    assert 0 < extra["chorus_time_budget_ms"] < 5000
    assert extra["chorus_floor"] == "standard"
    assert "chorus_report_in_stop_reason" not in extra, "Messages would show it as a stop sequence"
    whole(pair, route)
    assert post(pair, route, latency_budget_ms=5000).json()["population"]["deadline"] == "met"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_is_cut_at_its_deadline_as_if_its_length_were_reached(pair: Pair, route: str, stream: bool) -> None:
    pair.engine.steps = [*BEGIN[route], *PARTS[route], 30.0]
    answer = post(pair, route, stream=stream, latency_budget_ms=900, on_deadline="truncate", model="tiny:max")
    assert answer.status_code == 200
    assert pair.engine.client_left.wait(5)
    if route == "responses":
        name, last = events(answer)[-1] if stream else ("", {"response": answer.json()})
        body = last["response"]
        assert (name == "response.incomplete") == stream
        assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert [part["text"] for part in body["output"][0]["content"]] == [TEXT]
        assert body["usage"]["output_tokens"] == 3
        assert body["usage"]["input_tokens"] > 0
        assert body["population"]["truncated"] is True
        numbers = [fields["sequence_number"] for _, fields in events(answer)] if stream else []
        assert numbers == list(range(len(numbers)))
    elif stream:
        *_, (block, _), (end, fields), (last_name, _) = events(answer)
        assert (block, end, last_name) == ("content_block_stop", "message_delta", "message_stop")
        assert (fields["delta"]["stop_reason"], fields["usage"]) == ("max_tokens", USED)
        assert fields["population"]["truncated"] is True
    else:
        body = answer.json()
        assert (body["content"], body["stop_reason"]) == ([{"type": "text", "text": TEXT}], "max_tokens")
        assert (body["usage"], body["population"]["truncated"], body["model"]) == (USED, True, "tiny:max")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [True, False])
def test_with_nothing_at_the_deadline_an_empty_answer_is_returned(pair: Pair, route: str, stream: bool) -> None:
    pair.engine.steps = [30.0]
    answer = post(pair, route, stream=stream, latency_budget_ms=300, on_deadline="truncate")
    assert answer.status_code == 200
    if stream:
        names = [name for name, _ in events(answer)]
        expected = {
            "responses": ["response.created", "response.in_progress", "response.incomplete"],
            "messages": ["message_start", "message_delta", "message_stop"],
        }
        assert names == expected[route]
    else:
        body = answer.json()
        assert body["output"] == [] if route == "responses" else body["content"] == [{"type": "text", "text": ""}]


@pytest.mark.parametrize("route", ROUTES)
def test_a_whole_answer_that_ends_in_time_is_put_together_from_its_stream(pair: Pair, route: str) -> None:
    pair.engine.steps = complete(route)
    body = post(pair, route, latency_budget_ms=5000, on_deadline="truncate").json()
    parts = body["output"][0]["content"] if route == "responses" else body["content"]
    assert [part["text"] for part in parts] == [TEXT]
    assert body["population"]["truncated"] is False
    assert {key: body["usage"][key] for key in USED} == USED


def test_a_tools_call_that_is_cut_short_is_not_handed_on(pair: Pair) -> None:
    tool = named(
        "content_block_start", index=0, content_block={"type": "tool_use", "id": "t", "name": "f", "input": {}}
    )

    def part(text: str) -> bytes:
        return named("content_block_delta", index=0, delta={"type": "input_json_delta", "partial_json": text})

    pair.engine.steps = [*BEGIN["messages"], tool, part('{"a": '), 30.0]
    body = post(pair, "messages", latency_budget_ms=700, on_deadline="truncate").json()
    assert body["content"] == [{"type": "text", "text": ""}]
    pair.engine.steps = [*BEGIN["messages"], tool, part('{"a": '), part("1}"), *END["messages"]]
    body = post(pair, "messages", latency_budget_ms=5000, on_deadline="truncate").json()
    assert body["content"] == [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]


@pytest.mark.parametrize("route", ROUTES)
def test_an_engine_lost_after_it_announced_an_answer_and_made_none_is_tried_again(pair: Pair, route: str) -> None:
    pair.engine.steps, pair.engine.then_break = [*BEGIN[route]], True
    assert post(pair, route, stream=True).status_code == 503
    assert len(pair.engine.bodies) == 2


@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_that_breaks_ends_with_an_error_event_of_its_api(pair: Pair, route: str) -> None:
    pair.engine.steps, pair.engine.then_break = [*BEGIN[route], *PARTS[route]], True
    name, fields = events(post(pair, route, stream=True))[-1]
    assert (name, fields["type"]) == ("error", "error")
    found = fields if route == "responses" else fields["error"]
    assert "connection to the engine was lost" in found["message"]
    assert found.get("code" if route == "responses" else "type") in ("stream_broken", "overloaded_error")


@pytest.mark.parametrize("stream", [True, False])
def test_an_engines_error_before_the_first_token_is_answered_with_its_status(pair: Pair, stream: bool) -> None:
    error = {"type": "error", "error": {"type": "internal_error", "message": "oops"}}
    pair.engine.steps = [*BEGIN["messages"], b"event: error\ndata: " + json.dumps(error).encode() + b"\n\n"]
    if not stream:
        pair.engine.steps, pair.engine.status = [json.dumps(error).encode()], 400
        pair.engine.content_type = "application/json"
    answer = post(pair, "messages", stream=stream)
    assert answer.status_code == (500 if stream else 400)
    assert answer.json()["error"]["message"] == ("the engine failed on this request." if stream else "oops")


@pytest.mark.parametrize("route", ROUTES)
def test_an_engines_failure_in_a_stream_passes_without_its_words(pair: Pair, route: str) -> None:
    error = {"type": "error", "error": {"type": "internal_error", "message": "/root/x.py"}}
    pair.engine.steps = [*BEGIN[route], *PARTS[route], b"event: error\ndata: " + json.dumps(error).encode() + b"\n\n"]
    answer = post(pair, route, stream=True)
    assert events(answer)[-1][0] == "error"
    assert "the engine failed on this request." in answer.text
    assert "/root/x.py" not in answer.text


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("garbage", [b"{", b"[]", b"7", b"<html>", b"\xff", b'{"usage": 3, "message": 4}'])
def test_garbage_from_an_engine_is_a_bad_gateway(pair: Pair, route: str, stream: bool, garbage: bytes) -> None:
    if stream:
        name = {"responses": b"response.output_text.delta", "messages": b"message_start"}[route]
        pair.engine.steps = [b"event: " + name + b"\ndata: " + garbage + b"\n\n"]
    else:
        pair.engine.steps, pair.engine.content_type = [garbage], "application/json"
    answer = post(pair, route, stream=stream)
    assert answer.status_code in ((200, 502, 503) if stream else (502,))
    if answer.status_code == 200:
        assert not stream or events(answer)[-1][0] == "error"


@pytest.fixture(scope="module")
def guarded(tiny: Population) -> Iterator[Pair]:
    keys = Keys(text=text(entry("alice", ALICE, tiers=["economy"]), entry("bob", BOB, tokens_per_min=60)))
    with gateway_before(ScriptedEngine(), tiny, keys=keys) as pair:
        yield pair


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("header", ["x-api-key", "Authorization"])
def test_keys_come_in_the_header_of_either_api(guarded: Pair, route: str, header: str) -> None:
    whole(guarded, route)
    value = ALICE if header == "x-api-key" else f"Bearer {ALICE}"
    assert post(guarded, route, headers={header: value}, budget="economy").status_code == 200
    assert ALICE not in json.dumps(guarded.engine.headers[-1])
    models = httpx.get(f"{guarded.url}/v1/models", headers={header: value}).json()["data"]
    assert {card["id"] for card in models} == {"tiny", "tiny:economy"}
    assert post(guarded, route, headers={header: value + "x"}).status_code == 401
    assert post(guarded, route).status_code == 401


def test_a_keys_tokens_are_counted_over_all_routes(guarded: Pair) -> None:
    headers = {"x-api-key": BOB}
    for route in ROUTES:
        whole(guarded, route)
        assert post(guarded, route, headers=headers).status_code == 200
    long = {"responses": {"max_output_tokens": 200}, "messages": {"max_tokens": 200}}
    for route in ROUTES:
        answer = post(guarded, route, headers=headers, **long[route])
        assert answer.status_code == 429, "a burst of sixty, of which fourteen are used"
        assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        ({"model": "other"}, 404, "not_found_error"),
        ({"budget": 99}, 400, "invalid_request_error"),
        ({"messages": []}, 400, "invalid_request_error"),
        ({"vllm_xargs": {"chorus_tier": "max"}}, 400, "invalid_request_error"),
    ],
)
def test_errors_of_messages_have_anthropics_shape(pair: Pair, fields: dict[str, Any], status: int, kind: str) -> None:
    answer = post(pair, "messages", **fields)
    assert answer.status_code == status
    assert answer.json().keys() == {"type", "error"}
    assert (answer.json()["type"], answer.json()["error"]["type"]) == ("error", kind)
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"input": ""}, 400, "empty", "input"),
        ({"input": []}, 400, "empty", "input"),
        ({"input": None}, 400, "empty", "input"),
        ({"previous_response_id": "resp_1"}, 400, "not_stored", "previous_response_id"),
        ({"conversation": "conv_1"}, 400, "not_stored", "conversation"),
        ({"background": True}, 400, "not_stored", "background"),
    ],
)
def test_errors_of_responses_have_openais_shape(
    pair: Pair, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    answer = post(pair, "responses", **fields)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert not pair.engine.bodies


def test_an_open_response_is_planned_by_those_before_it(pair: Pair) -> None:
    pair.gateway.engines[0].model = known()
    whole(pair, "responses")
    for _ in range(11):
        httpx.post(f"{pair.url}/v1/responses", json={"input": "hi", "latency_budget_ms": 9000})
    assert pair.engine.bodies[-1]["vllm_xargs"]["chorus_expected_tokens"] == 3


def test_messages_can_be_counted(pair: Pair) -> None:
    pair.engine.steps, pair.engine.content_type = [b'{"input_tokens": 5}'], "application/json"
    client = anthropic.Anthropic(base_url=pair.url, api_key="none", max_retries=0)
    found = client.messages.count_tokens(model="tiny:max", messages=[{"role": "user", "content": "hi"}])
    assert found.input_tokens == 5
    assert pair.engine.bodies[-1]["model"] == "tiny"


def test_the_openai_client_reads_responses_whole_and_streamed(pair: Pair) -> None:
    client = openai.OpenAI(base_url=f"{pair.url}/v1", api_key="none", max_retries=0)
    whole(pair, "responses")
    found = client.responses.create(model="tiny", input="hi", extra_body={"budget": 2})
    assert found.output_text == "abc"
    assert found.population["tier"] == "standard"  # type: ignore[attr-defined]
    pair.engine.steps, pair.engine.content_type = complete("responses"), "text/event-stream"
    with client.responses.stream(model="tiny", input="hi") as stream:
        assert stream.get_final_response().output_text == TEXT
    pair.engine.steps = [*BEGIN["responses"], *PARTS["responses"], 30.0]
    terms = {"latency_budget_ms": 900, "on_deadline": "truncate"}
    last = list(client.responses.create(model="tiny", input="hi", stream=True, extra_body=terms))[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == TEXT


def test_anthropics_client_reads_messages_whole_and_streamed_and_raises_on_errors(pair: Pair) -> None:
    client = anthropic.Anthropic(base_url=pair.url, api_key="none", max_retries=0)
    request: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": "hi"}]}
    whole(pair, "messages")
    assert client.messages.create(**request).content[0].text == "abc"  # type: ignore[union-attr]
    pair.engine.steps, pair.engine.content_type = complete("messages"), "text/event-stream"
    with client.messages.stream(**request) as stream:
        final = stream.get_final_message()
    assert (final.content[0].text, final.usage.output_tokens) == (TEXT, 3)  # type: ignore[union-attr]
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(**{**request, "model": "other"})
    pair.engine.steps, pair.engine.then_break = [*BEGIN["messages"], *PARTS["messages"]], True
    lost = "connection to the engine was lost"
    with pytest.raises(anthropic.APIStatusError, match=lost), client.messages.stream(**request) as stream:
        stream.get_final_message()


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_ping_answers_while_an_engine_does(pair: Pair, method: str) -> None:
    assert httpx.request(method, f"{pair.url}/ping").status_code == 200
    pair.engine.is_healthy = False
    wait_for("503", lambda: httpx.request(method, f"{pair.url}/ping").status_code == 503, timeout_s=10)


@pytest.mark.parametrize(
    ("method", "path", "hint"),
    [
        ("POST", "/v1/embeddings", "--runner pooling"),
        ("POST", "/v1/rerank", "--runner pooling"),
        ("POST", "/v2/rerank", "--runner pooling"),
        ("POST", "/score", "--runner pooling"),
        ("POST", "/v1/audio/transcriptions", "text only"),
        ("POST", "/v1/images/generations", "text only"),
        ("POST", "/v1/files", "stored"),
        ("GET", "/v1/responses/resp_1", "`input`"),
        ("POST", "/v1/responses/resp_1/cancel", "`input`"),
        ("POST", "/v1/chat/completions/render", "engine's own"),
        ("POST", "/api/chat", "under /v1"),
    ],
)
def test_routes_that_a_mixture_cannot_serve_say_why(pair: Pair, method: str, path: str, hint: str) -> None:
    answer = httpx.request(method, pair.url + path, json={"model": "tiny", "input": "a"} if method == "POST" else None)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "route_not_served"
    assert hint in error["message"]
    assert not pair.engine.bodies
    assert re.search(r'route="none".*status="404"', httpx.get(f"{pair.url}/metrics").text)


def test_a_route_that_nobody_knows_is_just_not_found(pair: Pair) -> None:
    assert httpx.post(f"{pair.url}/v1/nothing").json()["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    "terms", [{}, {"latency_budget_ms": 60_000}, {"latency_budget_ms": 60_000, "on_deadline": "truncate"}]
)
def test_a_real_engine_answers_responses_by_the_members_asked_for(gateway_url: str, terms: dict[str, Any]) -> None:
    client = openai.OpenAI(base_url=f"{gateway_url}/v1", api_key="none", max_retries=0)
    request: dict[str, Any] = {"model": "tiny:standard", "input": "def main(", "max_output_tokens": 8, "temperature": 0}
    found = client.responses.create(**request, extra_body=terms)
    assert found.population["members"] == ["t0-c00", "t0-c01"]  # type: ignore[attr-defined]
    assert found.usage is not None
    assert found.usage.output_tokens == 8
    with client.responses.stream(**request, extra_body=terms) as stream:
        assert stream.get_final_response().output_text == found.output_text
    others = client.responses.create(**{**request, "model": "tiny:max"})
    assert others.output_text != found.output_text, "other members say something else"


@pytest.mark.parametrize(
    "terms", [{}, {"latency_budget_ms": 60_000}, {"latency_budget_ms": 60_000, "on_deadline": "truncate"}]
)
def test_a_real_engine_answers_messages_by_the_members_asked_for(gateway_url: str, terms: dict[str, Any]) -> None:
    client = anthropic.Anthropic(base_url=gateway_url, api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "def main("}]
    request: dict[str, Any] = {"model": "tiny:standard", "max_tokens": 8, "messages": messages}
    found = client.messages.create(**request, extra_body={"temperature": 0, **terms})
    assert found.population["members"] == ["t0-c00", "t0-c01"]  # type: ignore[attr-defined]
    assert (found.usage.output_tokens, found.stop_reason) == (8, "max_tokens")
    with client.messages.stream(**request, extra_body={"temperature": 0, **terms}) as stream:
        streamed = [part.text for part in stream.get_final_message().content]
    assert streamed == [part.text for part in found.content]
    counted = client.messages.count_tokens(model="tiny", messages=messages)
    assert counted.input_tokens == found.usage.input_tokens
    others = client.messages.create(**{**request, "model": "tiny:max"}, extra_body={"temperature": 0})
    assert others.content != found.content


def test_a_real_stream_that_is_cut_has_counted_its_tokens(gateway_url: str) -> None:
    body = {
        "prompt": "def main(",
        "max_tokens": 240,
        "ignore_eos": True,
        "latency_budget_ms": 150,
        "on_deadline": "truncate",
    }
    answer = httpx.post(f"{gateway_url}/v1/completions", json={**body, "n": 4, "logprobs": 0}, timeout=60).json()
    assert answer["population"]["truncated"] is True
    seen = sum(len((choice["logprobs"] or {"tokens": []})["tokens"]) for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == seen


def test_a_real_engine_takes_a_chat_of_no_given_length_with_a_time_budget(gateway_url: str) -> None:
    body = {"messages": [{"role": "user", "content": "def main("}], "latency_budget_ms": 60_000}
    answer = httpx.post(f"{gateway_url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["population"]["deadline"] == "met"
