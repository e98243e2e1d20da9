"""What a step costs, who will be late, and which member leaves first."""

import numpy as np
import pytest

from serve.engine.deadline import Deadline, StepCost, StepLoad, without_member
from serve.engine.mixture import Mixture


def mixture(weights: dict[int, float], tier: str = "t") -> Mixture:
    return Mixture(tier=tier, members=tuple(weights), weights=tuple(weights.values()), pool="linear", temperature=1.0)


def test_a_load_counts_member_rows() -> None:
    one, three = mixture({0: 1.0}), mixture({0: 0.5, 1: 0.3, 2: 0.2})
    load = StepLoad.of([(one, 1, 100)] * 15 + [(three, 1, 50)])
    assert load == StepLoad(active_members=3, member_rows=18, member_context=1650)


def test_the_cost_of_a_step_is_learned_from_noisy_steps_and_follows_a_change() -> None:
    draw = np.random.default_rng(0)
    cost = StepCost()
    assert cost.predict(StepLoad(active_members=1, member_rows=1)) is None

    def seconds(load: StepLoad, slowdown: float) -> float:
        return slowdown * (0.002 + 0.003 * load.active_members + 1e-4 * load.member_rows + 1e-8 * load.member_context)

    for slowdown in (1.0, 2.0):
        for _ in range(400):
            load = StepLoad(
                active_members=int(draw.integers(1, 9)),
                member_rows=int(draw.integers(1, 100)),
                member_context=int(draw.integers(0, 50_000)),
            )
            cost.observe(load, seconds(load, slowdown) * draw.uniform(0.9, 1.1))
        asked = StepLoad(active_members=4, member_rows=40, member_context=10_000)
        assert cost.predict(asked) == pytest.approx(seconds(asked, slowdown), rel=0.05)


def test_a_load_that_never_varies_keeps_a_steady_prediction() -> None:
    cost, load = StepCost(), StepLoad(active_members=2, member_rows=2, member_context=100)
    for _ in range(20_000):
        cost.observe(load, 0.005)
    assert cost.predict(load) == pytest.approx(0.005, rel=1e-3)
    assert 0 <= (cost.predict(StepLoad(active_members=1, member_rows=1, member_context=100)) or 0) < 0.1


def test_slow_first_steps_and_a_single_hiccup_say_little_about_the_next() -> None:
    cost, load = StepCost(), StepLoad(active_members=4, member_rows=4, member_context=200)
    for seconds in (5.0, 2.0, 1.0, *[0.01] * 40):
        cost.observe(load, seconds)
    assert cost.predict(load) == pytest.approx(0.01, rel=0.01)
    cost.observe(load, 30.0)
    assert cost.predict(load) == pytest.approx(0.01, rel=0.15)


def test_an_engine_that_became_ten_times_slower_is_believed_soon() -> None:
    cost, load = StepCost(), StepLoad(active_members=4, member_rows=4, member_context=200)
    for seconds in [0.01] * 200 + [0.1] * 60:
        cost.observe(load, seconds)
    assert (cost.predict(load) or 0) > 0.06


def test_the_lightest_member_leaves_first_and_the_floor_stays() -> None:
    current = mixture({0: 0.1, 2: 0.6, 3: 0.3})
    dropped, smaller = without_member(current, frozenset({0}), []) or (None, current)
    assert dropped == 3
    assert smaller.members == (0, 2)
    assert smaller.weights == pytest.approx((1 / 7, 6 / 7))
    dropped, smaller = without_member(smaller, frozenset({0}), []) or (None, smaller)
    assert (dropped, smaller.members, smaller.weights) == (2, (0,), (1.0,))
    assert without_member(smaller, frozenset({0}), []) is None
    assert without_member(smaller, frozenset(), []) is None, "the last member never leaves"


def test_a_tier_of_the_remaining_members_lends_its_fitted_weights() -> None:
    fitted = mixture({0: 0.4, 2: 0.6}, tier="standard")
    _, smaller = without_member(mixture({0: 0.1, 2: 0.6, 3: 0.05}, tier="max"), frozenset({0}), [fitted]) or (0, fitted)
    assert smaller.weights == (0.4, 0.6)
    assert smaller.tier == "max"


def test_a_deadline_is_kept_while_the_remaining_tokens_fit() -> None:
    deadline = Deadline(finish_at=100.0, floor=frozenset())
    assert deadline.is_kept(99.0, 10, 0.09)
    assert not deadline.is_kept(99.0, 10, 0.11)
    assert deadline.is_kept(99.0, 10, None)
    assert not deadline.is_kept(100.1, 10, None)
