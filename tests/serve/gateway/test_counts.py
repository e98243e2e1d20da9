"""Numbers that clients send: what is counted is what the engine gets, and none of them disturbs anybody else."""

import asyncio
import json
import threading
from typing import Any

import httpx
import pytest

from chorus.population.errors import ChorusError
from chorus.population.manifest import Population
from chorus.serve.gateway.admission.admission import Limits
from chorus.serve.gateway.request.call import Call, Kind, read_call
from chorus.serve.gateway.request.errors import ApiError
from chorus.serve.gateway.request.keys import Keys, Tenant
from chorus.serve.gateway.request.tiers import default_tier
from tests.live import wait_for
from tests.serve.gateway.conftest import Pair, gateway_before
from tests.serve.gateway.scripted import WHOLE, ScriptedEngine
from tests.serve.gateway.test_admission import Harness, run_scenario, settle
from tests.serve.gateway.test_keys import ALICE, BOB, entry, guarded, post, text

MESSAGES = [{"role": "user", "content": "a"}]


def call(population: Population, kind: Kind = "completion", **fields: Any) -> Call:
    body = {"messages": MESSAGES} if kind == "chat" else {"prompt": "a"}
    return read_call(json.dumps({**body, **fields}).encode(), kind, population, default_tier(population))


@pytest.mark.parametrize("name", ["n", "best_of", "max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("kind", ["completion", "chat"])
@pytest.mark.parametrize("value", ["3", True, 2.5, -1, [3], {}, 2**31, 1e300, 10**18, "1e3"])
def test_a_count_that_is_no_whole_number_in_range_is_refused(
    tiny: Population, kind: Kind, name: str, value: Any
) -> None:
    with pytest.raises(ApiError) as refused:
        call(tiny, kind, **{name: value})
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, "invalid_value", name)


@pytest.mark.parametrize("digits", [20, 300, 307, 4000])
@pytest.mark.parametrize("name", ["n", "max_tokens", "seed", "budget", "latency_budget_ms", "nested"])
def test_integers_beyond_64_bits_are_refused_wherever_they_are(tiny: Population, name: str, digits: int) -> None:
    value = 10**digits
    with pytest.raises(ApiError) as refused:
        call(tiny, **{name: [{"a": value}] if name == "nested" else value})
    assert refused.value.status == 422


def test_digits_in_a_text_are_no_number(tiny: Population) -> None:
    assert call(tiny, prompt="1" * 400, seed=2**63 - 1).size.prompt_characters == 400


def test_the_engine_gets_what_was_counted(tiny: Population) -> None:
    found = call(tiny, n=3.0, max_tokens=16.0, best_of=4)
    assert (found.size.num_sequences, found.size.num_choices, found.size.max_tokens) == (4, 3, 16)
    sent = json.loads(found.body())
    assert (sent["n"], sent["max_tokens"]) == (3, 16)
    assert all(type(sent[name]) is int for name in ("n", "max_tokens", "best_of"))


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_null_is_the_default_of_every_optional_field(tiny: Population, kind: Kind) -> None:
    names = (
        "n",
        "best_of",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "stop",
        "stream",
        "logprobs",
        "tools",
    )
    ours = ("model", "budget", "min_budget", "latency_budget_ms", "on_deadline", "stream_interval", "vllm_xargs")
    nothing = dict.fromkeys((*names, *ours))
    assert call(tiny, kind, **nothing) == call(tiny, kind)
    streaming = call(tiny, kind, stream=True, stream_options={"include_usage": None})
    assert json.loads(streaming.body())["stream_options"]["include_usage"] is True
    assert not streaming.has_usage


@pytest.mark.parametrize(
    ("fields", "num"),
    [
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"prompt": [[1, 2], [3]], "best_of": 2}, 4),
        ({"prompt": [1, 2, 3], "n": 2}, 2),
        ({"prompt": None, "prompt_embeds": ["x", "y"]}, 2),
        ({"prompt": "a", "prompt_embeds": "x", "n": 2}, 4),
    ],
)
def test_every_sequence_of_a_request_counts(tiny: Population, fields: dict[str, Any], num: int) -> None:
    assert call(tiny, **fields).size.num_sequences == num


@pytest.mark.parametrize(
    "fields", [{"n": 2**31 - 1}, {"n": 65}, {"prompt": ["a"] * 1024}, {"prompt": ["a"] * 33, "n": 2}]
)
def test_more_sequences_than_run_at_once_are_refused_and_leave_no_trace(pair: Pair, fields: dict[str, Any]) -> None:
    refused = httpx.post(f"{pair.url}/v1/completions", json={"prompt": "a", **fields})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "too_many_sequences")
    assert "at most 64" in refused.json()["error"]["message"]
    assert not pair.engine.bodies
    (engine,) = pair.gateway.pool.engines
    assert (engine.traffic.num_sequences, pair.gateway.admission.num_waiting) == (0, 0)


