"""Capacity planning: simulates a gateway with several engines under a load, with step costs measured on one engine.

    python -m bench.capacity --measure http://127.0.0.1:8000 --save costs.json    # a gateway with one otherwise idle engine
    python -m bench.capacity --costs costs.json --rate 30 --tiers 1=0.7,8=0.3 --prompt 400 --answer 200 --budget-ms 4000

The time of an engine's step is a constant plus a cost per running member, per member row, and per prompt token and member.
Requests wait in one queue for the engine with the fewest member rows, as in the gateway. Not modelled: shrinking tiers and
dropped members, which makes plans conservative; networks, and preemption when KV blocks run out (docs/operations.md counts them),
which makes them optimistic.
"""

import argparse
import json
import random
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of a step, in milliseconds."""

    step_ms: float
    """Constant per step."""
    member_ms: float
    """Per member that at least one sequence runs."""
    row_ms: float
    """Per member row; a sequence with four members has four."""
    prompt_ms: float
    """Per token of a new prompt and member that runs it."""

    def of(self, *, members: int, rows: int, prompt_rows: int = 0) -> float:
        """Duration of one step, in seconds."""
        return (self.step_ms + self.member_ms * members + self.row_ms * rows + self.prompt_ms * prompt_rows) / 1000


@dataclass(frozen=True, kw_only=True)
class Request:
    """An arriving request. Tiers are nested, so the number of members suffices."""

    at_s: float
    members: int
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Times of a served request, in seconds from its arrival."""

    request: Request
    waited_s: float
    first_token_s: float
    total_s: float


class _Engine:
    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self.running: list[list[Any]] = []  # request, start time, time of the first token or None, tokens left
        self.step_ends_at: float | None = None
        self.busy_s = 0.0

    @property
    def rows(self) -> int:
        return sum(entry[0].members for entry in self.running)

    def begin_step(self, now: float) -> None:
        fresh = sum(entry[0].members * entry[0].prompt_tokens for entry in self.running if entry[2] is None)
        members = max(entry[0].members for entry in self.running)
        step_s = self._costs.of(members=members, rows=self.rows, prompt_rows=fresh)
        self.step_ends_at = now + step_s
        self.busy_s += step_s
        self._in_step = list(self.running)

    def end_step(self, now: float) -> Iterator[Outcome]:
        """Add a token to every sequence of the step. Removes and yields complete ones."""
        self.step_ends_at = None
        for entry in self._in_step:
            request, began_at, first_at, left = entry
            entry[2], entry[3] = (now if first_at is None else first_at), left - 1
            if entry[3] == 0:
                self.running.remove(entry)
                waited, first, total = began_at - request.at_s, entry[2] - request.at_s, now - request.at_s
                yield Outcome(request=request, waited_s=waited, first_token_s=first, total_s=total)


def simulate(
    requests: Iterable[Request], costs: Costs, *, engines: int, max_sequences: int
) -> tuple[list[Outcome], float]:
    """Outcomes in order of completion, and the mean fraction of time that the engines were busy."""
    pool = [_Engine(costs) for _ in range(engines)]
    arrivals, queue, outcomes = deque(sorted(requests, key=lambda each: each.at_s)), deque[Request](), list[Outcome]()
    now = began = arrivals[0].at_s
    while arrivals or queue or any(engine.running for engine in pool):
        ends = [engine.step_ends_at for engine in pool if engine.step_ends_at is not None]
        now = min([*ends, *([arrivals[0].at_s] if arrivals else [])])
        for engine in pool:
            if engine.step_ends_at is not None and engine.step_ends_at <= now:
                outcomes += engine.end_step(now)
        while arrivals and arrivals[0].at_s <= now:
            queue.append(arrivals.popleft())
        while queue:
            engine = min(pool, key=lambda each: (len(each.running) >= max_sequences, each.rows))
            if len(engine.running) >= max_sequences:
                break
            request = queue.popleft()
            engine.running.append([request, now, None, request.answer_tokens])
        for engine in pool:
            if engine.running and engine.step_ends_at is None:
                engine.begin_step(now)
    return outcomes, sum(engine.busy_s for engine in pool) / engines / max(now - began, 1e-9)


