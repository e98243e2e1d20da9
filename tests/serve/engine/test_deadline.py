"""What a step costs, who will be late, and which member leaves first."""

import numpy as np
import pytest

from chorus.serve.engine.deadline import (
    Deadline,
    Runner,
    StepCost,
    StepLoad,
    StepTally,
    choose_drops,
    way_down,
    without_member,
)
from chorus.serve.engine.mixture import Mixture


def mixture(weights: dict[int, float], tier: str = "t") -> Mixture:
    return Mixture(tier=tier, members=tuple(weights), weights=tuple(weights.values()), pool="linear", temperature=1.0)


def tally_of(*requests: tuple[list[int], int, int]) -> StepTally:
    tally = StepTally()
    for members, rows, context in requests:
        tally.add(members, rows=rows, context=context)
    return tally


def test_a_tally_is_the_load_of_what_is_left() -> None:
    tally = tally_of(*[([0], 1, 100)] * 15, ([0, 1, 2], 1, 50))
    whole = StepLoad(requests=16, active_members=3, member_rows=18, member_context=1650)
    assert tally.load() == whole
    other = tally.copy()
    other.drop(2, rows=1, context=50)
    assert other.load() == tally_of(*[([0], 1, 100)] * 15, ([0, 1], 1, 50)).load()
    assert tally.load() == whole


def test_drafts_are_rows_that_are_sampled_from_and_passes_of_their_own() -> None:
    tally = StepTally()
    tally.add([0, 1, 2], rows=4, context=50, drafts=3)
    tally.draft(2, rows=2)
    assert tally.load() == StepLoad(requests=4, active_members=5, member_rows=14, member_context=150)


def members_s(load: StepLoad) -> float:
    return 0.003 * load.active_members + 1e-4 * load.member_rows + 1e-8 * load.member_context


def step_s(load: StepLoad) -> float:
    return 0.002 + 1e-4 * load.requests + members_s(load)


def test_the_cost_of_a_step_is_learned_from_noisy_steps_and_follows_a_change() -> None:
    draw = np.random.default_rng(0)
    cost = StepCost()
    assert cost.predict(StepLoad(active_members=1, member_rows=1)) is None
    for slowdown in (1.0, 2.0):
        for _ in range(400):
            load = StepLoad(
                requests=int(draw.integers(1, 20)),
                active_members=int(draw.integers(1, 9)),
                member_rows=int(draw.integers(1, 100)),
                member_context=int(draw.integers(0, 50_000)),
            )
            noise = slowdown * draw.uniform(0.9, 1.1)
            cost.observe(load, step_s(load) * noise, members_s=members_s(load) * noise)
        asked = StepLoad(requests=10, active_members=4, member_rows=40, member_context=10_000)
        assert cost.predict(asked) == pytest.approx(slowdown * step_s(asked), rel=0.05)


def test_steps_of_one_set_of_members_tell_what_fewer_would_take() -> None:
    draw = np.random.default_rng(1)
    cost = StepCost()
    for _ in range(400):
        requests = int(draw.integers(1, 20))
        load = StepLoad(requests=requests, active_members=7, member_rows=7 * requests, member_context=700 * requests)
        noise = draw.uniform(0.9, 1.1)
        cost.observe(load, step_s(load) * noise, members_s=members_s(load) * noise)
    one = StepLoad(requests=1, active_members=1, member_rows=1, member_context=100)
    assert cost.predict(one) == pytest.approx(step_s(one), rel=0.1)


def test_a_load_that_never_varies_keeps_a_steady_prediction() -> None:
    cost, load = StepCost(), StepLoad(requests=1, active_members=2, member_rows=2, member_context=100)
    for _ in range(20_000):
        cost.observe(load, 0.005, members_s=0.004)
    assert cost.predict(load) == pytest.approx(0.005, rel=1e-3)
    assert 0 <= (cost.predict(StepLoad(active_members=1, member_rows=1, member_context=100)) or 0) < 0.1


def test_slow_first_steps_and_a_single_hiccup_say_little_about_the_next() -> None:
    cost, load = StepCost(), StepLoad(requests=1, active_members=4, member_rows=4, member_context=200)
    for seconds in (5.0, 2.0, 1.0, *[0.01] * 40):
        cost.observe(load, seconds, members_s=0.8 * seconds)
    assert cost.predict(load) == pytest.approx(0.01, rel=0.01)
    cost.observe(load, 30.0, members_s=29.9)
    assert cost.predict(load) == pytest.approx(0.01, rel=0.15)


def test_an_engine_that_became_ten_times_slower_is_believed_soon() -> None:
    cost, load = StepCost(), StepLoad(requests=1, active_members=4, member_rows=4, member_context=200)
    for seconds in [0.01] * 200 + [0.1] * 60:
        cost.observe(load, seconds, members_s=0.8 * seconds)
    assert (cost.predict(load) or 0) > 0.06


