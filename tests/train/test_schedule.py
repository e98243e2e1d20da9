import math

import pytest

from chorus.train.schedule import (
    Cycle,
    Schedule,
    batch_multiplier,
    batch_rows,
    learning_rate_multiplier,
    perturbation_sigma,
    saturated,
    weight_decay_multiplier,
)


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (5, 0.54), (9, 0.172)])
def test_learning_rate_falls_linearly_towards_its_floor(step: int, expected: float) -> None:
    # l + (1 - l)(1 - s/L) with l = 0.08, L = 10: at s = 5 it is 0.08 + 0.92 * 0.5.
    assert learning_rate_multiplier(step, 10) == pytest.approx(expected, abs=1e-12)


def test_warm_up_rises_to_the_line_and_never_starts_at_zero() -> None:
    rises = [learning_rate_multiplier(step, 100, warmup=3) / learning_rate_multiplier(step, 100) for step in range(5)]
    assert rises == pytest.approx([0.25, 0.5, 0.75, 1, 1])


@pytest.mark.parametrize(("multiplier", "expected"), [(1.0, 0.7), (0.54, 0.85), (0.08, 1.0), (0.01, 1.0)])
def test_weight_decay_is_lowest_where_the_rate_is_highest(multiplier: float, expected: float) -> None:
    # f + (1 - f)(1 - m)/(1 - l) with f = 0.7, l = 0.08: at m = 0.54 it is 0.7 + 0.3 * 0.46 / 0.92.
    assert weight_decay_multiplier(multiplier) == pytest.approx(expected, abs=1e-12)


def test_batch_is_smaller_in_the_first_and_last_quarter_of_cycles() -> None:
    assert [batch_multiplier(cycle, 8) for cycle in range(8)] == [0.75, 0.75, 1, 1, 1, 1, 0.75, 0.75]
    assert [batch_multiplier(cycle, 3) for cycle in range(3)] == [1, 1, 1]


def test_perturbation_falls_by_a_cosine_over_the_boundaries() -> None:
    sigmas = [perturbation_sigma(boundary, 5, first=0.25, last=0.05) for boundary in range(5)]
    eighth = 0.1 * math.cos(math.pi / 4)
    assert sigmas == pytest.approx([0.25, 0.15 + eighth, 0.15, 0.15 - eighth, 0.05])
    assert perturbation_sigma(0, 5, first=0.25) == 0.25
    assert perturbation_sigma(4, 5, first=0.25) == pytest.approx(0.05)
    assert perturbation_sigma(0, 1, first=0.25) == 0.25


def make_schedule(**changes: object) -> Schedule:
    settings: dict[str, object] = {
        "num_cycles": 4, "epochs_per_cycle": 2, "train_tokens": 1_000, "context_length": 16, "batch_tokens": 64,
        "learning_rate": 2.0, "weight_decay": 1.3, "perturbation": 0.25, "distil_after": 2,
    }  # fmt: skip
    return Schedule(**{**settings, **changes})  # type: ignore[arg-type]


