"""Ten times overload for a minute: whether every request gets an answer, peak memory, and time to recover.

Measures the capacity with 16 streams, then sends Poisson arrivals at a multiple of it. Usage:

    python bench/overload.py DIR [--factor 10] [--seconds 60] [--tokens 32] [-- ENGINE_ARGUMENT...]
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from chorus.serve.loadtest.load import Plan, Sent, run

sys.path.insert(0, str(Path(__file__).parent))
from gateway import chorus_serve

RECOVERY_BAR_S = 10.0


class Memory(threading.Thread):
    """Samples the resident memory of the gateway and of its engine every second, in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gateway: list[float] = []
        self.engine: list[float] = []
        self.done = threading.Event()

    def run(self) -> None:
        gateway = next(each for each in psutil.Process().children() if "serve" in each.cmdline())
        while not self.done.wait(1.0):
            engine = sum(each.memory_info().rss for each in gateway.children(recursive=True))
            self.gateway.append(gateway.memory_info().rss / 2**20)
            self.engine.append(engine / 2**20)


def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    plan = Plan(url=url, max_tokens=options.tokens, streams=True, timeout_s=90)
    asyncio.run(run(replace(plan, num_streams=16, duration_s=4)))  # warm-up
    alone_s = max(each.total_s for each in asyncio.run(run(replace(plan, num_streams=1, duration_s=4))))
    crowd = asyncio.run(run(replace(plan, num_streams=16, duration_s=10)))
    capacity = len(crowd) / max(each.at_s + each.total_s for each in crowd)
    print(f"{capacity:.1f} requests/s at 16 streams, {alone_s:.2f} s alone", flush=True)

    memory = Memory()
    memory.start()
    # One third each: no deadline, a deadline, and a deadline at which the answer is truncated.
    flood = replace(plan, rate_per_s=options.factor * capacity, duration_s=options.seconds)
    sent = asyncio.run(_together(flood, alone_s))
    ended_at = time.perf_counter()
    while (after := asyncio.run(run(replace(plan, num_streams=1, duration_s=0.01)))[0]) and not (
        after.is_served and after.total_s < 2 * alone_s
    ):
        time.sleep(0.1)
    recovery_s = time.perf_counter() - ended_at
    memory.done.set()
    memory.join()
    refused = [each for each in sent if each.status == 429]
    return {
        "capacity_per_s": capacity,
        "sent": len(sent),
        "statuses": dict(Counter(each.status for each in sent)),
        "served": sum(each.is_served for each in sent),
        "failed_5xx": sum(each.status >= 500 for each in sent),
        "hung_or_broken": dict(Counter(each.error for each in sent if each.error is not None)),
        "without_retry_after": sum(each.retry_after_s is None for each in refused),
        "longest_s": max(each.total_s for each in sent),
        "recovery_s": recovery_s,
        "gateway_mib": [memory.gateway[0], max(memory.gateway), memory.gateway[-1]],
        "engine_mib": [memory.engine[0], max(memory.engine), memory.engine[-1]],
    }


async def _together(flood: Plan, alone_s: float) -> list[Sent]:
    part = replace(flood, rate_per_s=(flood.rate_per_s or 0) / 3)
    budgets = (2000 * alone_s, 8000 * alone_s)
    plans = [
        part,
        replace(part, budgets_ms=budgets, seed=1),
        replace(part, budgets_ms=budgets, on_deadline="truncate", streams=False, seed=2),
    ]
    return [sent for of_plan in await asyncio.gather(*(run(plan) for plan in plans)) for sent in of_plan]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--factor", type=float, default=10)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=32)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, engine_arguments = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(chorus_serve(options.directory, engine_arguments))[0]
        results = measure(url, options)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for name, value in results.items():
        print(f"{name:22}{value}")
    print(json.dumps({**results, "bars": {"failed_5xx": 0, "hung_or_broken": {}, "recovery_s": RECOVERY_BAR_S}}))


if __name__ == "__main__":
    main()
