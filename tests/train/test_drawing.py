from pathlib import Path

import pytest

from chorus.train.drawing import Traces, as_png, chart, in_terminal
from tests.train.test_schedule import make_schedule


def test_columns_rise_to_their_share_of_the_highest_value() -> None:
    assert chart([0, 1, 2, 4], width=4, height=2) == ["   █", " ▄██"]
    assert chart([8.0] * 6, width=3, height=1) == ["███"]
    assert chart([1, 3, 4, 4], width=2, height=1) == ["▄█"]  # a column is the mean of its share
    assert chart([1.0, 2.0], width=4, height=1) == ["▄▄██"]


def test_traces_follow_the_schedule() -> None:
    schedule = make_schedule()
    traces = Traces.of(schedule)
    cycles = schedule.cycles()
    assert len(traces.learning_rate) == sum(cycle.steps for cycle in cycles)
    at = cycles[2].first_step
    assert (traces.learning_rate[at], traces.weight_decay[at]) == schedule.rates(cycles[2], 0)
    assert (traces.epochs[at], traces.batch_tokens[at]) == (4.0, 64.0)
    assert traces.noise == [(2, 0.25), (4, pytest.approx(0.15)), (6, pytest.approx(0.05))]
    assert traces.distils_from == 4.0


def test_a_schedule_is_drawn_in_a_terminal_and_as_a_picture(tmp_path: Path) -> None:
    text = in_terminal(make_schedule(), width=80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.splitlines()[0].startswith(" learning rate 2 ")
    assert text.splitlines()[-1].split() == ["epochs", "0", "8"]
    as_png({"one": make_schedule(), "other": make_schedule(learning_rate=1.0)}, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
