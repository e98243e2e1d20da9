"""Time budgets: what is admitted at which tier, what the engine is told, and what happens at the deadline."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from population.manifest import Population
from serve.gateway.assembly import Assembly
from serve.gateway.costs import StepCosts, read_costs
from serve.gateway.demand import Demand, Supply
from serve.gateway.flights import Flight, Flights
from serve.gateway.latency import LatencyModel, Load, Work
from serve.gateway.plans import NotNow, Plan, Wish, plan
from serve.gateway.squeeze import Squeeze
from serve.gateway.surprises import Surprises
from serve.gateway.terms import Size
from serve.least_squares import LeastSquares
from tests.serve.gateway.conftest import Pair, gateway_before
from tests.serve.gateway.scripted import DONE, USAGE, WHOLE, ScriptedEngine, event


def known(*, first_s: float = 0.02, member_s: float = 0.01, row_s: float = 0.001) -> LatencyModel:
    """A model that has seen answers of an engine which takes just this long."""
    model = LatencyModel()
    for members in (1, 2, 4) * 8:
        for others in (0, 4, 12):
            work = Work(members=members, prompt_tokens=10, max_tokens=8)
            model.observe_first(Load(members=members, rows=others), work, first_s)
            load = Load(members=members, rows=others + members)
            model.observe_tokens(load, member_s * members + row_s * (others + members))
            model.observe_total(expected_s=1.0, seconds=1.0)
    return model


def wish(tiny: Population, *, left_s: float | None, max_tokens: int = 11) -> Wish:
    return Wish(tiers=tiny.tiers[::-1], size=Size(max_tokens=max_tokens), finish_by=left_s)


def decide(each: Wish, flights: Flights, model: LatencyModel, **options: Any) -> Plan | NotNow:
    return plan(each, flights, model, now=0.0, **{"probability": 0.95, "max_sequences": 8, **options})


def test_the_learned_weights_are_those_of_weighted_nonnegative_least_squares() -> None:
    rng = np.random.default_rng(3)
    fast = LeastSquares((1.0, 4.0, 16.0), forgetting=0.95)
    features_NF = np.column_stack([np.ones(400), rng.uniform(0, 8, 400) / 4, rng.uniform(0, 64, 400) / 16])
    targets_N = features_NF @ np.array([0.5, 2.0, 0.0]) + rng.normal(0, 0.3, 400)
    for features_F, target in zip(features_NF * np.array([1.0, 4.0, 16.0]), targets_N, strict=True):
        fast.observe(tuple(features_F), float(target))
    root_N = np.sqrt(0.95 ** np.arange(399, -1, -1))
    slow_F, _ = nnls(features_NF * root_N[:, None], targets_N * root_N)
    assert fast.weights_F == pytest.approx(slow_F, abs=0.02)
    assert (fast.weights_F >= 0).all()


def test_a_load_that_never_varied_does_not_throw_the_weights_when_it_does() -> None:
    fast = LeastSquares((1.0, 4.0, 16.0), forgetting=0.95)
    for _ in range(2000):
        fast.observe((1.0, 4.0, 16.0), 1.0)
    fast.observe((1.0, 4.01, 20.0), 0.3)
    assert 0.2 < fast.predict((1.0, 4.0, 16.0)) < 1.1
    assert fast.predict((1.0, 7.0, 64.0)) < 10


def test_the_model_finds_what_an_engine_costs_and_how_much_its_answers_scatter() -> None:
    rng = np.random.default_rng(0)
    model = LatencyModel()
    for _ in range(400):
        members, rows = int(rng.integers(1, 8)), int(rng.integers(1, 60))
        load, work = Load(members=members, rows=rows), Work(members=members, prompt_tokens=100, max_tokens=10)
        expected_s = model.total_s(load, load, work)
        noise = rng.lognormal(0, 0.2)
        model.observe_first(load, work, 0.01 + 1e-4 * members * 100)
        model.observe_tokens(load, 0.002 + 0.003 * members + 0.0002 * rows)
        if model.is_seeded:
            model.observe_total(expected_s=expected_s, seconds=expected_s * noise)
    assert model.token_s(Load(members=4, rows=20)) == pytest.approx(0.018, rel=0.05)
    assert model.first_s(Load(), Work(members=5, prompt_tokens=100, max_tokens=1)) == pytest.approx(0.06, rel=0.1)
    assert model.margin(0.95, 0.2) == pytest.approx(np.exp(0.2 * 1.645), rel=0.15)
    other = LatencyModel()
    other.restore(json.loads(json.dumps(model.state())))
    assert other.token_s(Load(members=4, rows=20)) == pytest.approx(model.token_s(Load(members=4, rows=20)))


@pytest.mark.parametrize(
    ("left_s", "tier", "members"),
    [(10.0, "max", 4), (0.5, "max", 4), (0.4, "max", 3), (0.3, "standard", 2), (0.2, "economy", 1), (None, "max", 4)],
)
def test_as_many_members_as_fit_the_budget_are_taken(
    tiny: Population, left_s: float | None, tier: str, members: int
) -> None:
    found = decide(wish(tiny, left_s=left_s), Flights(), known())
    assert isinstance(found, Plan)
    assert (found.tier.name, found.work.members) == (tier, members)


def test_costs_are_read_from_an_engines_metrics() -> None:
    text = "\n".join(
        f'chorus_engine_step_cost_seconds{{engine="0",part="{part}"}} {value}'
        for part, value in (("member", 7e-4), ("row", 1e-5), ("context", 0.0), ("step", "0.0012"), ("request", 5e-5))
    )
    expected = StepCosts(step=0.0012, request=5e-5, member=7e-4, row=1e-5, context=0.0)
    assert read_costs(f"# HELP x\n{text}\nother 1\n".encode()) == expected
    assert read_costs(b"other 1\n") is None
    assert read_costs(b'chorus_engine_step_cost_seconds{engine="0",part="step"} 1\n') is None


@pytest.mark.parametrize(("member_s", "row_s"), [(0.001, 0.00002), (0.0001, 0.0003)])
def test_the_members_that_can_be_kept_up_follow_from_the_costs(member_s: float, row_s: float) -> None:
    costs = StepCosts(step=0.001, request=0.0, member=member_s, row=row_s, context=0.0)
    supply = Supply(model=known(), costs=costs, num_engines=1, max_sequences=10**6, probability=0.95)
    work, sizes = Work(members=8, prompt_tokens=0, max_tokens=50), range(1, 9)
    before = 8.0
    for rate in (1, 100, 400, 1600):  # tokens per second
        demand = Demand()
        now = time.perf_counter()
        for idx in range(400):
            demand.note(Size(max_tokens=rate), prompt_tokens=0, members=None, now=now + idx / 10)
        found = demand.most_members(supply, sizes, work, 0.5, now + 40)
        assert 1 <= found <= before
        before = found
    assert before < 8, "1,600 tokens a second are too many for eight members each"


def test_what_fits_no_tier_waits_if_others_are_the_reason_and_is_late_otherwise(tiny: Population) -> None:
    flights, model = Flights(), known()
    assert decide(wish(tiny, left_s=0.05), flights, model) is NotNow.LATE
    for _ in range(4):
        flights.begin(flight(tiny, None))
    assert decide(wish(tiny, left_s=0.2), flights, model) is NotNow.LATE_NOW
    assert decide(wish(tiny, left_s=None), flights, model, max_sequences=4) is NotNow.FULL


def flight(tiny: Population, finish_by: float | None, tier: str = "max") -> Flight:
    large = tiny.tier(tier)
    work = Work(members=large.budget, prompt_tokens=4, max_tokens=11)
    return Flight(
        tier=large,
        floor=tiny.tiers[0],
        num_sequences=1,
        work=work,
        finish_by=finish_by,
        began_at=0.0,
        expected_first_s=0.02,
        expected_token_s=0.05,
    )


def test_nobody_is_let_in_who_would_make_others_late(tiny: Population) -> None:
    flights, model = Flights(), known(row_s=0.02)
    flights.begin(flight(tiny, finish_by=1.5))
    alone = decide(wish(tiny, left_s=10.0), Flights(), model)
    beside = decide(wish(tiny, left_s=10.0), flights, model)
    assert isinstance(alone, Plan)
    assert alone.tier.name == "max"
    assert isinstance(beside, Plan)
    assert beside.tier.name == "standard"  # at four members each, the first would need 2.2 s; at two, 1.1 s


def test_pressure_takes_the_largest_tiers_away_down_to_the_floor(tiny: Population) -> None:
    tiers = [decide(wish(tiny, left_s=None), Flights(), known(), pressure=p) for p in (0.0, 0.5, 1.0)]
    assert [each.tier.name for each in tiers if isinstance(each, Plan)] == ["max", "standard", "economy"]


def test_the_mean_load_is_the_integral_over_time(tiny: Population) -> None:
    flights = Flights()
    first, second = flight(tiny, None, "max"), flight(tiny, None, "economy")
    first.began_at = time.perf_counter()
    flights.begin(first)
    time.sleep(0.05)
    flights.begin(second)
    middle = time.perf_counter()
    time.sleep(0.05)
    end = time.perf_counter()
    mean = flights.mean_load(first, end)
    assert mean is not None
    assert mean.members == pytest.approx(4, rel=0.02)
    assert mean.rows == pytest.approx(4 + (end - middle) / (end - first.began_at), rel=0.05)
    for each in (first, second):
        flights.end(each)
    assert flights.load() == Load(members=0, rows=0)


@pytest.mark.parametrize("change", [0.1, 10.0])
def test_whole_answers_alone_teach_that_an_engine_became_faster_or_slower(change: float) -> None:
    model = known(first_s=1.0, member_s=0.02)
    load, work = Load(members=2, rows=2), Work(members=2, prompt_tokens=10, max_tokens=20)
    before_s = model.total_s(Load(), load, work)
    for _ in range(300):
        model.observe_whole(Load(), load, work, 20, before_s * change)
    assert model.total_s(Load(), load, work) == pytest.approx(before_s * change, rel=0.1)


def test_the_margin_falls_while_promises_are_kept_and_rises_when_they_are_not() -> None:
    model = known()
    for ratio in np.linspace(0.5, 2.0, 256):
        model.observe_total(expected_s=1.0, seconds=ratio)
    assert model.margin(0.9, 1.0) == pytest.approx(1.85, abs=0.02)
    for _ in range(1000):
        model.observe_promise(kept=True, probability=0.9)
    assert model.margin(0.9, 1.0) == pytest.approx(1.4, abs=0.02)  # the lowest quantile that is ever taken
    late = 0
    for _ in range(3000):  # an engine that is in time where the margin is at least 1.7
        kept = model.margin(0.9, 1.0) >= 1.7
        late += not kept
        model.observe_promise(kept=kept, probability=0.9)
    assert late / 3000 == pytest.approx(0.1, abs=0.02)


def test_a_hiccup_in_short_answers_does_not_make_long_ones_look_hopeless(tiny: Population) -> None:
    """Seen on a live engine: the first prompts that were echoed took 2.3 s, 75 times what was expected of them."""
    model = known(first_s=0.03, member_s=0.002, row_s=0.0005)
    short, load = Work(members=4, prompt_tokens=60, max_tokens=1), Load(members=4, rows=4)
    for seconds in (2.27, 2.28, 2.28, 2.28, *[0.03] * 16):
        model.observe_total(expected_s=model.first_s(Load(), short), seconds=seconds)
        model.observe_whole(Load(), load, short, 1, seconds)
    found = decide(wish(tiny, left_s=4.0, max_tokens=41), Flights(), model)  # true: 0.5 s
    assert isinstance(found, Plan)
    assert found.tier.name == "max"
    assert found.total_s == pytest.approx(0.43, rel=0.5)
    assert found.total_s * model.margin(0.995, found.total_s) < 4.0


def test_answers_of_which_nothing_was_expected_say_little_about_others() -> None:
    model = known()
    for _ in range(64):
        model.observe_total(expected_s=1e-6, seconds=0.02)
    assert model.margin(0.97, 0.5) < 2.5


@pytest.mark.parametrize("change", [0.1, 10.0])
def test_a_lasting_change_is_believed_and_a_moment_is_not(change: float) -> None:
    fast = LeastSquares((1.0, 4.0), forgetting=0.97)
    rng = np.random.default_rng(5)

    def answer(factor: float) -> None:
        members = float(rng.integers(1, 8))
        fast.observe((1.0, members), factor * (0.1 + 0.05 * members) * rng.lognormal(0, 0.05))

    for _ in range(100):
        answer(1.0)
    answer(100.0)
    assert fast.predict((1.0, 4.0)) == pytest.approx(0.3, rel=0.1)
    for _ in range(100):
        answer(change)
    assert fast.predict((1.0, 4.0)) == pytest.approx(0.3 * change, rel=0.2 if change > 1 else 0.5)


def test_many_promises_of_a_kind_are_judged_by_themselves_and_few_by_what_is_assumed() -> None:
    few, many = Surprises(), Surprises((1.0, 1.5) for _ in range(128))
    assert few.factor(0.97, 1.0) == pytest.approx(1.3, abs=0.05)
    assert many.factor(0.5, 1.0) == pytest.approx(1.5)
    few.observe(1.0, 3.0)
    assert few.factor(0.97, 1.0) < 1.5  # one of so few has no weight yet


@given(
    st.lists(st.tuples(st.floats(1e-6, 10.0), st.floats(0.0, 100.0)), max_size=300),
    st.floats(1e-3, 100.0),
    st.floats(0.6, 0.995),
)
def test_no_answer_counts_for_more_than_its_own_loss_and_twice_the_rest(
    pairs: list[tuple[float, float]], target_s: float, level: float
) -> None:
    factor = Surprises(pairs).factor(level, target_s)
    worst_s = max((seconds + 2 * target_s for expected_s, seconds in pairs if expected_s <= target_s), default=0.0)
    longer = max((seconds / expected_s for expected_s, seconds in pairs if expected_s > target_s / 1.1), default=0.0)
    assert 0 <= factor <= max(1.6, 1.1 * worst_s / target_s, longer)


def test_on_an_idle_engine_nobody_waits_for_better_odds(tiny: Population) -> None:
    flights, model = Flights(), known()
    for _ in range(200):
        model.observe_total(expected_s=1.0, seconds=9.0)
    found = decide(wish(tiny, left_s=0.3), flights, model)  # 0.13 s for one member
    assert isinstance(found, Plan)
    assert found.tier.name == "economy"
    flights.begin(flight(tiny, None))
    assert decide(wish(tiny, left_s=0.3), flights, model) is NotNow.LATE_NOW


@given(st.floats(0.0, 0.35))
def test_the_squeeze_settles_where_few_are_late(needed: float) -> None:
    squeeze, late = Squeeze(misses=0.02), []
    for _ in range(4000):
        late.append(squeeze.part < needed)
        squeeze.observe(late=late[-1])
    assert sum(late[2000:]) / 2000 <= 0.04


def ask(pair: Pair, **fields: Any) -> httpx.Response:
    return httpx.post(f"{pair.url}/v1/completions", json={"prompt": "a", "max_tokens": 9, **fields}, timeout=20)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(part[6:]) for part in answer.text.split("\n\n") if part.startswith("data: {")]


def test_the_remaining_budget_and_the_floor_travel_to_the_engine(pair: Pair) -> None:
    pair.engine.steps, pair.engine.content_type = [WHOLE], "application/json"
    answer = ask(pair, latency_budget_ms=5000, min_budget=2, model="tiny:max").json()
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
    found = ask(pair, latency_budget_ms=330).json()["population"]  # 4 members would need 0.37 s
    extra = pair.engine.bodies[-1]["vllm_xargs"]
    assert (extra["chorus_tier"], extra["chorus_most_members"]) == ("max", 3)
    assert (found["tier"], found["most_members"], found["members_per_token"]) == ("max", 3, [[3, 9]])
    metrics = httpx.get(f"{pair.url}/metrics").text
    assert not re.search(r"^chorus_gateway_member_drops_total.* [1-9]", metrics, re.MULTILINE), "none left on the way"
    ask(pair, latency_budget_ms=9000)
    assert "chorus_most_members" not in pair.engine.bodies[-1]["vllm_xargs"]


def test_the_engines_drops_are_reported_in_the_population_object(pair: Pair) -> None:
    drops = {"members_per_token": [[4, 2], [3, 1]], "drops": [{"member": "t0-c00", "at_token": 2, "reason": "late"}]}
    whole = json.dumps({**json.loads(WHOLE), "kv_transfer_params": drops, "metrics": None}).encode()
    pair.engine.steps, pair.engine.content_type = [whole], "application/json"
    answer = ask(pair, latency_budget_ms=5000).json()
    assert answer["population"]["drops"] == drops["drops"]
    assert answer["population"]["members_per_token"] == drops["members_per_token"]
    assert answer["kv_transfer_params"] is None


def test_a_stream_says_at_its_end_whether_the_deadline_was_met(pair: Pair) -> None:
    end = event("c", choices=[{"index": 0, "text": "c", "logprobs": None, "finish_reason": "stop"}])
    pair.engine.steps = [event("a"), event('"finish_reason":"x"'), end, USAGE, DONE]
    first, middle, last = events(ask(pair, stream=True, latency_budget_ms=5000))
    assert first["population"]["latency_budget_ms"] == 5000
    assert "deadline" not in first["population"]
    assert "population" not in middle
    assert last["population"]["deadline"] == "met"


SLOW = [event("a"), event("b"), 30.0]


def test_a_stream_is_cut_at_the_deadline_and_ends_as_if_its_length_were_reached(pair: Pair) -> None:
    pair.engine.steps = SLOW
    began_at = time.monotonic()
    answer = ask(pair, stream=True, latency_budget_ms=700, on_deadline="truncate")
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
    answer = ask(pair, latency_budget_ms=700, on_deadline="truncate")
    body = answer.json()
    assert body["choices"][0]["text"] == "ab"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["population"]["truncated"] is True
    assert pair.engine.bodies[-1]["stream"] is True
    assert pair.engine.client_left.wait(5)


@pytest.mark.parametrize("stream", [True, False])
def test_with_nothing_at_the_deadline_an_empty_answer_is_returned(pair: Pair, stream: bool) -> None:
    pair.engine.steps = [30.0]
    answer = ask(pair, stream=stream, latency_budget_ms=300, on_deadline="truncate", n=2)
    assert answer.status_code == 200
    choices = events(answer)[-1]["choices"] if stream else answer.json()["choices"]
    assert [(each["text"], each["finish_reason"]) for each in choices] == [("", "length")] * 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_would_rather_fail_gets_504_at_the_deadline(pair: Pair, stream: bool) -> None:
    pair.engine.steps = [30.0]
    answer = ask(pair, stream=stream, latency_budget_ms=300, on_deadline="fail")
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert pair.engine.client_left.wait(5)


def test_a_stream_that_has_begun_fails_with_an_event(pair: Pair) -> None:
    pair.engine.steps = SLOW
    last = events(ask(pair, stream=True, latency_budget_ms=700, on_deadline="fail"))[-1]
    assert last["error"]["code"] == "deadline_exceeded"


def test_an_assembled_answer_is_what_the_engine_would_have_answered_whole(pair: Pair) -> None:
    pair.engine.steps = [event("a"), event("bc"), USAGE, DONE]
    body = ask(pair, latency_budget_ms=5000, on_deadline="truncate").json()
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
    body = json.loads(assembly.answer(cut=True))
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hello", "tool_calls": [call]}
    assert body["choices"][0]["logprobs"] == {"content": [1] * 5}
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.fixture
def slow_pair(tiny: Population) -> Iterator[Pair]:
    """A gateway that knows its engine to be slow."""
    with gateway_before(ScriptedEngine([WHOLE]), tiny) as pair:
        pair.engine.content_type = "application/json"
        pair.gateway.engines[0].model = known(first_s=1.0, member_s=1.0)
        yield pair


def test_a_budget_that_no_engine_could_keep_is_served_at_the_floor_or_refused_at_once(slow_pair: Pair) -> None:
    served = ask(slow_pair, latency_budget_ms=2000)
    assert served.status_code == 200
    assert served.json()["population"]["tier"] == "economy"
    assert served.json()["population"]["tier_asked"] == "default"
    refused = ask(slow_pair, latency_budget_ms=2000, on_deadline="fail")
    assert refused.status_code == 504
    assert "economy" in refused.json()["error"]["message"]
    assert len(slow_pair.engine.bodies) == 1


def test_the_budget_chooses_the_tier_and_the_floor_bounds_it(slow_pair: Pair) -> None:
    asks = {"economy": 15_000, "standard": 25_000, "max": 90_000}
    for tier, budget_ms in asks.items():
        assert ask(slow_pair, latency_budget_ms=budget_ms).json()["population"]["tier"] == tier
    floored = ask(slow_pair, latency_budget_ms=15_000, min_budget="standard").json()["population"]
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
        ({"latency_budget_ms": "10"}, "invalid_value", "latency_budget_ms"),
        ({"latency_budget_ms": 1e12}, "invalid_value", "latency_budget_ms"),
        ({"on_deadline": "explode", "latency_budget_ms": 10}, "invalid_value", "on_deadline"),
        ({"on_deadline": "fail"}, "invalid_value", "on_deadline"),
        ({"min_budget": 9}, "budget_out_of_range", "min_budget"),
        ({"min_budget": "max", "budget": 1}, "contradictory_budget", "min_budget"),
    ],
)
def test_terms_that_make_no_sense_are_refused(pair: Pair, fields: dict[str, Any], code: str, param: str) -> None:
    answer = ask(pair, **fields)
    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, param)


def test_the_openapi_document_describes_the_terms(pair: Pair) -> None:
    document = httpx.get(f"{pair.url}/openapi.json").json()
    for route in ("/v1/completions", "/v1/chat/completions"):
        schema = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"budget", "latency_budget_ms", "on_deadline", "min_budget"} <= schema["properties"].keys()
