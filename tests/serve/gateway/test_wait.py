"""Why a wait ended: told by what it waited for, not by a clock that may say that it is not yet time."""

import asyncio
import time
from typing import Any

import pytest

from chorus.population.manifest import Population
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.latency import Work
from chorus.serve.gateway.engines.traffic import InFlight, Traffic
from chorus.serve.gateway.relay.wait import LEAD_S, Stop, StoppedError, Wait
from chorus.serve.gateway.request.call import read_call
from chorus.serve.gateway.request.tiers import default_tier


def engine_of(stall_s: float) -> Engine:
    session: Any = None
    engine = Engine(
        session, url="http://e", is_supervised=False, probe_interval_s=1, probe_timeout_s=1, stall_timeout_s=stall_s
    )
    engine.mark_up()
    return engine


def in_flight(tiny: Population, *, num_sequences: int = 1, tokens_per_event: int = 1) -> InFlight:
    return InFlight(
        tier=tiny.tiers[0],
        floor=tiny.tiers[0],
        num_sequences=num_sequences,
        work=Work(members=1, prompt_tokens=1, max_tokens=99),
        finish_by=None,
        tokens_per_event=tokens_per_event,
    )


async def why(tiny: Population, *, deadline_s: float | None, stall_s: float, early_s: float = 0.0) -> Stop:
    """Why a wait ends in which one event comes and then nothing, if its timer fires `early_s` too early."""
    engine = engine_of(stall_s)
    deadline = None if deadline_s is None else time.perf_counter() + deadline_s
    try:
        async with Wait(engine, in_flight(tiny), deadline=deadline, stall_s=stall_s) as wait:
            wait.note_events(1)
            (timeout,) = engine.output_timeouts
            if early_s:
                when = timeout.when()
                assert when is not None
                timeout.reschedule(when - early_s)
            await asyncio.sleep(10)
    except StoppedError as stopped:
        return stopped.reason
    raise AssertionError("the wait did not end")


@pytest.mark.parametrize("early_s", [0.0, 0.02])
def test_an_early_timer_still_counts_as_the_deadline(tiny: Population, early_s: float) -> None:
    assert asyncio.run(why(tiny, deadline_s=LEAD_S + 0.03, stall_s=5, early_s=early_s)) is Stop.DEADLINE


@pytest.mark.parametrize("deadline_s", [30, None])
def test_silence_before_the_deadline_counts_as_a_stall(tiny: Population, deadline_s: float | None) -> None:
    assert asyncio.run(why(tiny, deadline_s=deadline_s, stall_s=0.05)) is Stop.STALLED


@pytest.mark.parametrize(("num_sequences", "num_tokens"), [(1, 1 + 3 * 4), (3, 3 + 1 * 4)])
def test_tokens_are_counted_where_several_come_in_an_event(
    tiny: Population, num_sequences: int, num_tokens: int
) -> None:
    traffic, request = Traffic(), in_flight(tiny, num_sequences=num_sequences, tokens_per_event=4)
    for num_events in (1, 1, 2):
        traffic.note_events(request, num_events)
    assert request.num_tokens == num_tokens


@pytest.mark.parametrize(
    ("token_s", "tokens"), [(0.0, 1), (1e-9, 16), (0.003, 11), (0.0101, 3), (0.016, 2), (0.017, 1), (5.0, 1)]
)
def test_automatic_events_delay_a_token_by_at_most_a_thirtieth_of_a_second(
    tiny: Population, token_s: float, tokens: int
) -> None:
    call = read_call(b'{"prompt": "a", "stream": true}', "completion", tiny, default_tier(tiny))
    assert call.event_size(token_s) == tokens
