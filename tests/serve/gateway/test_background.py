"""Tasks beside the requests: what fails is logged and begins again, and all end together."""

import asyncio
import logging

import httpx
import pytest

from chorus.population.manifest import Population
from chorus.serve.gateway.background import Background
from tests.live import wait_for
from tests.serve.gateway.conftest import Pair


def test_a_failed_task_is_logged_and_restarted(caplog: pytest.LogCaptureFixture) -> None:
    failures: list[int] = []

    async def scenario() -> int:
        background, runs = Background(lambda: failures.append(1), pause_s=0.01), 0

        async def work() -> None:
            nonlocal runs
            runs += 1
            if runs < 3:
                raise OverflowError("too large")
            await asyncio.sleep(60)

        task = background.begin("the queue", work)
        while runs < 3:
            await asyncio.sleep(0.01)
        await background.end()
        assert task.cancelled()
        return runs

    with caplog.at_level(logging.ERROR):
        assert asyncio.run(scenario()) == 3
    assert len(failures) == 2
    assert caplog.text.count("the queue failed; restarting") == 2
    assert "OverflowError: too large" in caplog.text


def test_a_one_shot_task_is_logged_and_not_restarted() -> None:
    async def scenario() -> None:
        background, runs = Background(pause_s=0.001), 0

        async def work() -> None:
            nonlocal runs
            runs += 1
            raise ValueError

        await background.begin("the calibration", work, restart=False)
        assert runs == 1
        await background.end()

    asyncio.run(scenario())


def test_cancel_once_tasks_are_cancelled_once_and_others_until_they_end() -> None:
    async def scenario() -> list[str]:
        background, cancels = Background(), []

        async def stubborn(name: str, times: int) -> None:
            for _ in range(times):
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    cancels.append(name)
            if name == "patient":
                await asyncio.sleep(1.5)
                cancels.append("ended")

        background.begin("patient", lambda: stubborn("patient", 1), cancel_once=True)
        background.begin("deaf", lambda: stubborn("deaf", 2))
        await asyncio.sleep(0)
        await background.end()
        return cancels

    cancels = asyncio.run(scenario())
    assert cancels.count("deaf") == 2
    assert cancels[-1] == "ended"
    assert cancels.count("patient") == 1


def test_the_gateway_keeps_its_queue_after_a_failure(
    tiny: Population, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        monkeypatch.undo()
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(pair.gateway.admission, "admit_waiting", fails)
    pair.gateway.admission._queue._length = 1
    counted = "chorus_gateway_background_failures_total 1.0"
    wait_for("the failure to be counted", lambda: counted in httpx.get(f"{pair.url}/metrics").text, timeout_s=10)
    pair.gateway.admission._queue._length = 0
    assert {task.get_name() for task in pair.gateway.background._tasks} >= {"the admission queue", "engine monitoring"}