def runner(left_s: float, num_members: int, *, remaining_tokens: int = 10, floor: int = 1) -> Runner:
    return Runner(
        left_s=left_s,
        remaining_tokens=remaining_tokens,
        num_members=num_members,
        may_leave=tuple(range(num_members - 1, floor - 1, -1)),
        context=0,
    )


def drops(runners: list[Runner], *, member_s: float, row_s: float, others: list[int] | None = None) -> list[int]:
    tally = tally_of(*((list(range(count)), 1, 0) for count in [each.num_members for each in runners] + (others or [])))
    return choose_drops(runners, tally, lambda load: member_s * load.active_members + row_s * load.member_rows)


def test_nobody_drops_while_all_are_in_time() -> None:
    assert drops([runner(1.0, 8), runner(2.0, 8)], member_s=0.01, row_s=0.0) == [0, 0]
    assert drops([], member_s=1.0, row_s=1.0, others=[8]) == []


def test_where_members_cost_all_go_down_together() -> None:
    crowd = [runner(0.55, 8), *[runner(0.9, 8)] * 7]  # a step of 8 members takes 0.08 s, one of 5 just 0.05 s
    assert drops(crowd, member_s=0.01, row_s=0.0) == [3] * 8


def test_where_rows_cost_only_those_who_are_behind_go_down() -> None:
    crowd = [runner(0.55, 8), runner(0.55, 8), runner(9.0, 8), runner(9.0, 8)]  # 32 rows: 0.064 s
    found = drops(crowd, member_s=0.0, row_s=0.002)
    assert found[2:] == [0, 0]
    assert abs(found[0] - found[1]) <= 1
    assert 0 < sum(found) < 6


def test_who_cannot_be_in_time_goes_to_its_floor_and_holds_nobody_else_up() -> None:
    assert drops([runner(0.01, 8, floor=2), runner(1.0, 8)], member_s=0.01, row_s=0.0) == [6, 0]
    assert drops([runner(-1.0, 8), runner(1.0, 8)], member_s=0.01, row_s=0.0) == [7, 0]


def test_what_has_no_time_budget_keeps_its_members_and_its_time_counts() -> None:
    # Beside a request of 8 members without a budget nothing is won by dropping any: whoever is behind is lost.
    assert drops([runner(0.4, 8), runner(1.0, 8)], member_s=0.01, row_s=0.0, others=[8]) == [7, 0]


def test_drops_never_keep_fewer_in_time_and_respect_floors() -> None:
    draw = np.random.default_rng(2)
    for _ in range(300):
        member_s, row_s = draw.choice([0.0, 0.003, 0.02]), draw.choice([0.0, 0.0002, 0.003])
        crowd = [
            runner(
                float(draw.uniform(-0.1, 1.5)),
                num_members := int(draw.integers(1, 9)),
                remaining_tokens=int(draw.integers(1, 30)),
                floor=int(draw.integers(1, num_members + 1)),
            )
            for _ in range(int(draw.integers(1, 12)))
        ]

        def in_time(
            counts: list[int], crowd: list[Runner] = crowd, costs: tuple[float, float] = (member_s, row_s)
        ) -> int:
            kept = [each.num_members - count for each, count in zip(crowd, counts, strict=True)]
            seconds = costs[0] * max(kept) + costs[1] * sum(kept)
            return sum(each.max_step_s >= seconds for each in crowd)

        found = drops(crowd, member_s=member_s, row_s=row_s)
        assert all(0 <= count <= len(each.may_leave) for count, each in zip(found, crowd, strict=True))
        nothing, everything = [0] * len(crowd), [len(each.may_leave) for each in crowd]
        assert in_time(found) >= max(in_time(nothing), in_time(everything))


def test_the_way_down_ends_at_the_floor() -> None:
    current = mixture({0: 0.1, 2: 0.6, 3: 0.3})
    way = way_down(current, frozenset({0}), ())
    assert [(member, left.members) for member, left in way] == [(3, (0, 2)), (2, (0,))]
    assert way_down(current, frozenset({0, 2, 3}), ()) == ()


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


def test_an_answer_is_taken_to_be_as_long_as_expected_and_then_twice_as_long() -> None:
    deadline = Deadline(finish_at=0.0, way_down=(), expected_tokens=100)
    left = {done: deadline.tokens_left(done, 350) for done in (0, 60, 99, 100, 199, 200, 349, 350)}
    assert left == {0: 100, 60: 40, 99: 1, 100: 100, 199: 1, 200: 150, 349: 1, 350: 0}
    assert Deadline(finish_at=0.0, way_down=()).tokens_left(10, 350) == 340
