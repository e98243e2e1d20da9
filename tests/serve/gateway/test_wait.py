"""Why a wait ended: told by what it waited for, not by a clock that may say that it is not yet time."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from chorus.serve.gateway.admission.admission import Grant
from chorus.serve.gateway.engines.life import Life
from chorus.serve.gateway.relay.event_size import tokens_per_event
from chorus.serve.gateway.relay.wait import LEAD_S, Stop, StoppedError, Wait


async def why(*, deadline_s: float | None, stall_s: float, early_s: float = 0.0) -> Stop:
    """Why a wait ends in which one word comes and then nothing; its timer fires so much early."""
    traffic = SimpleNamespace(note_first=lambda in_flight: None)
    engine = SimpleNamespace(
        is_up=True,
        waiting=set(),
        life=Life("http://e", stall_timeout_s=stall_s),
        longest_silence_s=lambda: stall_s,
        traffic=traffic,
    )
    grant = cast(
        Grant,
        SimpleNamespace(
            engine=engine,
            in_flight=cast(Any, SimpleNamespace(first_at=None, num_tokens=0, num_sequences=1, tokens_per_event=1)),
        ),
    )
    deadline = None if deadline_s is None else time.perf_counter() + deadline_s
    try:
        async with Wait(grant, deadline=deadline, stall_s=stall_s) as exchange:
            exchange.heard(1)
            (patience,) = engine.waiting
            if early_s:
                patience.reschedule(patience.when() - early_s)
            await asyncio.sleep(10)
    except StoppedError as stopped:
        return stopped.why
    raise AssertionError("the wait did not end")


@pytest.mark.parametrize("early_s", [0.0, 0.02])
def test_a_deadline_is_a_deadline_though_uvloops_timers_end_a_little_early(early_s: float) -> None:
    assert asyncio.run(why(deadline_s=LEAD_S + 0.03, stall_s=5, early_s=early_s)) is Stop.DEADLINE


@pytest.mark.parametrize("deadline_s", [30, None])
def test_silence_is_a_stall_though_a_deadline_lies_ahead(deadline_s: float | None) -> None:
    assert asyncio.run(why(deadline_s=deadline_s, stall_s=0.05)) is Stop.STALLED


def test_tokens_are_counted_where_several_come_in_an_event() -> None:
    async def count(num_sequences: int) -> int:
        in_flight = cast(
            Any, SimpleNamespace(first_at=None, num_tokens=0, tokens_per_event=4, num_sequences=num_sequences)
        )
        traffic = SimpleNamespace(note_first=lambda in_flight: setattr(in_flight, "first_at", 1.0))
        life = Life("http://e", stall_timeout_s=5)
        engine = SimpleNamespace(is_up=True, waiting=set(), life=life, traffic=traffic)
        grant = cast(Grant, SimpleNamespace(engine=engine, in_flight=in_flight))
        async with Wait(grant, deadline=None, stall_s=5) as exchange:
            for num_events in (1, 1, 2):
                exchange.heard(num_events)
        return int(in_flight.num_tokens)

    assert asyncio.run(count(1)) == 1 + 3 * 4
    assert asyncio.run(count(3)) == 3 + 1 * 4


@pytest.mark.parametrize(
    ("token_s", "tokens"), [(0.0, 1), (1e-9, 16), (0.003, 11), (0.0101, 3), (0.016, 2), (0.017, 1), (5.0, 1)]
)
def test_a_token_waits_a_thirtieth_of_a_second_at_most(token_s: float, tokens: int) -> None:
    assert tokens_per_event(token_s) == tokens