def test_cycles_follow_one_another_and_use_every_whole_batch_of_an_epoch() -> None:
    cycles = make_schedule().cycles()
    assert [cycle.batch_rows for cycle in cycles] == [3, 4, 4, 3]
    assert [cycle.steps_per_epoch for cycle in cycles] == [999 // 48, 999 // 64, 999 // 64, 999 // 48]
    assert [cycle.first_step for cycle in cycles] == [0, 40, 70, 100]
    assert [cycle.first_epoch for cycle in cycles] == [0, 2, 4, 6]


def test_the_teacher_speaks_after_the_completed_cycles_and_never_in_the_first() -> None:
    assert [cycle.distils for cycle in make_schedule().cycles()] == [False, False, True, True]
    assert [cycle.distils for cycle in make_schedule(distil_after=0).cycles()] == [False, True, True, True]
    assert not any(cycle.distils for cycle in make_schedule(distil_after=None).cycles())


def test_noise_follows_every_cycle_but_the_last() -> None:
    assert [cycle.sigma_after for cycle in make_schedule().cycles()] == [
        0.25,
        pytest.approx(0.15),
        pytest.approx(0.05),
        None,
    ]


def test_only_the_first_cycle_warms_up_and_each_restarts_at_the_peak() -> None:
    schedule = make_schedule()
    first, second, *_ = schedule.cycles()
    assert schedule.rates(first, 0)[0] < schedule.rates(first, 2)[0] < 2.0
    rate, decay = schedule.rates(second, 0)
    assert (rate, decay) == (2.0, pytest.approx(1.3 * 0.7))
    rate, decay = schedule.rates(second, second.steps - 1)
    assert rate < 0.2 * 2.0
    assert decay == pytest.approx(1.3 * weight_decay_multiplier(rate / 2.0))


def test_a_floor_of_one_is_a_flat_decay() -> None:
    schedule = make_schedule(weight_decay_floor=1.0)
    assert {schedule.rates(cycle, step)[1] for cycle in schedule.cycles() for step in range(cycle.steps)} == {1.3}


def test_restarts_make_every_cycle_like_the_first_with_the_whole_batch() -> None:
    schedule = make_schedule(restarts=True)
    first, *others = schedule.cycles()
    assert [cycle.batch_rows for cycle in (first, *others)] == [4, 4, 4, 4]
    assert all(cycle.sigma_after is None for cycle in (first, *others))
    for cycle in others:
        assert [schedule.rates(cycle, s) for s in range(cycle.steps)] == [schedule.rates(first, s) for s in range(30)]


def test_every_step_of_a_small_schedule_by_hand() -> None:
    schedule = make_schedule(
        num_cycles=2,
        epochs_per_cycle=1,
        burn_in=1,
        train_tokens=161,
        distil_after=1,
        learning_rate=1.0,
        weight_decay=1.0,
    )
    first, second = schedule.cycles()
    # 160 predicted tokens in batches of 4 rows of 16: 2 whole steps an epoch, of which the first cycle has two.
    assert first == Cycle(
        idx=0, first_step=0, first_epoch=0, epochs=2, batch_rows=4, steps_per_epoch=2, distils=False, sigma_after=0.25
    )
    assert second == Cycle(
        idx=1, first_step=4, first_epoch=2, epochs=1, batch_rows=4, steps_per_epoch=2, distils=True, sigma_after=None
    )
    # m = 0.08 + 0.92 (1 - s/4); one step of warm-up halves the first; decay = 0.7 + 0.3 (1 - m)/0.92.
    expected = [(0.5, 0.7 + 0.15 / 0.92), (0.77, 0.775), (0.54, 0.85), (0.31, 0.925)]
    assert [schedule.rates(first, step) for step in range(4)] == [pytest.approx(pair, abs=1e-12) for pair in expected]
    assert [schedule.rates(second, step) for step in range(2)] == [(1.0, 0.7), pytest.approx((0.54, 0.85), abs=1e-12)]


def test_a_burn_in_lengthens_the_first_cycle_alone() -> None:
    plain, longer = make_schedule().cycles(), make_schedule(burn_in=3).cycles()
    assert [cycle.epochs for cycle in longer] == [5, 2, 2, 2]
    assert [cycle.first_epoch for cycle in longer] == [0, 5, 7, 9]
    assert [b.steps - a.steps for a, b in zip(plain, longer, strict=True)] == [3 * plain[0].steps_per_epoch, 0, 0, 0]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([], False), ([5.0], False), ([5.0, 4.5, 4.4], False), ([5.0, 4.5, 4.495], True), ([5.0, 5.1, 4.0], True)],
)
def test_a_trajectory_is_saturated_once_a_cycle_gains_less_than_a_hundredth(
    losses: list[float], expected: bool
) -> None:
    assert saturated(losses) is expected


def test_saturation_is_not_known_beforehand_from_the_third_cycle_on() -> None:
    assert [cycle.distils for cycle in make_schedule(distil_after="saturation").cycles()] == [False, False, None, None]


def test_a_batch_holds_at_least_one_row() -> None:
    assert batch_rows(100, 256, 0.75) == 1
    assert batch_rows(2_048, 256) == 8
