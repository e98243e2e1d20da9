"""Where the turns of conversations land: four engines with prefix caches, one and four gateways, in simulated time.

The gateways are the pools of the real gateway (`engines.pool`), each with its own view: it knows only its own requests in flight.
Conversations share a system prompt. Each turn goes to a random gateway, and takes a time that depends on what of its prompt the
engine has cached. Policies: the gateway's, its former one (the first 256 bytes and the tier), and random. Usage:

    python bench/routing.py DIR [--conversations 240] [--turns 8] [--active 24] [--system 3000] [--kind chat] [--seeds 3]
"""

import argparse
import heapq
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chorus.population import manifest
from chorus.population.manifest import Population, Tier
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.latency import Work
from chorus.serve.gateway.engines.pool import Pool
from chorus.serve.gateway.engines.traffic import InFlight
from chorus.serve.gateway.request.call import Call, Kind, read_call

NUM_ENGINES = 4
BLOCK = 64
"""Characters of a KV block of 16 tokens."""
CACHED_S, PROMPT_S, ANSWER_S = 0.002, 0.0002, 0.004
"""Seconds of a turn per cached block, per uncached character and per character of its answer."""


@dataclass
class Cache:
    """An engine's prefix cache, without limit: the blocks of every prompt and answer that it has seen."""

    blocks: set[int] = field(default_factory=set)
    turns: int = 0

    def cached(self, text: str) -> int:
        """Blocks at the beginning of `text` that are cached."""
        count = 0
        for key in _blocks(text):
            if key not in self.blocks:
                break
            count += 1
        return count

    def add(self, text: str) -> None:
        self.blocks.update(_blocks(text))


def _blocks(text: str) -> list[int]:
    keys, key = [], 0
    for begin in range(0, len(text) - BLOCK + 1, BLOCK):
        key = hash((key, text[begin : begin + BLOCK]))
        keys.append(key)
    return keys


@dataclass
class Conversation:
    """A list of messages that grows by a question and an answer per turn."""

    rng: random.Random
    system: str
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self) -> None:
        if not self.messages:
            self.messages.append({"role": "system", "content": self.system})
        self.messages.append({"role": "user", "content": words(self.rng, self.rng.randint(60, 400))})

    def answer(self) -> None:
        self.messages.append({"role": "assistant", "content": words(self.rng, self.rng.randint(200, 800))})

    @property
    def text(self) -> str:
        return "".join(f"<{each['role']}>{each['content']}" for each in self.messages)

    def call(self, kind: Kind, population: Population, tier: Tier) -> Call:
        prompts: dict[str, dict[str, Any]] = {
            "chat": {"messages": self.messages},
            "completion": {"prompt": self.text},
            "tokens": {"prompt": [ord(each) for each in self.text]},
        }
        body = {**prompts[kind], "max_tokens": 200, "budget": tier.name}
        return read_call(json.dumps(body).encode(), "chat" if kind == "chat" else "completion", population, tier)


def words(rng: random.Random, length: int) -> str:
    return "".join(rng.choice("abcdefghij klmnopqrst uvwxyz ") for _ in range(length))


def gateways(count: int) -> list[Pool]:
    made = []
    for _ in range(count):
        pool = Pool()
        session: Any = None
        for idx in range(NUM_ENGINES):
            engine = Engine(
                session, url=f"http://e{idx}:80", is_supervised=False, probe_interval_s=1, probe_timeout_s=1
            )
            engine.mark_up()
            pool.engines.append(engine)
        made.append(pool)
    return made


def former() -> Callable[[Pool, Call, random.Random], Engine]:
    """The rule until issue 19: the engine that last got the same first 256 bytes at the same tier, unless it runs 8 rows more."""
    known: dict[tuple[int, str, str], Engine] = {}

    def choose(pool: Pool, call: Call, rng: random.Random) -> Engine:
        part = str(call.prefix.parts[0])[:256]
        key = id(pool), call.choice.tier.name, part
        order = sorted(
            pool.engines, key=lambda each: (each.traffic.load().rows - 8 * (each is known.get(key)), rng.random())
        )
        known[key] = order[0]
        return order[0]

    return choose


def at_random(pool: Pool, call: Call, rng: random.Random) -> Engine:
    return rng.choice(pool.engines)