@pytest.mark.parametrize(
    "body", [b'{"prompt": "a", "max_tokens": 250, "n": 1%s}' % (b"0" * zeros) for zeros in (307, 300, 9)]
)
def test_a_huge_number_of_one_tenant_is_nothing_to_another(tiny: Population, body: bytes) -> None:
    with guarded(tiny, entry("alice", ALICE, tokens_per_min=600), entry("bob", BOB)) as pair:
        assert post(pair, BOB).status_code == 200
        headers = {"Authorization": f"Bearer {ALICE}"}
        assert httpx.post(f"{pair.url}/v1/completions", content=body, headers=headers).status_code in (400, 422)
        assert [post(pair, key).status_code for key in (BOB, ALICE, BOB)] == [200] * 3
        assert 'chorus_gateway_engine_sequences{engine="' in (metrics := httpx.get(f"{pair.url}/metrics").text)
        assert all(line.endswith(" 0.0") for line in metrics.splitlines() if "engine_sequences{" in line)


def test_a_request_that_cannot_be_planned_fails_alone(tiny: Population, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever overflows: nothing stays taken, and who waits behind it, or ends before it, notices nothing."""

    async def scenario(harness: Harness) -> None:
        charge = harness.admission._queue.charge

        def overflow(pending: Any, plan: Any) -> None:
            if pending.tenant.name == "poison":
                raise OverflowError("int too large to convert to float")
            charge(pending, plan)

        monkeypatch.setattr(harness.admission._queue, "charge", overflow)
        with pytest.raises(OverflowError):
            await harness.submit(Tenant(name="poison"))
        assert harness.engine.traffic.num_sequences == 0
        first = await harness.submit()
        poison, behind = harness.submit(Tenant(name="poison")), harness.submit()
        await settle()
        harness.admission.release(first)
        with pytest.raises(OverflowError):
            await poison
        harness.admission.release(await behind)
        assert (harness.engine.traffic.num_sequences, harness.admission.num_waiting) == (0, 0)

    run_scenario(tiny, scenario, max_sequences=1)


@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError])
def test_leave_is_given_back_however_a_request_ends(tiny: Population, error: type[BaseException]) -> None:
    async def scenario(harness: Harness) -> None:
        found = call(tiny)
        with pytest.raises(error):  # noqa: PT012
            async with harness.admission.admitted(
                found, Tenant(name="a"), [found.choice.tier], arrived_at=0.0
            ) as grant:
                assert grant.engine.traffic.num_sequences == 1
                raise error
        assert harness.engine.traffic.num_sequences == 0

    run_scenario(tiny, scenario)


def test_what_an_engine_refuses_does_not_count_for_whose_turn_it_is(tiny: Population) -> None:
    refused, modest = Tenant(name="refused"), Tenant(name="modest")

    async def scenario(harness: Harness) -> None:
        for _ in range(10):
            grant = await harness.submit(refused, n=4, max_tokens=250)
            grant.in_flight.num_generated = 0
            harness.admission.release(grant)
        grant = await harness.submit(modest, max_tokens=20)
        asks = {each.name: harness.submit(each, n=4) for each in (modest, refused)}
        await settle()
        harness.admission.release(grant)
        await settle()
        assert asks["refused"].done()
        assert not asks["modest"].done()
        asks["modest"].cancel()

    run_scenario(tiny, scenario, max_sequences=4)


def test_the_places_of_sequences_that_ended_are_free_before_the_others_end(tiny: Population) -> None:
    async def scenario(harness: Harness) -> None:
        batch = await harness.submit(n=4)
        waiting = harness.submit(n=2)
        await settle()
        harness.admission.end_sequences(batch, 1)
        await settle()
        assert not waiting.done()
        harness.admission.end_sequences(batch, 1)
        grant = await waiting
        assert harness.engine.traffic.num_sequences == 4
        for each in (batch, grant):
            harness.admission.release(each)
        assert (harness.engine.traffic.num_sequences, harness.engine.traffic.load().rows) == (0, 0)

    run_scenario(tiny, scenario, max_sequences=4)


def test_a_batch_waits_for_places_like_as_many_requests(tiny: Population) -> None:
    engine = ScriptedEngine([0.6, WHOLE])
    engine.content_type = "application/json"
    with gateway_before(engine, tiny, limits=Limits(max_sequences=4)) as pair:
        batch = threading.Thread(target=lambda: httpx.post(f"{pair.url}/v1/completions", json={"prompt": ["a"] * 3}))
        batch.start()
        wait_for("the batch to run", lambda: len(engine.bodies) == 1, timeout_s=10)
        both = threading.Thread(target=lambda: httpx.post(f"{pair.url}/v1/completions", json={"prompt": "a", "n": 2}))
        both.start()
        assert httpx.post(f"{pair.url}/v1/completions", json={"prompt": "b"}, timeout=20).status_code == 200
        assert [body.get("n", 1) for body in engine.bodies[:2]] == [1, 1]
        both.join()
        batch.join()


@pytest.mark.parametrize(
    "rights",
    [
        {"requests_per_s": 1e-300},
        {"requests_per_s": 1e300},
        {"tokens_per_min": 1e-9},
        {"share": 1e-300},
        {"share": 1e300},
    ],
)
def test_rates_of_keys_are_bounded(rights: dict[str, float]) -> None:
    (name,) = rights
    with pytest.raises(ChorusError, match=name):
        Keys(text=text(entry("alice", ALICE, **rights)))


def test_the_smallest_rate_says_when_to_come_back(tiny: Population) -> None:
    with guarded(tiny, entry("alice", ALICE, requests_per_s=1e-5)) as pair:
        assert post(pair).status_code == 200
        refused = post(pair)
        assert refused.status_code == 429
        assert 3600 < int(refused.headers["retry-after"]) <= 86_400
