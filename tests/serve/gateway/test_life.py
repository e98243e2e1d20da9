"""Slow is not dead: what tells a frozen engine from one at a long step, in virtual time."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from chorus.serve.gateway.engines.life import Life, Processes

STALL_S = 60.0


class Clock:
    """Virtual time, and processes that may use all, little or nothing of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.load = 0.0
        """Part of a processor that the busiest of the engine's processes uses."""
        self.others = 0.0
        """Part that each of twenty others uses."""
        self._used_s = dict.fromkeys(range(21), 0.0)
        monkeypatch.setattr("chorus.serve.gateway.engines.life.time.monotonic", lambda: self.now)

    def life(self, *, is_ours: bool = True, has_worked: bool = True) -> Life:
        processes = SimpleNamespace(core_s=self._used_s.copy, server_s=self._used_s.copy) if is_ours else None
        life = Life("http://e", stall_timeout_s=STALL_S, processes=cast(Processes, processes))
        if has_worked:
            life.note_output()
        return life

    def passes(self, seconds: float) -> None:
        self.now += seconds
        for pid in self._used_s:
            self._used_s[pid] += (self.others if pid else self.load) * seconds

    def stuck_after(
        self, life: Life, *, expected_s: float = 0.0, count: Callable[[], float | None] = lambda: 7.0
    ) -> float:
        """Seconds until the life is found frozen, looking every second; 10,000 if it is not."""
        began = self.now

        async def look() -> float:
            while self.now - began < 10_000:
                self.passes(1)
                life.note_progress(count())
                if await life.is_stuck(expected_s):
                    break
            return self.now - began

        return asyncio.run(look())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_core_that_computes_nothing_is_found_after_the_stall_timeout(clock: Clock) -> None:
    assert clock.stuck_after(clock.life()) == pytest.approx(STALL_S, abs=3)


@pytest.mark.parametrize("load", [0.002, 0.018])
def test_workers_that_poll_for_a_deadlocked_core_do_not_work(clock: Clock, load: float) -> None:
    clock.load = clock.others = load
    assert clock.stuck_after(clock.life()) == pytest.approx(STALL_S, abs=3)


@pytest.mark.parametrize("load", [0.05, 1.0, 8.0])
def test_a_step_of_90_s_is_left_alone_while_the_processes_compute(clock: Clock, load: float) -> None:
    clock.load = load
    assert clock.stuck_after(clock.life()) > 90


def test_processes_that_only_spin_do_not_count_as_work_for_ever(clock: Clock) -> None:
    clock.load = 1.0
    assert clock.stuck_after(clock.life()) == pytest.approx(10 * STALL_S, abs=3)


def test_an_engine_of_others_gets_the_time_that_its_step_is_expected_to_need(clock: Clock) -> None:
    assert clock.stuck_after(clock.life(is_ours=False)) == pytest.approx(STALL_S, abs=3)
    assert clock.stuck_after(clock.life(is_ours=False), expected_s=20.0) == pytest.approx(200, abs=3)
    assert clock.stuck_after(clock.life(is_ours=False), expected_s=1e9) == pytest.approx(10 * STALL_S, abs=3)


@pytest.mark.parametrize("is_ours", [True, False])
def test_the_first_step_of_a_life_is_left_alone(clock: Clock, is_ours: bool) -> None:
    life = clock.life(is_ours=is_ours, has_worked=False)
    assert clock.stuck_after(life) == pytest.approx(10 * STALL_S, abs=3)


@pytest.mark.parametrize("is_ours", [True, False])
def test_counters_that_move_are_work(clock: Clock, is_ours: bool) -> None:
    life = clock.life(is_ours=is_ours)
    assert clock.stuck_after(life, count=lambda: clock.now // 50) == 10_000
    assert clock.stuck_after(life) < 130


def test_an_engine_of_others_that_shows_no_counters_cannot_be_judged(clock: Clock) -> None:
    assert clock.stuck_after(clock.life(is_ours=False), count=lambda: None) == 10_000
    assert clock.stuck_after(clock.life(), count=lambda: None) == pytest.approx(STALL_S, abs=3)


def test_a_paused_gateway_does_not_count_its_pause_as_silence(clock: Clock) -> None:
    life = clock.life()

    async def look() -> bool:
        await life.is_stuck(0)
        clock.passes(3600)
        return await life.is_stuck(0) or await life.is_unresponsive()

    assert not asyncio.run(look())
    assert clock.stuck_after(life) == pytest.approx(STALL_S * 2 / 3, abs=3)


def test_a_server_that_answers_nothing_is_given_up_sooner_when_it_computes_nothing_either(clock: Clock) -> None:
    def deaf_after() -> float:
        life, began = clock.life(), clock.now

        async def look() -> None:
            while not await life.is_unresponsive():
                clock.passes(15)

        asyncio.run(look())
        return clock.now - began

    assert deaf_after() == pytest.approx(STALL_S, abs=16)
    clock.load = 1.0
    assert deaf_after() == pytest.approx(10 * STALL_S, abs=31)


def test_a_stream_may_be_silent_for_longer_only_if_the_whole_engine_is_silent(
    clock: Clock,
) -> None:
    life = clock.life()
    assert life.longest_silence_s(20.0) == STALL_S
    clock.passes(31)
    assert life.longest_silence_s(0.0) == STALL_S
    assert life.longest_silence_s(20.0) == pytest.approx(200)
    clock.load = 1.0
    asyncio.run(_looks(clock, life, 90))
    assert life.longest_silence_s(0.0) == pytest.approx(10 * STALL_S)


async def _looks(clock: Clock, life: Life, seconds: int) -> None:
    for _ in range(seconds):
        clock.passes(1)
        life.note_progress(7.0)
        assert not await life.is_stuck(0.0)
