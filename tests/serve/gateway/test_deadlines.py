"""Time budgets over HTTP: what the engine is told, and what happens at the deadline."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from chorus.population.manifest import Population
from chorus.serve.gateway.relay.assembly import Assembly
from chorus.serve.gateway.request.size import Usage
from tests.live import wait_for
from tests.serve.gateway.conftest import Pair, gateway_before, known
from tests.serve.gateway.scripted import DONE, USAGE, WHOLE, ScriptedEngine, event


def post(pair: Pair, **fields: Any) -> httpx.Response:
    return httpx.post(f"{pair.url}/v1/completions", json={"prompt": "a", "max_tokens": 9, **fields}, timeout=20)


def ask_chat(pair: Pair, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "a"}], **fields}
    return httpx.post(f"{pair.url}/v1/chat/completions", json=body, timeout=20)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(part[6:]) for part in answer.text.split("\n\n") if part.startswith("data: {")]


def test_the_remaining_budget_and_the_floor_travel_to_the_engine(pair: Pair) -> None:
    pair.engine.steps, pair.engine.content_type = [WHOLE], "application/json"
    answer = post(pair, latency_budget_ms=5000, min_budget=2, model="tiny:max").json()
    sent = pair.engine.bodies[-1]
    extra = sent["vllm_xargs"]
    assert (extra["chorus_tier"], extra["chorus_floor"]) == ("max", "standard")
    assert 1000 < extra["chorus_time_budget_ms"] < 5000
    assert not {"latency_budget_ms", "on_deadline", "min_budget", "budget"} & sent.keys()
    found = answer["population"]
    assert (found["tier"], found["tier_asked"], found["deadline"], found["truncated"]) == ("max", "max", "met", False)
    assert 0 < found["elapsed_ms"] < 5000


def test_a_number_between_two_tiers_is_told_to_the_engine_and_reported(pair: Pair) -> None:
    (engine,) = pair.gateway.pool.engines
    engine.model = known()
    drops = {"members_per_token": [[3, 9]], "drops": [{"member": "t0-c00", "at_token": 0, "reason": "start"}]}
    whole = json.dumps({**json.loads(WHOLE), "kv_transfer_params": drops}).encode()
    pair.engine.steps, pair.engine.content_type = [whole], "application/json"
    found = post(pair, latency_budget_ms=330).json()["population"]  # 4 members would need 0.37 s
    extra = pair.engine.bodies[-1]["vllm_xargs"]
    assert (extra["chorus_tier"], extra["chorus_most_members"]) == ("max", 3)
    assert (found["tier"], found["most_members"], found["members_per_token"]) == ("max", 3, [[3, 9]])
    metrics = httpx.get(f"{pair.url}/metrics").text
    assert not re.search(r"^chorus_gateway_member_drops_total.* [1-9]", metrics, re.MULTILINE), "none left on the way"
    post(pair, latency_budget_ms=9000)
    assert "chorus_most_members" not in pair.engine.bodies[-1]["vllm_xargs"]


def test_the_engines_drops_are_reported_in_the_population_object(pair: Pair) -> None:
    drops = {"members_per_token": [[4, 2], [3, 1]], "drops": [{"member": "t0-c00", "at_token": 2, "reason": "late"}]}
    whole = json.dumps({**json.loads(WHOLE), "kv_transfer_params": drops, "metrics": None}).encode()
    pair.engine.steps, pair.engine.content_type = [whole], "application/json"
    answer = post(pair, latency_budget_ms=5000).json()
    assert answer["population"]["drops"] == drops["drops"]
    assert answer["population"]["members_per_token"] == drops["members_per_token"]
    assert answer["kv_transfer_params"] is None


DECODING = {"passes_per_token": 1.2, "drafts": 0, "accepted": 0, "caught_up_rows": 31}


def test_what_an_answer_took_is_reported_without_a_time_budget(pair: Pair) -> None:
    whole = json.dumps({**json.loads(WHOLE), "kv_transfer_params": {"decoding": DECODING}}).encode()
    pair.engine.steps, pair.engine.content_type = [whole], "application/json"
    answer = post(pair).json()
    assert pair.engine.bodies[-1]["vllm_xargs"]["chorus_report_in_stop_reason"] == ""
    assert answer["population"]["decoding"] == DECODING
    assert answer["kv_transfer_params"] is None
    post(pair, n=2)
    assert "chorus_report_in_stop_reason" not in pair.engine.bodies[-1]["vllm_xargs"], "one field, two choices"


def test_each_choice_of_a_stream_reports_what_it_took(pair: Pair, mark: str) -> None:
    other = {**DECODING, "passes_per_token": 4.0}
    pair.engine.steps = [
        event("a"),
        report_event(mark, {"decoding": DECODING, "stop_reason": None}),
        report_event(mark, {"decoding": other, "stop_reason": "end"}, index=1),
        USAGE,
        DONE,
    ]
    _, first, second = events(post(pair, stream=True, n=2))
    assert (first["population"]["decoding"], first["choices"][0]["stop_reason"]) == (DECODING, None)
    assert (second["population"]["decoding"], second["choices"][0]["stop_reason"]) == (other, "end")


def test_an_answer_that_one_member_gave_has_the_name_of_a_tier_with_one(pair: Pair) -> None:
    drops = {
        "members_per_token": [[4, 1], [1, 9]],
        "drops": [{"member": "t0-c00", "at_token": 1, "reason": "late"}] * 3,
    }
    whole = json.dumps({**json.loads(WHOLE), "kv_transfer_params": drops}).encode()
    pair.engine.steps, pair.engine.content_type = [whole], "application/json"
    answer = post(pair, latency_budget_ms=5000)
    assert pair.engine.bodies[-1]["vllm_xargs"]["chorus_tier"] == "max"
    found = answer.json()["population"]
    assert (found["tier"], found["tier_asked"], len(found["members"])) == ("economy", "default", 1)
    assert answer.headers["x-chorus-tier"] == "economy"
    metrics = httpx.get(f"{pair.url}/metrics").text
    assert 'chorus_gateway_shrunk_requests_total{tier_served="economy"} 1.0' in metrics


def test_a_stream_whose_members_left_says_so_at_its_end(pair: Pair, mark: str) -> None:
    report = {"members_per_token": [[1, 9]], "drops": [{"member": "t0-c00", "at_token": 0, "reason": "start"}] * 3}
    pair.engine.steps = [event("a"), report_event(mark, {**report, "stop_reason": None}), USAGE, DONE]
    first, last = events(post(pair, stream=True, latency_budget_ms=5000))
    assert (first["population"]["tier"], last["population"]["tier"]) == ("max", "economy")
    counted = re.compile(r'^chorus_gateway_requests_total.*tier_served="economy"', re.MULTILINE)
    wait_for("the count", lambda: counted.search(httpx.get(f"{pair.url}/metrics").text), timeout_s=10)


def test_a_stream_says_at_its_end_whether_the_deadline_was_met(pair: Pair) -> None:
    end = event("c", choices=[{"index": 0, "text": "c", "logprobs": None, "finish_reason": "stop"}])
    pair.engine.steps = [event("a"), event('"finish_reason":"x"'), end, USAGE, DONE]
    first, middle, last = events(post(pair, stream=True, latency_budget_ms=5000))
    assert first["population"]["latency_budget_ms"] == 5000
    assert "deadline" not in first["population"]
    assert "population" not in middle
    assert last["population"]["deadline"] == "met"


def report_event(mark: str, report: dict[str, Any], *, index: int = 0) -> bytes:
    """The event in which a choice ends, with a report as its stop reason."""
    stop_reason = mark + json.dumps(report)
    return event("c", choices=[{"index": index, "text": "c", "finish_reason": "stop", "stop_reason": stop_reason}])


DROPS: dict[str, Any] = {
    "members_per_token": [[4, 2], [3, 1]],
    "drops": [{"member": "t0-c00", "at_token": 2, "reason": "late"}],
}


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """How reports begin in this test; else nobody knows."""
    monkeypatch.setattr("secrets.token_hex", lambda num_bytes: "5ec2e7")
    return "chorus:5ec2e7:"


@pytest.mark.parametrize("stop_reason", [None, 7, 'a "quoted" word, ü'])
@pytest.mark.parametrize("fields", [{"stream": True}, {"on_deadline": "truncate"}])
def test_the_engines_drops_come_out_of_a_streams_stop_reason(
    pair: Pair, mark: str, fields: dict[str, Any], stop_reason: Any
) -> None:
    pair.engine.steps = [event("a"), report_event(mark, {**DROPS, "stop_reason": stop_reason}), USAGE, DONE]
    answer = post(pair, latency_budget_ms=5000, **fields)
    last = events(answer)[-1] if "stream" in fields else answer.json()
    assert pair.engine.bodies[-1]["vllm_xargs"]["chorus_report_in_stop_reason"] == mark
    assert last["population"] | DROPS == last["population"]
    assert "chorus:" not in answer.text
    if "stream" in fields:
        assert last["choices"][0]["stop_reason"] == stop_reason
    metrics = httpx.get(f"{pair.url}/metrics").text
    assert re.search(r"^chorus_gateway_member_drops_total.* 1", metrics, re.MULTILINE)


@pytest.mark.parametrize("text", ["chorus:", "chorus:x", "chorus:{}", "chorus:[]", "chorus:" + json.dumps(DROPS)])
def test_a_stop_text_of_the_client_is_no_report(pair: Pair, text: str) -> None:
    end = event("c", choices=[{"index": 0, "text": "c", "finish_reason": "stop", "stop_reason": text}])
    pair.engine.steps = [event("a"), end, USAGE, DONE]
    last = events(post(pair, latency_budget_ms=5000, stream=True, stop=text))[-1]
    assert last["choices"][0]["stop_reason"] == text
    assert "drops" not in last["population"]


def test_each_choice_has_its_own_report(pair: Pair, mark: str) -> None:
    first = report_event(mark, {**DROPS, "stop_reason": None})
    second = event("d", choices=[{"index": 1, "text": "d", "finish_reason": "stop", "stop_reason": "d"}])
    pair.engine.steps = [event("a"), first, second, USAGE, DONE]
    found = events(post(pair, latency_budget_ms=5000, stream=True, n=2))
    assert found[1]["population"]["drops"] == DROPS["drops"]
    assert "drops" not in found[2]["population"]


SLOW = [event("a"), event("b"), 30.0]


def test_a_stream_is_cut_at_the_deadline_and_ends_as_if_its_length_were_reached(pair: Pair) -> None:
    pair.engine.steps = SLOW
    began_at = time.monotonic()
    answer = post(pair, stream=True, latency_budget_ms=700, on_deadline="truncate")
    assert time.monotonic() - began_at < 10
    found = events(answer)
    assert [each["choices"][0]["text"] for each in found] == ["a", "b", ""]
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    assert found[-1]["population"]["truncated"] is True
    assert found[-1]["id"] == found[0]["id"]
    assert answer.text.endswith(DONE.decode())
    assert pair.engine.client_left.wait(5)


def test_a_whole_answer_is_cut_at_the_deadline_too(pair: Pair) -> None:
    pair.engine.steps = SLOW
    answer = post(pair, latency_budget_ms=700, on_deadline="truncate")
    body = answer.json()
    assert body["choices"][0]["text"] == "ab"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["population"]["truncated"] is True
    assert pair.engine.bodies[-1]["stream"] is True
    assert pair.engine.client_left.wait(5)


@pytest.mark.parametrize("stream", [True, False])
def test_with_nothing_at_the_deadline_an_empty_answer_is_returned(pair: Pair, stream: bool) -> None:
    pair.engine.steps = [30.0]
    answer = post(pair, stream=stream, latency_budget_ms=300, on_deadline="truncate", n=2)
    assert answer.status_code == 200
    choices = events(answer)[-1]["choices"] if stream else answer.json()["choices"]
    assert [(each["text"], each["finish_reason"]) for each in choices] == [("", "length")] * 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_would_rather_fail_gets_504_at_the_deadline(pair: Pair, stream: bool) -> None:
    pair.engine.steps = [30.0]
    answer = post(pair, stream=stream, latency_budget_ms=300, on_deadline="fail")
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert pair.engine.client_left.wait(5)


def test_a_stream_that_has_begun_fails_with_an_event(pair: Pair) -> None:
    pair.engine.steps = SLOW
    last = events(post(pair, stream=True, latency_budget_ms=700, on_deadline="fail"))[-1]
    assert last["error"]["code"] == "deadline_exceeded"


def test_an_assembled_answer_is_what_the_engine_would_have_answered_whole(pair: Pair) -> None:
    pair.engine.steps = [event("a"), event("bc"), USAGE, DONE]
    body = post(pair, latency_budget_ms=5000, on_deadline="truncate").json()
    assert body["choices"][0]["text"] == "abc"
    assert body["usage"]["completion_tokens"] == 3
    assert body["population"]["truncated"] is False


def test_chat_deltas_and_tool_calls_are_put_together() -> None:
    def chunk(**delta: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": {"content": [1]}, "finish_reason": None}
        return b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"

    assembly = Assembly()
    assembly.feed(chunk(role="assistant", content=""))
    assembly.feed(chunk(content="Hel") + chunk(content="lo"))
    assembly.feed(
        chunk(tool_calls=[{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{"}}])
    )
    assembly.feed(chunk(tool_calls=[{"index": 0, "function": {"arguments": "}"}}]))
    body = json.loads(assembly.answer(cut=Usage(prompt_tokens=3, completion_tokens=2)))
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hello", "tool_calls": [call]}
    assert body["choices"][0]["logprobs"] == {"content": [1] * 5}
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2}


def counted(text: str, tokens: int, *, index: int = 0, prompt_tokens: int = 4) -> bytes:
    """An event as an engine sends it that counts on the way: for each choice its own tokens."""
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + tokens, "completion_tokens": tokens}
    choices = [{"index": index, "text": text, "logprobs": None, "finish_reason": None}]
    return event("", choices=choices, usage={**usage, "prompt_tokens_details": {"cached_tokens": 0}})


def used(prompt_tokens: int, tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + tokens, "completion_tokens": tokens}


COUNTED = [counted("a", 1), counted("b", 2), 30.0]


def test_a_whole_answer_that_is_cut_has_the_usage_so_far(pair: Pair) -> None:
    pair.engine.steps = COUNTED
    assert post(pair, latency_budget_ms=700, on_deadline="truncate").json()["usage"] == used(4, 2)
    assert pair.engine.bodies[-1]["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    metrics = httpx.get(f"{pair.url}/metrics").text
    assert re.search(r"^chorus_gateway_completion_tokens_total.* 2.0", metrics, re.MULTILINE)


@pytest.mark.parametrize("prompt", [["a", "b"], "a"])
def test_the_usage_of_a_cut_answer_counts_every_choice_and_each_prompt_once(pair: Pair, prompt: Any) -> None:
    second = 4 if isinstance(prompt, str) else 6
    pair.engine.steps = [
        *(counted("a", tokens) for tokens in (1, 2)),
        *(counted("a", tokens, index=1) for tokens in (1, 2, 3)),
        *((counted("a", tokens, index=2, prompt_tokens=second)) for tokens in (1, 2)),
        30.0,
    ]
    num = 2 if isinstance(prompt, list) else 3
    found = post(pair, prompt=prompt, n=num, latency_budget_ms=700, on_deadline="truncate").json()
    assert found["usage"] == used(4 if isinstance(prompt, str) else 10, 7)


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_a_stream_that_is_cut_ends_with_the_usage_for_clients_that_want_it(pair: Pair, route: str) -> None:
    pair.engine.steps = COUNTED
    terms = {"max_tokens": 9, "stream": True, "latency_budget_ms": 700, "on_deadline": "truncate"}
    body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], **terms}
    for options, shown in (({"include_usage": True}, used(4, 2)), ({"include_usage": False}, None), (None, None)):
        answer = httpx.post(f"{pair.url}/v1/{route}", json={**body, "stream_options": options}, timeout=20)
        found = events(answer)
        assert all("usage" not in each for each in found[:2])
        assert answer.text.endswith(DONE.decode())
        last = found[-1]
        assert last.get("usage") == shown
        assert (last["choices"] == []) == (shown is not None)
        assert last["id"] == found[0]["id"]
        assert found[2]["choices"][0]["finish_reason"] == "length"


def test_counts_on_the_way_pass_to_clients_that_want_them(pair: Pair) -> None:
    pair.engine.steps = [*COUNTED[:2], USAGE, DONE]
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = post(pair, stream=True, stream_options=options, latency_budget_ms=5000, on_deadline="truncate")
    assert [each["usage"]["completion_tokens"] for each in events(answer)] == [1, 2, 3]


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_cut_before_its_first_token_has_used_its_prompt(pair: Pair, stream: bool) -> None:
    pair.engine.steps = [30.0]
    options = {"stream_options": {"include_usage": True}} if stream else {}
    answer = post(pair, prompt=[5, 6, 7], stream=stream, latency_budget_ms=300, on_deadline="truncate", **options)
    found = events(answer)[-1] if stream else answer.json()
    assert found["usage"] == used(3, 0)


@pytest.fixture
def slow_pair(tiny: Population) -> Iterator[Pair]:
    """A gateway that knows its engine to be slow."""
    with gateway_before(ScriptedEngine([WHOLE]), tiny) as pair:
        pair.engine.content_type = "application/json"
        pair.gateway.engines[0].model = known(first_s=1.0, member_s=1.0)
        yield pair


def test_a_budget_that_no_engine_could_keep_is_served_at_the_floor_or_refused_at_once(slow_pair: Pair) -> None:
    served = post(slow_pair, latency_budget_ms=2000)
    assert served.status_code == 200
    assert served.json()["population"]["tier"] == "economy"
    assert served.json()["population"]["tier_asked"] == "default"
    refused = post(slow_pair, latency_budget_ms=2000, on_deadline="fail")
    assert refused.status_code == 504
    assert "economy" in refused.json()["error"]["message"]
    assert len(slow_pair.engine.bodies) == 1


def test_the_budget_chooses_the_tier_and_the_floor_bounds_it(slow_pair: Pair) -> None:
    asks = {"economy": 15_000, "standard": 25_000, "max": 90_000}
    for tier, budget_ms in asks.items():
        assert post(slow_pair, latency_budget_ms=budget_ms).json()["population"]["tier"] == tier
    floored = post(slow_pair, latency_budget_ms=15_000, min_budget="standard").json()["population"]
    assert floored["tier"] == "standard"
    text = httpx.get(f"{slow_pair.url}/metrics").text
    assert 'chorus_gateway_deadlines_total{outcome="met",tier_served="max"} 1.0' in text
    assert 'chorus_gateway_shrunk_requests_total{tier_served="economy"} 1.0' in text
    assert 'chorus_gateway_shrunk_requests_total{tier_served="standard"} 2.0' in text
    assert 'chorus_gateway_shrunk_requests_total{tier_served="max"}' not in text


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"latency_budget_ms": 0}, "invalid_value", "latency_budget_ms"),
        ({"latency_budget_ms": 0.4}, "invalid_value", "latency_budget_ms"),
        ({"latency_budget_ms": "10"}, "invalid_value", "latency_budget_ms"),
        ({"latency_budget_ms": 1e12}, "invalid_value", "latency_budget_ms"),
        ({"on_deadline": "explode", "latency_budget_ms": 10}, "invalid_value", "on_deadline"),
        ({"on_deadline": "fail"}, "invalid_value", "on_deadline"),
        ({"min_budget": 9}, "budget_out_of_range", "min_budget"),
        ({"min_budget": "max", "budget": 1}, "contradictory_budget", "min_budget"),
    ],
)
def test_invalid_time_budgets_are_refused(pair: Pair, fields: dict[str, Any], code: str, param: str) -> None:
    answer = post(pair, **fields)
    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, param)


def test_the_openapi_document_describes_time_budgets(pair: Pair) -> None:
    document = httpx.get(f"{pair.url}/openapi.json").json()
    for route in ("/v1/completions", "/v1/chat/completions"):
        schema = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"budget", "latency_budget_ms", "on_deadline", "min_budget"} <= schema["properties"].keys()
