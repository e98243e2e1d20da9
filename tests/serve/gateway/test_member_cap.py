"""How many members everybody may have: what becomes of a queue, what can be kept up, and when the number changes."""

import math
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.population.wire import StepCosts
from chorus.serve.gateway.admission.demand import Demand, Rates
from chorus.serve.gateway.admission.member_cap import Forecast, MemberCap, Supply, forecast
from chorus.serve.gateway.request.size import Size
from tests.serve.gateway.conftest import known

COSTS = StepCosts(step=0.002, request=0.0, member=0.001, row=0.00004, context=0.0)
TOKENS = 50
EQUAL_GAINS = {1: 5.0, 6: 4.0}


def supply(costs: StepCosts | None = COSTS, *, num_engines: int = 1, max_sequences: int = 16) -> Supply:
    return Supply(
        model=known(member_s=0.001, row_s=0.00004),
        costs=costs,
        num_engines=num_engines,
        max_sequences=max_sequences,
        probability=0.95,
    )


def demand(rate: float, *, budget_s: float = 1.0, prompt_tokens: float = 0.0, num_fixed: int = 0) -> Rates:
    """As after a minute of so many requests per second, and a few at its end that are served by six members in any case."""
    found, began_at = Demand(), time.perf_counter()
    for idx in range(round(60 * rate)):
        now = began_at + idx / rate
        found.note_flexible(Size(max_tokens=TOKENS), prompt_tokens=prompt_tokens, budget_s=budget_s, now=now)
    for _ in range(num_fixed):
        found.note_fixed(Size(max_tokens=TOKENS), prompt_tokens=0, members=6, now=began_at + 60)
    rates = found.rates(began_at + 60)
    assert rates is not None
    return rates


@pytest.mark.parametrize("prompt_tokens", [0.0, 20.0])
@pytest.mark.parametrize("rate", [5, 20, 60])
@pytest.mark.parametrize("members", [1, 2, 4])
def test_the_forecast_matches_the_step_costs(rate: float, members: int, prompt_tokens: float) -> None:
    asked = demand(rate, prompt_tokens=prompt_tokens)
    found = forecast(asked, supply(), members)
    # Step by step: with n sequences at a time, each step gives n tokens; prompts take their part of the time.
    left = 1 - COSTS.row * members * asked.prompt_tokens
    running = 0.0
    for _ in range(2000):
        step_s = (COSTS.step + COSTS.member * members + COSTS.row * members * running) / left
        running = min(16, asked.tokens * step_s)
    full_s = (COSTS.step + COSTS.member * members + COSTS.row * members * 16) / left
    assert asked.tokens - found.excess == pytest.approx(16 / full_s)
    total_s = TOKENS * step_s
    total_s *= supply().model.margin(0.95, total_s)
    assert found.slack == pytest.approx((1.0 - total_s) * 16 / full_s)
    assert found.scatter == pytest.approx(TOKENS * math.sqrt(rate), rel=0.25), "the last seconds count most"


def test_rates_are_those_of_the_last_seconds() -> None:
    found = demand(40.0, budget_s=0.5, prompt_tokens=10)
    assert found.flexible_sequences == pytest.approx(40, rel=0.02)
    assert found.tokens == pytest.approx(40 * TOKENS, rel=0.02)
    assert found.prompt_tokens == pytest.approx(400, rel=0.02)
    assert found.budget_s == pytest.approx(0.5)


def test_early_rates_cover_the_time_since_the_first_request() -> None:
    asked, began_at = Demand(), time.perf_counter()
    for beginning in (began_at, began_at + 3600):
        for idx in range(120):
            asked.note_flexible(Size(max_tokens=TOKENS), prompt_tokens=0, budget_s=2.0, now=beginning + idx / 80)
        found = asked.rates(beginning + 1.5)
        assert found is not None
        assert found.flexible_sequences == pytest.approx(80, rel=0.05), "though that is only half of the memory"
        assert asked.rates(beginning + 60) is None


def test_one_long_request_is_no_flood() -> None:
    asked, now = Demand(), time.perf_counter()
    asked.note_flexible(Size(max_tokens=4000), prompt_tokens=0, budget_s=60.0, now=now)
    found = asked.rates(now)
    assert found is not None
    assert found.tokens < 4000 / 15
    assert MemberCap().update(found, supply(), max_members=6, backlog=0) == 6


