"""Loss on live prompts: for a sample of requests, the mean loss of the prompt at the tier that served it.

Compared with the manifest's test losses it shows drift: traffic unlike the training data, or a prior that no longer fits. Sampled
prompts are sent again for their log-probabilities, one at a time and only to an idle engine; a sample that finds none in time is
discarded. Only the loss is kept.
"""

import asyncio
import json
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from chorus.population.manifest import Tier
from chorus.population.wire import TIER_ARGUMENT
from chorus.serve.gateway.engines import upstream
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.latency import Work
from chorus.serve.gateway.engines.pool import Pool
from chorus.serve.gateway.engines.traffic import InFlight
from chorus.serve.gateway.request.call import Call

logger = logging.getLogger(__name__)

_MAX_WAITING = 8
_POLL_INTERVAL_S = 0.1
_TIMEOUT_S = 30.0
_INPUT = ("model", "prompt", "messages", "tools", "chat_template", "chat_template_kwargs", "add_special_tokens")
"""Fields of a request that determine the prompt. The others are about the answer."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt whose loss is to be measured."""

    path: str
    call: Call
    tier: Tier
    headers: Mapping[str, str]


class DriftSampler:
    """Samples requests at random and measures the loss of their prompts while an engine is idle."""

    def __init__(self, pool: Pool, sampled_share: float, observe: Callable[[str, float], None]) -> None:
        self._pool = pool
        self._sampled_share = sampled_share
        self._observe = observe
        self._waiting: asyncio.Queue[Sample] = asyncio.Queue(_MAX_WAITING)

    def maybe_add(self, sample: Sample) -> None:
        """Queue an answered request with probability `sampled_share`, if it has one sequence and the queue has room."""
        if (
            self._sampled_share
            and random.random() < self._sampled_share
            and sample.call.size.num_sequences == 1
            and not self._waiting.full()
        ):
            self._waiting.put_nowait(sample)

    async def run(self, session: aiohttp.ClientSession, is_busy: Callable[[], bool]) -> None:
        """Measure samples until cancelled, while not `is_busy`, which is true while requests wait for an engine."""
        while True:
            sample = await self._waiting.get()
            engine = await self._idle_engine(is_busy)
            if engine is None:
                continue
            try:
                nats = await self._measure(session, engine, sample)
            except (*upstream.CONNECTION_ERRORS, TimeoutError, ValueError, KeyError, TypeError) as error:
                logger.info("could not measure the loss of a prompt on engine %s: %s", engine.url, error)
            else:
                if nats is not None:
                    self._observe(sample.tier.name, nats)

    async def _idle_engine(self, is_busy: Callable[[], bool]) -> Engine | None:
        """An engine without requests, as soon as there is one; None if there is none for `_TIMEOUT_S` seconds."""
        for _ in range(round(_TIMEOUT_S / _POLL_INTERVAL_S)):
            idle = [each for each in self._pool.engines if each.is_up and not each.traffic.in_flight]
            if idle and not is_busy():
                return idle[0]
            await asyncio.sleep(_POLL_INTERVAL_S)
        return None

    async def _measure(self, session: aiohttp.ClientSession, engine: Engine, sample: Sample) -> float | None:
        in_flight = InFlight(
            tier=sample.tier,
            floor=sample.tier,
            num_sequences=1,
            work=Work(members=len(sample.tier.members), prompt_tokens=0, max_tokens=1),
            finish_by=None,
        )
        engine.traffic.begin(in_flight)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                answer = await upstream.send(session, engine, sample.path, _body(sample), sample.headers)
                async with answer:
                    body = await answer.read()
        finally:
            engine.traffic.end(in_flight)
        if answer.status != 200:
            raise ValueError(f"status {answer.status}")
        return mean_loss(json.loads(body))


def mean_loss(answer: dict[str, Any]) -> float | None:
    """Mean loss in nats over the prompt's tokens after the first; None for a prompt of one token."""
    found = answer.get("prompt_logprobs") or answer["choices"][0]["prompt_logprobs"]
    # For each position the engine returns the entry of its own token; the first position has none.
    losses = [-float(next(iter(entry.values()))["logprob"]) for entry in found if entry]
    return sum(losses) / len(losses) if losses else None


def _body(sample: Sample) -> bytes:
    fields = json.loads(sample.call.fields)
    kept = {key: fields[key] for key in _INPUT if key in fields}
    measuring = {
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,
        "vllm_xargs": {TIER_ARGUMENT: sample.tier.name},
    }
    return json.dumps({**kept, **measuring}).encode()
