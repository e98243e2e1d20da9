"""Sends load to a gateway by a chosen arrival process, and records the outcome of each request."""

import asyncio
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from chorus.population.manifest import Decoding

Arrivals = Literal["poisson", "constant", "bursty"]
_BURST = 8
"""Requests per burst in bursty arrivals; the bursts are a Poisson process."""
_WORDS = (
    "def",
    "class",
    "return",
    "import",
    "self",
    "value",
    "index",
    "name",
    "for",
    "range",
    "print",
    "open",
    "read",
    "data",
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The load to send."""

    url: str
    arrivals: Arrivals = "poisson"
    rate_per_s: float | None = None
    """Mean arrivals per second; None for a closed loop of `num_streams` concurrent streams."""
    num_streams: int = 16
    duration_s: float = 30.0
    tiers: tuple[tuple[str | None, float], ...] = ((None, 1.0),)
    """Tiers and their shares of the requests; None stands for no tier."""
    budgets_ms: tuple[float | None, ...] = (None,)
    """Time budgets in milliseconds; each request gets one at random. None is no budget."""
    sends_budget: bool = True
    """Whether requests carry their time budget; else it only serves to judge the answers."""
    on_deadline: str = "degrade"
    decoding: Decoding | None = None
    """Decoding of the requests; None leaves it to the gateway."""
    max_tokens: int = 64
    prompt_words: int = 12
    streams: bool = True
    key: str | None = None
    seed: int = 0
    timeout_s: float = 120.0


@dataclass(kw_only=True)
class Sent:
    """One request and its outcome. Times are in seconds from its sending."""

    at_s: float
    """Seconds from the start of the run."""
    budget_s: float | None
    tier_asked: str | None
    status: int = 0
    """HTTP status; 0 if no answer came."""
    tier_served: str | None = None
    first_s: float | None = None
    total_s: float = 0.0
    tokens: int = 0
    members_per_token: list[tuple[int, int]] = field(default_factory=list)
    """Pairs of a number of members and the number of tokens that had it, if the answer reports that."""
    retry_after_s: int | None = None
    error: str | None = None

    @property
    def is_served(self) -> bool:
        """Whether it was answered in full."""
        return self.status == 200 and self.error is None

    @property
    def is_in_time(self) -> bool:
        """Whether it was answered in full, and within its budget if it had one."""
        return self.is_served and (self.budget_s is None or self.total_s <= self.budget_s)


def arrivals(kind: Arrivals, rate_per_s: float, duration_s: float, rng: random.Random) -> Iterator[float]:
    """Arrival times in seconds, ascending."""
    at_s = 0.0
    while True:
        match kind:
            case "constant":
                at_s += 1 / rate_per_s
                together = 1
            case "poisson":
                at_s += rng.expovariate(rate_per_s)
                together = 1
            case "bursty":
                at_s += rng.expovariate(rate_per_s / _BURST)
                together = _BURST
        if at_s >= duration_s:
            return
        yield from [at_s] * together


async def run(plan: Plan) -> list[Sent]:
    """Send the load and wait for every answer."""
    rng = random.Random(plan.seed)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=plan.timeout_s)
    ) as session:
        if plan.rate_per_s is None:
            return await _closed_loop(plan, session, rng)
        began_at, tasks = time.perf_counter(), []
        for at_s in arrivals(plan.arrivals, plan.rate_per_s, plan.duration_s, rng):
            await asyncio.sleep(began_at + at_s - time.perf_counter())
            sent, body = _draw(plan, rng, at_s)
            tasks.append(asyncio.create_task(_send(plan, session, sent, body)))
        return list(await asyncio.gather(*tasks))


async def _closed_loop(plan: Plan, session: aiohttp.ClientSession, rng: random.Random) -> list[Sent]:
    began_at, found = time.perf_counter(), list[Sent]()

    async def stream() -> None:
        while (at_s := time.perf_counter() - began_at) < plan.duration_s:
            found.append(await _send(plan, session, *_draw(plan, rng, at_s)))

    await asyncio.gather(*(stream() for _ in range(plan.num_streams)))
    return found


def _draw(plan: Plan, rng: random.Random, at_s: float) -> tuple[Sent, dict[str, Any]]:
    names, shares = zip(*plan.tiers, strict=True)
    tier = rng.choices(names, shares)[0]
    budget_ms = rng.choice(plan.budgets_ms)
    body: dict[str, Any] = {
        "prompt": " ".join(rng.choices(_WORDS, k=plan.prompt_words)),
        "max_tokens": plan.max_tokens,
        "ignore_eos": True,
        "stream": plan.streams,
    }
    if plan.streams:
        body["stream_options"] = {"include_usage": True}
    if tier is not None:
        body["budget"] = tier
    if budget_ms is not None and plan.sends_budget:
        body |= {"latency_budget_ms": budget_ms, "on_deadline": plan.on_deadline}
    if plan.decoding is not None:
        body["decoding"] = plan.decoding
    budget_s = None if budget_ms is None else budget_ms / 1000
    return Sent(at_s=at_s, budget_s=budget_s, tier_asked=tier), body


async def _send(plan: Plan, session: aiohttp.ClientSession, sent: Sent, body: dict[str, Any]) -> Sent:
    headers = {} if plan.key is None else {"Authorization": f"Bearer {plan.key}"}
    began_at = time.perf_counter()
    try:
        async with session.post(f"{plan.url}/v1/completions", json=body, headers=headers) as answer:
            sent.status, sent.tier_served = answer.status, answer.headers.get("x-chorus-tier")
            if "retry-after" in answer.headers:
                sent.retry_after_s = int(answer.headers["retry-after"])
            if answer.status == 200 and plan.streams:
                await _read_stream(answer, sent, began_at)
            else:
                _read_whole(await answer.json(), sent)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        sent.error = type(error).__name__
    sent.total_s = time.perf_counter() - began_at
    return sent


async def _read_stream(answer: aiohttp.ClientResponse, sent: Sent, began_at: float) -> None:
    text = b""
    async for data in answer.content.iter_any():
        if sent.first_s is None:
            sent.first_s = time.perf_counter() - began_at
        text += data
    events = text.split(b"\n\n")
    for event in events:
        if event.startswith(b"data: {"):
            _note(json.loads(event[6:]), sent)
    if b"data: [DONE]" not in events and sent.error is None:
        sent.error = "cut off"


def _read_whole(body: dict[str, Any], sent: Sent) -> None:
    _note(body, sent)


def _note(body: dict[str, Any], sent: Sent) -> None:
    if "error" in body and sent.status == 200:
        sent.error = str(body["error"].get("code"))
    if body.get("usage"):
        sent.tokens = int(body["usage"]["completion_tokens"])
    population = body.get("population") or {}
    if "members_per_token" in population:
        sent.members_per_token = [(int(members), int(tokens)) for members, tokens in population["members_per_token"]]