def ours(pool: Pool, call: Call, rng: random.Random) -> Engine:
    return pool.candidates(call)[0]


def simulate(
    choose: Callable[[Pool, Call, random.Random], Engine],
    options: argparse.Namespace,
    *,
    population: Population,
    tier: Tier,
    num_gateways: int,
    seed: int,
) -> dict[str, float]:
    """Landed share, load over mean, cached share of the prompts' characters."""
    rng = random.Random(seed)
    random.seed(seed)
    system = words(rng, options.system)
    pools, caches = gateways(num_gateways), [Cache() for _ in range(NUM_ENGINES)]
    waiting = [Conversation(rng, system) for _ in range(options.conversations)]
    left = dict.fromkeys(map(id, waiting), options.turns)
    landed, later, cached_share = 0, 0, []
    events: list[tuple[float, int, Callable[[float], None]]] = []
    count = 0

    def at(when: float, event: Callable[[float], None]) -> None:
        nonlocal count
        count += 1
        heapq.heappush(events, (when, count, event))

    def turn(conversation: Conversation) -> Callable[[float], None]:
        def begin(now: float) -> None:
            nonlocal landed, later
            is_first = not conversation.messages
            conversation.ask()
            pool = rng.choice(pools)
            call = conversation.call(options.kind, population, tier)
            engine = choose(pool, call, rng)
            idx = pool.engines.index(engine)
            text = conversation.text
            cached = [cache.cached(text) for cache in caches]
            if not is_first:
                later += 1
                landed += cached[idx] == max(cached)
                cached_share.append(cached[idx] * BLOCK / len(text))
            caches[idx].turns += 1
            request = InFlight(
                tier=tier,
                floor=tier,
                num_sequences=1,
                work=Work(members=len(tier.members), prompt_tokens=1, max_tokens=200),
                finish_by=None,
            )
            engine.traffic.begin(request)
            conversation.answer()
            answer_s = ANSWER_S * len(conversation.messages[-1]["content"])
            prompt_s = CACHED_S * cached[idx] + PROMPT_S * (len(text) - BLOCK * cached[idx])

            def end(now: float) -> None:
                engine.traffic.end(request)
                caches[idx].add(conversation.text)
                left[id(conversation)] -= 1
                if left[id(conversation)]:
                    at(now + rng.expovariate(1.0), turn(conversation))
                elif waiting:
                    at(now, turn(waiting.pop()))

            at(now + prompt_s + answer_s, end)

        return begin

    for _ in range(options.active):
        at(rng.random(), turn(waiting.pop()))
    while events:
        now, _, event = heapq.heappop(events)
        event(now)
    turns = [cache.turns for cache in caches]
    return {
        "landed": landed / later,
        "load": max(turns) / statistics.mean(turns),
        "cached": statistics.mean(cached_share),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the turns of conversations land.")
    parser.add_argument("population", type=Path, metavar="DIR")
    parser.add_argument("--conversations", type=int, default=240)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--active", type=int, default=24, help="conversations at the same time")
    parser.add_argument("--system", type=int, default=3000, help="characters of the system prompt that all share")
    parser.add_argument("--kind", choices=("chat", "completion", "tokens"), default="chat")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    population = manifest.load(options.population)
    print(f"{'policy':10}{'gateways':>9}{'members':>9}{'landed':>9}{'load / mean':>13}{'of prompt cached':>18}")
    policies: Sequence[tuple[str, Callable[[], Callable[[Pool, Call, random.Random], Engine]]]] = (
        ("random", lambda: at_random),
        ("former", former),
        ("chorus", lambda: ours),
    )
    for num_gateways in (1, 4):
        for tier in (population.tiers[0], population.tiers[-1]):
            for name, make in policies:
                runs = [
                    simulate(make(), options, population=population, tier=tier, num_gateways=num_gateways, seed=seed)
                    for seed in range(options.seeds)
                ]
                landed, load, cached = (
                    statistics.mean(run[key] for run in runs) for key in ("landed", "load", "cached")
                )
                print(f"{name:10}{num_gateways:9}{len(tier.members):9}{landed:9.1%}{load:13.2f}{cached:18.1%}")


if __name__ == "__main__":
    main()
