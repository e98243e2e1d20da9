"""Calibration: a few short requests to an engine that has just come up, so that its first deadlines can be planned.

They use the smallest and the largest tier, alone and concurrently, with a short and a longer prompt: enough to separate the costs
of a step, a member, a row and a prompt. The first round only warms up the engine, whose first requests are slow.
"""

import asyncio
import json
import logging
import time
from collections.abc import Sequence

import aiohttp

from chorus.population.manifest import Population, Tier
from chorus.serve.gateway.engines import upstream
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.latency import Work
from chorus.serve.gateway.engines.traffic import InFlight
from chorus.serve.gateway.relay.splice import Additions, EventSplicer
from chorus.serve.gateway.relay.wait import StoppedError, Wait
from chorus.serve.gateway.request.call import Call, read_call

logger = logging.getLogger(__name__)

_MAX_TOKENS = 12
_CONCURRENCIES = (1, 1, 2, 4)


async def calibrate(session: aiohttp.ClientSession, engine: Engine, population: Population) -> None:
    """Fit the engine's expected times. A failure is logged; the times are then learned from traffic."""
    small = min(population.tiers, key=lambda tier: tier.budget)
    large = max(population.tiers, key=lambda tier: tier.budget)
    lengths = (4, max(4, min(512, population.context_length - _MAX_TOKENS - 1)))
    began_at = time.perf_counter()
    try:
        for length in lengths:
            for tier in dict.fromkeys((small, large)):
                await _send(session, engine, population, tier, length, is_warm_up=True)
        for count in _CONCURRENCIES:
            for length in lengths:
                for tier in dict.fromkeys((small, large)):
                    async with asyncio.TaskGroup() as group:
                        for _ in range(count):
                            group.create_task(_send(session, engine, population, tier, length))
    except* (*upstream.CONNECTION_ERRORS, StoppedError, RuntimeError) as errors:
        why = errors.exceptions[0]
        logger.warning("could not calibrate engine %s; learning its times from traffic: %s", engine.url, why)
    else:
        logger.info("calibrated engine %s in %.1f s", engine.url, time.perf_counter() - began_at)


async def _send(
    session: aiohttp.ClientSession,
    engine: Engine,
    population: Population,
    tier: Tier,
    prompt_tokens: int,
    *,
    is_warm_up: bool = False,
) -> None:
    call = _call(population, tier, prompt_tokens, is_warm_up=is_warm_up)
    request = InFlight(
        tier=tier,
        floor=tier,
        num_sequences=1,
        work=Work(members=len(tier.members), prompt_tokens=prompt_tokens, max_tokens=_MAX_TOKENS),
        finish_by=None,
    )
    headers = {"Content-Type": "application/json"}
    splicer = EventSplicer(Additions(population=b"{}", model=None), keep_usage=True)
    engine.traffic.begin(request)
    try:
        async with Wait(engine, request, deadline=None, stall_s=engine.stall_timeout_s) as wait:
            answer = await upstream.send(session, engine, "/v1/completions", call.body(tier), headers)
            try:
                if answer.status != 200:
                    raise RuntimeError(f"status {answer.status}: {(await answer.read())[:200]!r}")
                async for data in answer.content.iter_any():
                    if events := splicer.feed(data):
                        wait.note_events(events.count(b"\n\n"))
            finally:
                answer.close()
            wait.note_complete()
        if splicer.usage is not None and not is_warm_up:
            engine.learn(request, splicer.usage, streamed=True, prompt_characters=0)
    finally:
        engine.traffic.end(request)


def _call(population: Population, tier: Tier, prompt_tokens: int, *, is_warm_up: bool) -> Call:
    # Token ids differ between requests: a hit in the prefix cache would look like a fast prefill.
    start = time.monotonic_ns() % population.vocab_size
    prompt: Sequence[int] = [(start + 7 * idx) % population.vocab_size for idx in range(prompt_tokens)]
    fields = {"prompt": prompt, "max_tokens": _MAX_TOKENS, "ignore_eos": True, "stream": True, "temperature": 0}
    if is_warm_up:  # the engine computes prompt log-probabilities separately, slowly the first time (2 s on two cores)
        fields |= {"echo": True, "logprobs": 1}
    return read_call(json.dumps({**fields, "budget": tier.name}).encode(), "completion", population, tier)