def poisson(
    *, rate: float, seconds: float, tiers: dict[int, float], prompt: int, answer: int, seed: int, is_fixed: bool = False
) -> list[Request]:
    """Poisson arrivals with a random number of members by share. Lengths are geometric, cut at 8 times the mean, or all equal to
    the mean if `is_fixed`."""
    rng = random.Random(seed)
    requests, at_s = list[Request](), 0.0

    def length(mean: int) -> int:
        return mean if is_fixed else max(1, min(8 * mean, int(rng.expovariate(1 / mean)) + 1))

    while (at_s := at_s + rng.expovariate(rate)) < seconds:
        (members,) = rng.choices(list(tiers), weights=list(tiers.values()))
        requests.append(Request(at_s=at_s, members=members, prompt_tokens=length(prompt), answer_tokens=length(answer)))
    return requests


def fit(observed: Sequence[tuple[int, int, float]], prompts: Sequence[tuple[int, float]]) -> Costs:
    """Non-negative least squares from (members, rows, seconds per token) and, for prompts, (prompt tokens times members, seconds to
    the first token minus one step)."""
    features = np.array([[1.0, members, rows] for members, rows, _ in observed])
    target = np.array([seconds * 1000 for *_, seconds in observed])
    weights = np.zeros(3)
    for _ in range(2000):  # coordinate descent: converges for 3 unknowns
        for idx in range(3):
            others = features @ weights - features[:, idx] * weights[idx]
            weights[idx] = max(0.0, float(features[:, idx] @ (target - others) / (features[:, idx] @ features[:, idx])))
    sizes = np.array([size for size, _ in prompts], dtype=float)
    extra = np.array([seconds * 1000 for _, seconds in prompts])
    prompt_ms = max(0.0, float(sizes @ extra / (sizes @ sizes))) if len(prompts) else 0.0
    step_ms, member_ms, row_ms = (float(weight) for weight in weights)
    return Costs(step_ms=step_ms, member_ms=member_ms, row_ms=row_ms, prompt_ms=prompt_ms)


def measure(url: str, *, tokens: int = 48) -> Costs:
    """Measure the engine behind a gateway with streams of every tier, one or several at once, and of two tiers together."""
    cards = httpx.get(f"{url}/v1/models").json()["data"]
    tiers = {
        card["id"]: len(card["population"]["members"]) for card in cards if ":" in card["id"] and "population" in card
    }
    if not tiers:
        raise SystemExit(
            f"{url} offers no tiers: --measure needs the address of a gateway (chorus serve), not of an engine."
        )
    observed, prompts = list[tuple[int, int, float]](), list[tuple[int, float]]()
    for model, members in tiers.items():
        _stream(url, model, prompt=8, tokens=4)  # warm
        for count in (1, 2, 4, 8):
            times = _streams(url, [model] * count, prompt=8, tokens=tokens)
            observed.append((members, members * count, float(np.median([token_s for _, token_s in times]))))
        for prompt in (32, 96):
            ((first_s, token_s),) = _streams(url, [model], prompt=prompt, tokens=4)
            prompts.append((members * prompt, max(0.0, first_s - token_s)))
    smallest, largest = min(tiers, key=tiers.__getitem__), max(tiers, key=tiers.__getitem__)
    for count in (1, 2):  # only mixed batches pay for separating the members' rows
        mix = [largest] * count + [smallest] * (3 * count)
        times = _streams(url, mix, prompt=8, tokens=tokens)
        rows = sum(tiers[model] for model in mix)
        observed.append((tiers[largest], rows, float(np.median([token_s for _, token_s in times]))))
    return fit(observed, prompts)


