"""A few short requests to an engine that has just begun to answer, so that the first deadline is not met by luck.

The smallest and the largest tier, alone and side by side, after a short and a longer prompt: enough to tell apart what a step, a
member, a row and a prompt cost. An engine that has just started is slow at everything it does for the first time: the first round
warms it up, and nothing is learned from that.
"""

import asyncio
import json
import logging
import time
from collections.abc import Sequence

import aiohttp

from chorus.population.manifest import Population, Tier
from chorus.serve.gateway.admission.admission import Grant
from chorus.serve.gateway.engines import upstream
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.latency import Work
from chorus.serve.gateway.engines.traffic import InFlight
from chorus.serve.gateway.relay.splice import Additions, EventSplicer
from chorus.serve.gateway.relay.wait import StoppedError, Wait
from chorus.serve.gateway.request.call import Call, read_call

logger = logging.getLogger(__name__)

_TOKENS = 12
_SIDE_BY_SIDE = (1, 1, 2, 4)


async def calibrate(session: aiohttp.ClientSession, engine: Engine, population: Population) -> None:
    """Teach the engine's model how long it takes. What fails is logged and left to the traffic."""
    small = min(population.tiers, key=lambda tier: tier.budget)
    large = max(population.tiers, key=lambda tier: tier.budget)
    lengths = (4, max(4, min(512, population.context_length - _TOKENS - 1)))
    began_at = time.perf_counter()
    try:
        for length in lengths:
            for tier in dict.fromkeys((small, large)):
                await _ask(session, engine, population, tier, length, teaches=False)
        for count in _SIDE_BY_SIDE:
            for length in lengths:
                for tier in dict.fromkeys((small, large)):
                    async with asyncio.TaskGroup() as group:
                        for _ in range(count):
                            group.create_task(_ask(session, engine, population, tier, length))
    except* (*upstream.BROKEN, StoppedError, RuntimeError) as errors:
        why = errors.exceptions[0]
        logger.warning("engine %s could not be calibrated, its traffic will teach: %s", engine.url, why)
    else:
        logger.info("engine %s calibrated in %.1f s", engine.url, time.perf_counter() - began_at)


async def _ask(
    session: aiohttp.ClientSession,
    engine: Engine,
    population: Population,
    tier: Tier,
    prompt_tokens: int,
    *,
    teaches: bool = True,
) -> None:
    call = _call(population, tier, prompt_tokens, is_warm_up=not teaches)
    in_flight = InFlight(
        tier=tier,
        floor=tier,
        num_sequences=1,
        work=Work(members=len(tier.members), prompt_tokens=prompt_tokens, max_tokens=_TOKENS),
        finish_by=None,
    )
    engine.traffic.begin(in_flight)
    grant = Grant(engine=engine, in_flight=in_flight, waited_s=0, is_promised=False)
    exchange = Wait(grant, deadline=None, stall_s=engine.stall_timeout_s)
    splicer = EventSplicer(Additions(population=b"{}", model=None), keep_usage=True)
    try:
        async with exchange:
            answer = await upstream.send(
                session, engine, "/v1/completions", call.body(tier), {"Content-Type": "application/json"}
            )
            try:
                if answer.status != 200:
                    raise RuntimeError(f"status {answer.status}: {(await answer.read())[:200]!r}")
                async for data in answer.content.iter_any():
                    if events := splicer.feed(data):
                        exchange.heard(events.count(b"\n\n"))
            finally:
                answer.close()
        if teaches:
            exchange.teach(splicer.usage, streamed=True, characters=0)
    finally:
        engine.traffic.end(in_flight)


def _call(population: Population, tier: Tier, prompt_tokens: int, *, is_warm_up: bool) -> Call:
    # Ids that differ from request to request: what the prefix cache holds would look like a fast prefill.
    start = time.monotonic_ns() % population.vocab_size
    prompt: Sequence[int] = [(start + 7 * idx) % population.vocab_size for idx in range(prompt_tokens)]
    fields = {"prompt": prompt, "max_tokens": _TOKENS, "ignore_eos": True, "stream": True, "temperature": 0}
    if is_warm_up:  # prompt log-probabilities have their own path in the engine, slow the first time (2 s on two cores)
        fields |= {"echo": True, "logprobs": 1}
    return read_call(json.dumps({**fields, "budget": tier.name}).encode(), "completion", population, tier)
