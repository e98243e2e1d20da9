"""What an engine is expected to take, and what is let in for that: the learned model, its margins, plans and demand."""

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from chorus.population.manifest import Population
from chorus.population.wire import StepCosts
from chorus.serve.gateway.admission.placement import Blocked, Job, Plan, place
from chorus.serve.gateway.engines.costs import read_costs
from chorus.serve.gateway.engines.latency import LatencyModel, Load, Work
from chorus.serve.gateway.engines.reserve import Reserve
from chorus.serve.gateway.engines.residuals import Residuals
from chorus.serve.gateway.engines.traffic import InFlight, Traffic
from chorus.serve.gateway.request.size import Size
from chorus.serve.least_squares import LeastSquares
from tests.serve.gateway.conftest import known


def job(tiny: Population, *, left_s: float | None, max_tokens: int = 11) -> Job:
    return Job(tiers=tiny.tiers[::-1], size=Size(max_tokens=max_tokens), finish_by=left_s)


def decide(each: Job, traffic: Traffic, model: LatencyModel, **options: Any) -> Plan | Blocked:
    return place(each, traffic, model, now=0.0, **{"probability": 0.95, "max_sequences": 8, **options})


def test_the_learned_weights_are_those_of_weighted_nonnegative_least_squares() -> None:
    rng = np.random.default_rng(3)
    fast = LeastSquares((1.0, 4.0, 16.0), forgetting=0.95)
    features_NF = np.column_stack([np.ones(400), rng.uniform(0, 8, 400) / 4, rng.uniform(0, 64, 400) / 16])
    targets_N = features_NF @ np.array([0.5, 2.0, 0.0]) + rng.normal(0, 0.3, 400)
    for features_F, target in zip(features_NF * np.array([1.0, 4.0, 16.0]), targets_N, strict=True):
        fast.observe(tuple(features_F), float(target))
    root_N = np.sqrt(0.95 ** np.arange(399, -1, -1))
    slow_F, _ = nnls(features_NF * root_N[:, None], targets_N * root_N)
    assert fast.weights == pytest.approx(slow_F, abs=0.02)
    assert min(fast.weights) >= 0


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
    assert model.margin(0.95, 0.2, can_shrink=False) == pytest.approx(np.exp(0.2 * 1.645), rel=0.15)
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
    found = decide(job(tiny, left_s=left_s), Traffic(), known())
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


def test_what_fits_no_tier_waits_if_others_are_the_reason_and_is_late_otherwise(tiny: Population) -> None:
    traffic, model = Traffic(), known()
    assert decide(job(tiny, left_s=0.05), traffic, model) is Blocked.LATE
    for _ in range(4):
        traffic.begin(in_flight(tiny, None))
    assert decide(job(tiny, left_s=0.2), traffic, model) is Blocked.LATE_NOW
    assert decide(job(tiny, left_s=None), traffic, model, max_sequences=4) is Blocked.FULL


def in_flight(tiny: Population, finish_by: float | None, tier: str = "max") -> InFlight:
    large = tiny.tier(tier)
    work = Work(members=large.budget, prompt_tokens=4, max_tokens=11)
    return InFlight(
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
    traffic, model = Traffic(), known(row_s=0.02)
    traffic.begin(in_flight(tiny, finish_by=1.5))
    alone = decide(job(tiny, left_s=10.0), Traffic(), model)
    beside = decide(job(tiny, left_s=10.0), traffic, model)
    assert isinstance(alone, Plan)
    assert alone.tier.name == "max"
    assert isinstance(beside, Plan)
    assert beside.tier.name == "standard"  # at four members each, the first would need 2.2 s; at two, 1.1 s


def test_pressure_takes_the_largest_tiers_away_down_to_the_floor(tiny: Population) -> None:
    tiers = [decide(job(tiny, left_s=None), Traffic(), known(), pressure=p) for p in (0.0, 0.5, 1.0)]
    assert [each.tier.name for each in tiers if isinstance(each, Plan)] == ["max", "standard", "economy"]


def test_the_mean_load_is_the_integral_over_time(tiny: Population) -> None:
    traffic = Traffic()
    first, second = in_flight(tiny, None, "max"), in_flight(tiny, None, "economy")
    first.began_at = time.perf_counter()
    traffic.begin(first)
    time.sleep(0.05)
    traffic.begin(second)
    middle = time.perf_counter()
    time.sleep(0.05)
    end = time.perf_counter()
    mean = traffic.mean_load(first, end)
    assert mean is not None
    assert mean.members == pytest.approx(4, rel=0.02)
    assert mean.rows == pytest.approx(4 + (end - middle) / (end - first.began_at), rel=0.05)
    for each in (first, second):
        traffic.end(each)
    assert traffic.load() == Load(members=0, rows=0)


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
    assert model.margin(0.9, 1.0, can_shrink=False) == pytest.approx(1.85, abs=0.02)
    at_first = model.margin(0.9, 1.0)
    for _ in range(2):
        model.observe_promise(kept=False, probability=0.9)
    assert at_first < 1.5 < 1.7 < model.margin(0.9, 1.0), "what cannot be rescued is learned soon"
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
    found = decide(job(tiny, left_s=4.0, max_tokens=41), Traffic(), model)  # true: 0.5 s
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
    few, many = Residuals(), Residuals((1.0, 1.5) for _ in range(128))
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
    factor = Residuals(pairs).factor(level, target_s)
    worst_s = max((seconds + 2 * target_s for expected_s, seconds in pairs if expected_s <= target_s), default=0.0)
    longer = max((seconds / expected_s for expected_s, seconds in pairs if expected_s > target_s / 1.1), default=0.0)
    assert 0 <= factor <= max(1.6, 1.1 * worst_s / target_s, longer)


def test_on_an_idle_engine_nobody_waits_for_better_odds(tiny: Population) -> None:
    traffic, model = Traffic(), known()
    for _ in range(200):
        model.observe_total(expected_s=1.0, seconds=9.0)
    found = decide(job(tiny, left_s=0.3), traffic, model)  # 0.13 s for one member
    assert isinstance(found, Plan)
    assert found.tier.name == "economy"
    traffic.begin(in_flight(tiny, None))
    assert decide(job(tiny, left_s=0.3), traffic, model) is Blocked.LATE_NOW


@given(st.floats(0.0, 0.35))
def test_the_squeeze_settles_where_few_are_late(needed: float) -> None:
    reserve, late = Reserve(misses=0.02), []
    for _ in range(4000):
        late.append(reserve.share < needed)
        reserve.observe(late=late[-1])
    assert sum(late[2000:]) / 2000 <= 0.04
