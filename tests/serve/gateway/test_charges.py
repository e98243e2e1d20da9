"""A key pays for what the engine computed: no less where an answer is left or fails, no more where it is refused."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from chorus.population.manifest import Population
from chorus.serve.gateway.admission.admission import Limits
from chorus.serve.gateway.api import auxiliary
from chorus.serve.gateway.request.keys import Keys
from chorus.serve.gateway.shared.store import Bucket, MemoryStore
from tests.live import wait_for
from tests.serve.gateway.conftest import Pair, gateway_before
from tests.serve.gateway.scripted import DONE, USAGE, WHOLE, ScriptedEngine, event
from tests.serve.gateway.test_deadlines import counted
from tests.serve.gateway.test_keys import ALICE, entry, post, text

PER_MIN = 600
HEADERS = {"Authorization": f"Bearer {ALICE}"}


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets do not fill again, so that what is missing is what was charged."""
    monkeypatch.setattr(
        MemoryStore, "_level", lambda self, bucket: self._levels.get(bucket.name, (bucket.burst, 0.0))[0]
    )


@pytest.fixture
def metered(tiny: Population) -> Iterator[Pair]:
    engine = ScriptedEngine()
    with gateway_before(engine, tiny, keys=Keys(text=text(entry("alice", ALICE, tokens_per_min=PER_MIN)))) as pair:
        yield pair


def charged(pair: Pair) -> float:
    """Tokens that are missing from the key's bucket."""
    store = pair.gateway.store
    assert isinstance(store, MemoryStore)
    level, _ = store._levels.get("tokens:alice", (float(PER_MIN), 0.0))
    return PER_MIN - level


def is_charged(pair: Pair, tokens: int) -> bool:
    """Whether just so much is, a moment later: an answer is settled when its client has it."""
    wait_for(f"{tokens} to be charged", lambda: charged(pair) == tokens, timeout_s=10)
    return True


def leave(pair: Pair, until: bytes, **fields: Any) -> None:
    """Ask for a stream, read until something is there, and go."""
    body = json.dumps({"prompt": "a", "stream": True, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(pair.url).port or 0), timeout=20) as client:
        client.sendall(head.encode() + body)
        heard = b""
        while until not in heard:
            part = client.recv(65536)
            assert part, heard
            heard += part
    assert pair.engine.client_left.wait(10)
    (engine,) = pair.gateway.pool.engines
    wait_for("the request to be over", lambda: engine.traffic.num_sequences == 0, timeout_s=10)


def test_a_stream_that_is_left_costs_what_was_generated_until_then(metered: Pair) -> None:
    metered.engine.steps = [*(counted("a", tokens) for tokens in range(1, 41)), counted("here", 41), 30.0]
    leave(metered, b"here", max_tokens=240)
    assert is_charged(metered, 4 + 41)
    used = 'chorus_gateway_tenant_tokens_total{tenant="alice"} 45.0'
    wait_for("the count", lambda: used in httpx.get(f"{metered.url}/metrics").text, timeout_s=10)


def test_tokens_that_come_together_count_one_by_one(metered: Pair) -> None:
    """An engine joins what its reader is slow to take: events are no measure."""
    metered.engine.steps = [counted("a", 1), counted("here", 100), 30.0]
    leave(metered, b"here", max_tokens=240)
    assert is_charged(metered, 104)


def test_many_sequences_beyond_the_burst_are_a_debt(metered: Pair) -> None:
    steps = [counted("a", 50, index=index, prompt_tokens=2) for index in range(40)]
    metered.engine.steps = [*steps, counted("here", 51), 30.0]
    leave(metered, b"here", prompt=["a"] * 40, max_tokens=240)
    assert is_charged(metered, 39 * 52 + 4 + 51)
    refused = post(metered)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 100


def test_a_stream_that_is_left_when_nothing_countable_came_keeps_its_charge(metered: Pair) -> None:
    metered.engine.steps = [b": hello\n\n", 30.0]
    leave(metered, b"hello", prompt=[1] * 90, max_tokens=240)
    assert is_charged(metered, 90 + 240)


def test_who_takes_nothing_of_a_stream_pays_for_all_of_it(metered: Pair) -> None:
    """The engine goes on behind what lies ready, where nobody sees how far."""
    metered.engine.steps = [counted("x" * 100_000, tokens) for tokens in range(1, 200)] + [30.0]
    body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 240}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\nContent-Length: {len(body)}\r\n\r\n"
    (engine,) = metered.gateway.pool.engines
    with socket.create_connection(("127.0.0.1", httpx.URL(metered.url).port or 0), timeout=20) as client:
        client.sendall(head.encode() + body)
        wait_for("the request", lambda: bool(metered.engine.bodies), timeout_s=10)
        time.sleep(1.0)
    wait_for("the request to be over", lambda: engine.traffic.num_sequences == 0, timeout_s=10)
    assert charged(metered) >= 240


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_fails_at_its_deadline_costs_what_was_generated_late(metered: Pair, stream: bool) -> None:
    metered.engine.steps = [counted("a", 30), counted("b", 60), 30.0]
    fields = {"max_tokens": 250, "n": 2, "latency_budget_ms": 700, "on_deadline": "fail", "stream": stream}
    answer = post(metered, **fields)
    assert "deadline_exceeded" in answer.text
    assert is_charged(metered, 4 + 60)


def test_where_an_engine_does_not_say_what_it_computed_the_charge_stays(metered: Pair) -> None:
    metered.engine.steps = [event("a"), event("b"), 30.0]
    fields = {"max_tokens": 250, "n": 2, "latency_budget_ms": 2500, "on_deadline": "fail"}
    assert [post(metered, **fields).status_code for _ in range(3)] == [504, 429, 429]


