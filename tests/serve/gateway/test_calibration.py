"""The first requests to an engine, and engines that leave in the middle of them."""

import asyncio
import gc
import logging
from typing import Any

import pytest

from chorus.population.manifest import Population
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.upstream import open_session
from chorus.serve.gateway.relay.calibration import calibrate
from tests.live import serving
from tests.serve.gateway.scripted import DONE, USAGE, ScriptedEngine, event


class Leaving(ScriptedEngine):
    """Answers so many requests, then begins each and says no more."""

    def __init__(self, num_answers: int) -> None:
        super().__init__()
        self.num_answers = num_answers

    async def _answer(self, send: Any) -> None:
        self.steps = [event("a"), USAGE, DONE] if len(self.bodies) <= self.num_answers else [event("a"), 30.0]
        await super()._answer(send)


@pytest.mark.parametrize("num_answers", [0, 5, 13])  # in the warm-up, alone, side by side
def test_an_engine_that_leaves_in_the_middle_is_left_to_its_traffic(
    tiny: Population, caplog: pytest.LogCaptureFixture, num_answers: int
) -> None:
    unhandled: list[dict[str, Any]] = []

    async def scenario(url: str) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unhandled.append(context))
        async with open_session() as session:
            engine = Engine(session, url=url, is_supervised=False, probe_interval_s=1.0, probe_timeout_s=1.0)
            engine.mark_up()
            calibrating = asyncio.create_task(calibrate(session, engine, tiny))
            async with asyncio.timeout(20):
                while len(leaving.bodies) <= num_answers or not engine.traffic.in_flight:
                    await asyncio.sleep(0.01)
            engine.mark_down()
            async with asyncio.timeout(5):
                await calibrating
            assert not engine.traffic.in_flight
            gc.collect()
            await asyncio.sleep(0)

    leaving = Leaving(num_answers)
    with serving(leaving) as engine, caplog.at_level(logging.WARNING):
        asyncio.run(scenario(engine.url))
    assert "learning its times from traffic: the connection to the engine was lost" in caplog.text
    assert not unhandled
