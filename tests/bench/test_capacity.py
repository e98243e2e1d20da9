"""The simulator of capacity against a case computed by hand and against queueing theory."""

import math

import pytest

from bench.capacity import Costs, Request, fit, poisson, simulate

ONE_AT_A_TIME = Costs(step_ms=1, member_ms=0, row_ms=0, prompt_ms=0)
SLOW = Costs(step_ms=10, member_ms=0, row_ms=0, prompt_ms=0)


def test_two_requests_share_steps_as_computed_by_hand() -> None:
    costs = Costs(step_ms=1000, member_ms=100, row_ms=10, prompt_ms=1)
    requests = [
        Request(at_s=0, members=1, prompt_tokens=5, answer_tokens=2),
        Request(at_s=0.5, members=3, prompt_tokens=7, answer_tokens=3),
    ]
    outcomes, busy = simulate(requests, costs, engines=1, max_sequences=8)
    # Step 1: one member, one row, 5 prompt tokens. The second request comes while it runs, and waits for its end.
    first = 1.000 + 0.100 + 0.010 + 0.005
    # Step 2: three members, four rows, 3 x 7 prompt tokens. Steps 3 and 4: the first request is done.
    second = first + 1.000 + 0.300 + 0.040 + 0.021
    third = second + 1.000 + 0.300 + 0.030
    fourth = third + 1.000 + 0.300 + 0.030
    a, b = outcomes
    assert (a.first_token_s, a.total_s) == pytest.approx((first, second))
    assert (b.first_token_s, b.total_s) == pytest.approx((second - 0.5, fourth - 0.5))
    assert busy == pytest.approx(1.0)


def test_what_does_not_fit_waits_and_engines_are_chosen_by_rows() -> None:
    requests = [Request(at_s=0.0, members=members, prompt_tokens=0, answer_tokens=10) for members in (4, 1, 1, 1)]
    outcomes, _ = simulate(requests, ONE_AT_A_TIME, engines=2, max_sequences=2)
    assert [round(1000 * each.total_s) for each in outcomes] == [10, 10, 10, 10]
    outcomes, _ = simulate(requests, ONE_AT_A_TIME, engines=1, max_sequences=2)
    assert [round(1000 * each.total_s) for each in outcomes] == [10, 10, 20, 20]
    assert [round(1000 * each.waited_s) for each in outcomes] == [0, 0, 10, 10]


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_engine_with_fixed_lengths_waits_as_long_as_an_m_d_1_queue(load: float) -> None:
    service_s = 0.05
    requests = poisson(rate=load / service_s, seconds=2500, tiers={1: 1.0}, prompt=0, answer=5, seed=1, is_fixed=True)
    outcomes, busy = simulate(requests, SLOW, engines=1, max_sequences=1)
    mean = sum(each.waited_s for each in outcomes) / len(outcomes)
    assert busy == pytest.approx(load, rel=0.03)
    assert mean == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.06)  # Pollaczek-Khinchine


def test_several_engines_with_random_lengths_wait_as_long_as_an_m_m_c_queue() -> None:
    engines, load, tokens = 3, 0.8, 20
    service_s = (tokens + 0.5) / 100  # of lengths that are exponential, rounded up to whole tokens
    offered = engines * load
    requests = poisson(rate=offered / service_s, seconds=5000, tiers={1: 1.0}, prompt=1, answer=tokens, seed=2)
    outcomes, _ = simulate(requests, SLOW, engines=engines, max_sequences=1)
    mean = sum(each.waited_s for each in outcomes) / len(outcomes)
    all_busy = offered**engines / math.factorial(engines) / (1 - load)
    waits = all_busy / (sum(offered**k / math.factorial(k) for k in range(engines)) + all_busy)  # Erlang C
    assert sum(each.waited_s > 0 for each in outcomes) / len(outcomes) == pytest.approx(waits, rel=0.05)
    assert mean == pytest.approx(waits * service_s / (engines * (1 - load)), rel=0.08)


def test_costs_are_found_again_from_what_they_give() -> None:
    costs = Costs(step_ms=4, member_ms=2.5, row_ms=0.3, prompt_ms=0.05)
    shapes = [(members, members * count) for members in (1, 2, 4, 8) for count in (1, 2, 4, 8)]
    observed = [(members, rows, costs.of(members=members, rows=rows)) for members, rows in shapes]
    found = fit(observed, [(size, 0.05 * size / 1000) for size in (32, 256)])
    assert found.step_ms == pytest.approx(4, rel=0.01)
    assert found.member_ms == pytest.approx(2.5, rel=0.01)
    assert found.row_ms == pytest.approx(0.3, rel=0.01)
    assert found.prompt_ms == pytest.approx(0.05)