def _streams(url: str, models: Sequence[str], *, prompt: int, tokens: int) -> list[tuple[float, float]]:
    times = list[tuple[float, float]]()
    threads = [
        threading.Thread(target=lambda model=model: times.append(_stream(url, model, prompt=prompt, tokens=tokens)))
        for model in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def _stream(url: str, model: str, *, prompt: int, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and per further token."""
    prompt_tokens = [random.randrange(3, 200) for _ in range(prompt)]  # random, to miss the prefix cache
    body = {"model": model, "prompt": prompt_tokens, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    began, times = time.perf_counter(), list[float]()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {") and '"text"' in line:
                times.append(time.perf_counter() - began)
    return times[0], (times[-1] - times[0]) / (tokens - 1)


def plan(options: argparse.Namespace, costs: Costs) -> None:
    """Print a row for each number of engines, up to the first that meets the attainment."""
    tiers = {int(members): float(share) for members, share in (part.split("=") for part in options.tiers.split(","))}
    requests = poisson(
        rate=options.rate,
        seconds=options.seconds,
        tiers=tiers,
        prompt=options.prompt,
        answer=options.answer,
        seed=options.seed,
        is_fixed=options.fixed,
    )
    print(f"{len(requests)} requests in {options.seconds:g} s; {costs}\n")
    print(
        "| engines | busy | wait, p95 | first token, p95 | total, p50 | total, p95 | in time |\n|--:|--:|--:|--:|--:|--:|--:|"
    )
    for engines in range(1, options.most + 1):
        outcomes, busy = simulate(requests, costs, engines=engines, max_sequences=options.max_sequences)
        in_time = sum(each.total_s * 1000 <= options.budget_ms for each in outcomes) / len(outcomes)

        def quantile(percent: float, name: str, outcomes: list[Outcome] = outcomes) -> str:
            return f"{1000 * np.percentile([getattr(each, name) for each in outcomes], percent):,.0f} ms"

        print(
            f"| {engines} | {busy:.0%} | {quantile(95, 'waited_s')} | {quantile(95, 'first_token_s')} "
            f"| {quantile(50, 'total_s')} | {quantile(95, 'total_s')} | {in_time:.1%} |"
        )
        if in_time >= options.attainment:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", metavar="URL", help="Gateway whose engine to measure.")
    parser.add_argument("--save", type=Path, help="File for the measured costs.")
    parser.add_argument("--costs", type=Path, help="File of measured costs, from --save.")
    parser.add_argument("--rate", type=float, help="Mean arrivals per second.")
    parser.add_argument("--tiers", default="1=1", help="Shares of requests by number of members: 1=0.7,8=0.3.")
    parser.add_argument("--prompt", type=int, default=200, help="Mean tokens per prompt.")
    parser.add_argument("--answer", type=int, default=200, help="Mean tokens per answer.")
    parser.add_argument("--fixed", action="store_true", help="Give all prompts and answers their mean length.")
    parser.add_argument("--budget-ms", type=float, default=10_000, help="Time budget for a whole answer.")
    parser.add_argument("--attainment", type=float, default=0.99, help="Share of answers required to be in time.")
    parser.add_argument("--max-sequences", type=int, default=64, help="Most sequences per engine, as in the gateway.")
    parser.add_argument("--seconds", type=float, default=300, help="Duration of the simulated arrivals.")
    parser.add_argument("--most", type=int, default=64, help="Most engines to try.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.measure is None) == (options.costs is None):
        parser.error("give --costs FILE, or --measure URL to measure them")
    costs = measure(options.measure) if options.measure else Costs(**json.loads(options.costs.read_text()))
    if options.save is not None:
        options.save.write_text(json.dumps(asdict(costs), indent=2) + "\n")
    if options.rate is None:
        print(json.dumps(asdict(costs), indent=2))
    else:
        plan(options, costs)


if __name__ == "__main__":
    main()