def test_an_answer_that_fails_before_its_first_token_costs_its_prompt(metered: Pair) -> None:
    metered.engine.steps = [30.0]
    fields = {"max_tokens": 250, "latency_budget_ms": 300, "on_deadline": "fail", "prompt": [1] * 50}
    assert post(metered, **fields).status_code == 504
    assert is_charged(metered, 50)


@pytest.mark.parametrize("stream", [True, False])
def test_what_is_refused_or_lost_costs_nothing(metered: Pair, stream: bool) -> None:
    metered.engine.status = 400
    metered.engine.steps = [b'{"error": {"message": "no"}}']
    assert post(metered, max_tokens=90, stream=stream).status_code == 400
    metered.engine.status, metered.engine.break_before_answer = 200, 2
    assert post(metered, max_tokens=90, stream=stream).status_code == 503
    assert is_charged(metered, 0)


def test_who_leaves_the_queue_pays_nothing(tiny: Population) -> None:
    engine = ScriptedEngine([3.0, WHOLE])
    engine.content_type = "application/json"
    keys = Keys(text=text(entry("alice", ALICE, tokens_per_min=PER_MIN)))
    with gateway_before(engine, tiny, keys=keys, limits=Limits(max_sequences=1)) as pair:
        running = threading.Thread(target=lambda: post(pair, max_tokens=10))
        running.start()
        wait_for("it to run", lambda: bool(engine.bodies), timeout_s=10)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{pair.url}/v1/completions", json={"prompt": "a", "max_tokens": 200}, headers=HEADERS, timeout=0.5
            )
        wait_for("it to have left", lambda: pair.gateway.admission.num_waiting == 0, timeout_s=10)
        assert charged(pair) < 20
        running.join()


def test_counts_on_the_way_are_for_the_gateway_alone(metered: Pair) -> None:
    metered.engine.steps = [counted("a", 1), counted("b", 2), USAGE, DONE]
    answer = post(metered, stream=True)
    assert "usage" not in answer.text
    assert "continuous_usage_stats" in metered.engine.bodies[-1]["stream_options"]
    assert is_charged(metered, 7)


@pytest.mark.parametrize("route", ["/tokenize", "/detokenize"])
def test_tokens_are_cut_and_joined_within_the_keys_rates(tiny: Population, route: str) -> None:
    engine = ScriptedEngine([b'{"count":40,"max_model_len":256,"tokens":[1,2]}'])
    engine.content_type = "application/json"
    keys = Keys(text=text(entry("alice", ALICE, tokens_per_min=PER_MIN, requests_per_s=1e6)))
    with gateway_before(engine, tiny, keys=keys) as pair:
        body = {"prompt": "a" * 1000} if route == "/tokenize" else {"tokens": [1] * 500}
        codes = [httpx.post(pair.url + route, json=body, headers=HEADERS).status_code for _ in range(3)]
        assert codes == [200, 200, 200]  # 500 are taken, 40 used
        assert is_charged(pair, 120)
        engine.status = 400
        httpx.post(pair.url + route, json=body, headers=HEADERS)
        assert is_charged(pair, 120)
    with gateway_before(engine, tiny, keys=Keys(text=text(entry("alice", ALICE, requests_per_s=0.01)))) as pair:
        engine.status = 200
        codes = [httpx.post(pair.url + route, json=body, headers=HEADERS).status_code for _ in range(2)]
        assert codes == [200, 429]


@pytest.mark.parametrize("route", ["/tokenize", "/detokenize", "/v1/population/disagreement"])
def test_what_no_context_holds_is_refused_there(pair: Pair, route: str) -> None:
    body = json.dumps({"prompt": "a" * 300_000, "tokens": [1] * 100_000}).encode()
    refused = httpx.post(pair.url + route, content=body)
    assert refused.status_code == 413
    assert str(256 * 1024) in refused.json()["error"]["message"]
    assert not pair.engine.bodies


@pytest.mark.parametrize("route", ["/tokenize", "/detokenize", "/v1/population/disagreement"])
def test_a_few_at_once_run_and_clients_that_leave_take_theirs_with_them(pair: Pair, route: str) -> None:
    pair.engine.is_stuck = True
    body = json.dumps({"prompt": [1, 2, 3] if "v1" in route else "a", "tokens": [1]}).encode()
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (route.encode(), len(body))
    port = httpx.URL(pair.url).port or 0
    lines = pair.gateway.slots._tenants
    clients = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(32)]
    for client in clients:
        client.sendall(head + body)
    wait_for("all to wait", lambda: bool(lines) and lines["anyone"].num_requests == 32, timeout_s=10)
    refused = httpx.post(pair.url + route, content=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    for client in clients:
        client.close()
    wait_for("all to have left", lambda: not lines, timeout_s=10)
    (engine,) = pair.gateway.pool.engines
    assert (engine.traffic.num_sequences, pair.gateway.admission.num_waiting) == (0, 0)


def test_an_engine_that_never_answers_is_not_waited_for_for_ever(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(auxiliary.serve.__kwdefaults__, "timeout_s", 0.3)
    pair.engine.is_stuck = True
    late = httpx.post(f"{pair.url}/tokenize", json={"prompt": "a"})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")


def test_a_debt_is_paid_at_the_buckets_rate() -> None:
    async def scenario() -> None:
        store, bucket = MemoryStore(), Bucket(name="a", rate_per_s=10, burst=600)
        await store.take(bucket, 600)
        await store.settle(bucket, 1400)
        assert await store.take(bucket, 100) == pytest.approx(150, abs=1)

    asyncio.run(scenario())
