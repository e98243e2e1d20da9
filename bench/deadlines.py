"""Deadlines under load: Poisson arrivals at 0.5, 1 and 2 times the capacity of `max`, with twice its unloaded time as budget.

Compares the gateway's own choice of tiers with every fixed tier, in turn, in one run. With --plain, compares it with plain decoding
instead. Each load lasts long enough for a slightly overloaded tier to fall behind: for ten seconds, the slack in the time budgets
can absorb it. Usage:

    python bench/deadlines.py DIR [--seconds 40] [--rounds 1] [--tokens 48] [--factors 1 2] [--plain] [-- ENGINE_ARGUMENT...]
    python bench/deadlines.py DIR --url http://127.0.0.1:8000
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from chorus.population import manifest
from chorus.serve.gateway.request.offer import model_cards
from chorus.serve.loadtest.load import Plan, Sent, run
from chorus.serve.loadtest.summary import summarise

sys.path.insert(0, str(Path(__file__).parent))
from gateway import chorus_serve

CHORUS, PLAIN = "chorus", "plain"
PAUSE_S = 3  # lets the engine become idle before every run
BARS = {0.5: 0.99, 1.0: 0.95, 2.0: 0.90}


def measure(url: str, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    population = manifest.load(directory)
    tiers = [tier.name for tier in population.tiers]
    largest = max(population.tiers, key=lambda tier: tier.budget)
    cards = {card["population"]["tier"]: card["population"] for card in model_cards(population, largest).values()}
    plan = Plan(url=url, max_tokens=options.tokens, streams=False, tiers=((largest.name, 1.0),), seed=options.seed)

    asyncio.run(run(replace(plan, num_streams=4, duration_s=3)))  # warm-up
    alone = asyncio.run(run(replace(plan, num_streams=1, duration_s=8)))
    unloaded_s = statistics.median(each.total_s for each in alone)
    crowd = asyncio.run(run(replace(plan, num_streams=16, duration_s=options.seconds)))
    busy_s = max(each.at_s + each.total_s for each in crowd)
    capacity = len(crowd) / busy_s
    results: dict[str, Any] = {"unloaded_s": unloaded_s, "capacity_per_s": capacity, "runs": []}
    print(f"{largest.name}: {unloaded_s:.2f} s alone, {capacity:.2f} requests/s at 16 streams", flush=True)
    sent: dict[tuple[float, str], list[Sent]] = {}
    for round_ in range(options.rounds):
        for factor in options.factors:
            loaded = replace(
                plan,
                rate_per_s=factor * capacity,
                duration_s=options.seconds,
                budgets_ms=(2000 * unloaded_s,),
                seed=options.seed + round_,
            )
            policies = {CHORUS: replace(loaded, tiers=((None, 1.0),))}
            if options.plain:
                policies[PLAIN] = replace(policies[CHORUS], decoding="plain")
            else:
                policies |= {
                    name: replace(loaded, tiers=((name, 1.0),), sends_budget=False) for name in reversed(tiers)
                }
            for policy, each in policies.items():
                time.sleep(PAUSE_S)
                new = asyncio.run(run(each))
                sent.setdefault((factor, policy), []).extend(new)
                figures = summarise(new, cards, options.seconds)
                shown = {key: figures.get(key) for key in ("sent", "refused_429", "attainment", "mean_members")}
                print(f"round {round_ + 1}, {factor} {policy:10} {shown}", flush=True)
    for (factor, policy), all_sent in sent.items():
        figures = summarise(all_sent, cards, options.rounds * options.seconds)
        results["runs"].append({"factor": factor, "policy": policy, **figures})
    return results


def verdicts(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Compare the mean members with those of the largest fixed tier that meets as many deadlines: at each load, and at all."""
    by_policy: dict[str, list[dict[str, Any]]] = {}
    for each in runs:
        by_policy.setdefault(each["policy"], []).append(each)
    ours = by_policy.pop(CHORUS)
    for idx, mine in enumerate(ours):
        as_good = [
            fixed[idx] for fixed in by_policy.values() if (fixed[idx]["attainment"] or 0) >= (mine["attainment"] or 0)
        ]
        yield f"at {mine['factor']}x: {_compare([mine], [[each] for each in as_good])}"
    as_good = [
        fixed
        for fixed in by_policy.values()
        if all((each["attainment"] or 0) >= (mine["attainment"] or 0) for each, mine in zip(fixed, ours, strict=True))
    ]
    yield f"at all loads: {_compare(ours, as_good)}"


def _compare(ours: list[dict[str, Any]], as_good: list[list[dict[str, Any]]]) -> str:
    best = max(as_good, key=_mean_members, default=None)
    if best is None:
        return f"{_mean_members(ours):.2f} members; no fixed tier meets as many deadlines"
    name, members = best[0]["policy"], _mean_members(best)
    return f"{_mean_members(ours):.2f} members; {members:.2f} with {name}, the largest fixed tier that meets as many deadlines"


def _mean_members(runs: list[dict[str, Any]]) -> float:
    """Mean members of the answers in time, weighted by the number served at each load."""
    served = sum(each["served"] for each in runs)
    return sum(each["served"] * (each["mean_members"] or 0.0) for each in runs) / max(1, served)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--url", help="a running gateway, instead of starting one")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--factors", type=float, nargs="+", default=list(BARS), choices=list(BARS))
    parser.add_argument("--plain", action="store_true", help="compare with plain decoding instead of fixed tiers")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, engine_arguments = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(chorus_serve(str(options.directory), engine_arguments))[0]
        results = measure(url, options.directory, options)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(
        f"{'load':>5} {'policy':10}{'in time':>9}{'bar':>6}{'refused':>9}{'members':>9}{'loss':>8}{'good/s':>8}{'p99, s':>8}"
    )
    for each in results["runs"]:
        bar = f"{BARS[each['factor']]:.0%}" if each["policy"] == CHORUS else ""
        print(
            f"{each['factor']:>5} {each['policy']:10}{each['attainment'] or 0:>9.1%}{bar:>6}{each['refused_429']:>9}"
            f"{each['mean_members'] or 0:>9.2f}{each.get('expected_loss_nats') or 0:>8.3f}"
            f"{each['requests_in_time_per_s']:>8.2f}{each['total_ms'].get('p99', 0) / 1000:>8.2f}"
        )
    for line in [] if options.plain else verdicts(results["runs"]):
        print(line)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