@pytest.mark.parametrize("costs", [COSTS, replace(COSTS, member=0.0001, row=0.0003), None])
def test_the_cap_falls_with_demand_and_rises_with_engines(costs: StepCosts | None) -> None:
    def chosen(rate: float, num_engines: int) -> int:
        return MemberCap().update(demand(rate), supply(costs, num_engines=num_engines), max_members=6, backlog=1)

    found = [chosen(rate, 1) for rate in (0.5, 5, 10, 20, 40, 80, 400)]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (6, 1)
    assert all(chosen(2 * rate, 2) >= chosen(rate, 1) for rate in (5, 10, 20, 40, 80))
    assert any(chosen(rate, 2) > chosen(rate, 1) for rate in (5, 10, 20, 40, 80))


def test_without_demand_the_cap_is_all_members() -> None:
    assert MemberCap().update(None, supply(), max_members=6, backlog=0) == 6


def test_the_larger_number_runs_while_the_queue_fills_and_the_smaller_one_while_it_drains() -> None:
    ours, each, cap = supply(replace(COSTS, step=0.001, member=0.002)), demand(47.0), MemberCap()
    assert forecast(each, ours, 2).excess < 0 < forecast(each, ours, 3).excess

    def at(waiting: float) -> int:
        return cap.update(each, ours, max_members=6, backlog=waiting * TOKENS, losses=EQUAL_GAINS)

    assert at(0) == 3, "one more than can be kept up"
    assert at(3) == 3, "and while there is room in the queue"
    assert at(24) == 2
    assert at(10) == 2, "not again before the queue is empty"
    assert at(0) == 3
    assert at(200) == 1, "as far as it has to"
    assert at(24) == 1
    assert at(1) == 2, "what can be kept up, when little is left of the queue"


@given(excess=st.floats(-1e3, 1e3), scatter=st.floats(1.0, 1e3), seconds=st.floats(0.1, 10.0))
def test_the_probability_to_keep_up_is_that_of_a_random_walk(excess: float, scatter: float, seconds: float) -> None:
    found = Forecast(slack=1.0, excess=excess, scatter=scatter).probability_sustained(seconds)
    deviations = -excess * math.sqrt(seconds) / scatter
    assert found == pytest.approx(0.5 * math.erfc(-deviations / math.sqrt(2)), abs=1e-9)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (EQUAL_GAINS, 3),
        ({1: 5.0, 2: 4.1, 6: 4.0}, 2),  # a third member brings little, and with one alone much is lost
        ({1: 5.0, 2: 4.9, 3: 4.1, 6: 4.0}, 3),
        ({2: 4.1, 6: 4.0}, 3),  # nobody is served by less than two
        ({1: 5.0, 6: 5.0}, 3),  # says nothing
        ({}, 2),  # gains fall, as a rule
    ],
)
def test_more_than_can_be_kept_up_runs_only_where_that_is_worth_its_risk(
    losses: dict[int, float], expected: int
) -> None:
    ours, each, cap = supply(replace(COSTS, step=0.001, member=0.002)), demand(47.0), MemberCap()
    assert 0.5 < forecast(each, ours, 2).probability_sustained(1.0) < 0.75
    assert cap.update(each, ours, max_members=6, backlog=0, losses=losses) == expected
    least = cap.update(demand(5.0), ours, max_members=6, backlog=0, losses=losses)
    assert least == 6, "where all can be kept up, all run"
    restart = cap.update(each, ours, max_members=6, backlog=0, losses=losses)
    assert restart == expected, "and nobody waits for a queue to become full"


def test_a_request_that_is_served_by_all_members_makes_steps_longer_for_everybody() -> None:
    alone, beside = demand(30.0), demand(30.0, num_fixed=10)
    for members in (1, 3):
        served = [each.tokens - forecast(each, supply(), members).excess for each in (alone, beside)]
        assert served[1] < 0.9 * served[0]
    same = [each.tokens - forecast(each, supply(), 6).excess for each in (alone, beside)]
    assert same[1] == pytest.approx(same[0])


def test_budgets_too_short_for_many_members_give_few() -> None:
    long, short = demand(4.0, budget_s=1.0), demand(4.0, budget_s=0.2)
    assert MemberCap().update(long, supply(), max_members=6, backlog=0) == 6
    assert MemberCap().update(short, supply(), max_members=6, backlog=0) == 1
