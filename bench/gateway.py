"""The gateway against its engine: tokens per second at 16 streams, and time to the first token of a single request.

Both are measured in turn in every round, so that other load on the machine affects both. Usage:

    python bench/gateway.py DIR [--tier economy] [--each-token] [--rounds 40] [--streams 16] [--tokens 128] [-- ENGINE_ARGUMENT...]
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import aiohttp

PROMPT = "def read_settings(path):\n"


@contextlib.contextmanager
def chorus_serve(directory: str, engine_arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Run `chorus serve`. Yields the addresses of the gateway and of its engine."""
    command = [sys.executable, "-m", "chorus", "serve", directory, "--port", "0", "--", *engine_arguments]
    with tempfile.TemporaryFile("w+") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            while not (match := re.search(r"ready in .*?(http://\S+)/v1.*engine (http://\S+)", _read(output))):
                assert process.poll() is None, _read(output)
                time.sleep(0.5)
            yield match[1], match[2]
        finally:
            process.send_signal(signal.SIGINT)


def _read(output) -> str:
    output.seek(0)
    return output.read()


async def stream(session: aiohttp.ClientSession, url: str, fields: dict) -> tuple[float, int]:
    """Run one streamed completion. Returns seconds to its first event, and the number of events."""
    began_at, first_s, events = time.perf_counter(), 0.0, 0
    async with session.post(f"{url}/v1/completions", json=fields) as response:
        response.raise_for_status()
        async for data in response.content.iter_any():
            first_s = first_s or time.perf_counter() - began_at
            events += data.count(b"\n\n")
    return first_s, events


async def measure(gateway: str, engine: str, options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    body = {"prompt": PROMPT, "stream": True, "temperature": 0, "ignore_eos": True}
    targets = {
        "engine": (engine, {**body, "vllm_xargs": {"chorus_tier": options.tier}}),
        "gateway": (gateway, {**body, "budget": options.tier} | ({"stream_interval": 1} if options.each_token else {})),
    }
    measured: dict[str, dict[str, list[float]]] = {name: {"tokens_per_s": [], "first_ms": []} for name in targets}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3)) as session:
        for round_idx in range(options.rounds + 1):
            for name in sorted(targets, reverse=round_idx % 2 == 1):
                url, fields = targets[name]
                began_at = time.perf_counter()
                streams = [
                    stream(session, url, fields | {"max_tokens": options.tokens}) for _ in range(options.streams)
                ]
                await asyncio.gather(*streams)
                tokens_per_s = options.streams * options.tokens / (time.perf_counter() - began_at)
                if round_idx:  # the first round warms up
                    measured[name]["tokens_per_s"].append(tokens_per_s)
            for _ in range(10 if round_idx else 3):
                for name, (url, fields) in targets.items():
                    first_s, _ = await stream(session, url, fields | {"max_tokens": 2})
                    if round_idx:
                        measured[name]["first_ms"].append(1000 * first_s)
    return measured


def ratio(measured: dict[str, dict[str, list[float]]], rounds: Sequence[int]) -> float:
    """Ratio of tokens per second, gateway over engine, over all these rounds. On two cores, rounds are either fast or slow, and a
    ratio of medians would jump between the two."""
    seconds = {name: sum(1 / of["tokens_per_s"][idx] for idx in rounds) for name, of in measured.items()}
    return seconds["engine"] / seconds["gateway"]


def interval(measured: dict[str, dict[str, list[float]]]) -> tuple[float, float]:
    """90 % interval of the ratio, by a bootstrap over rounds."""
    num_rounds, rng = len(measured["engine"]["tokens_per_s"]), random.Random(0)
    ratios = sorted(ratio(measured, rng.choices(range(num_rounds), k=num_rounds)) for _ in range(1000))
    return ratios[50], ratios[-50]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument(
        "--tier", default="economy", help="default: the cheapest tier, which makes the gateway's overhead most visible"
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--each-token", action="store_true", help="request one event per token from the gateway, too")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, engine_arguments = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # exit normally, so that the server is stopped
    with chorus_serve(options.directory, engine_arguments) as (gateway, engine):
        measured = asyncio.run(measure(gateway, engine, options))
    medians = {name: {key: statistics.median(values) for key, values in of.items()} for name, of in measured.items()}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, tier {options.tier}")
    print(f"{'':10}{'tokens/s':>12}{'first token, ms':>18}{'p99':>8}")
    p99_ms = {name: statistics.quantiles(measured[name]["first_ms"], n=100)[-1] for name in measured}
    for name, of in medians.items():
        print(f"{name:10}{of['tokens_per_s']:12.0f}{of['first_ms']:18.2f}{p99_ms[name]:8.2f}")
    low, high = interval(measured)
    paired = [g - e for g, e in zip(measured["gateway"]["first_ms"], measured["engine"]["first_ms"], strict=True)]
    result = {
        "throughput_ratio": round(ratio(measured, range(options.rounds)), 3),
        "ratio_90_percent": [round(low, 3), round(high, 3)],
        "added_first_token_ms": round(statistics.median(paired), 2),
        "added_first_token_p99_ms": round(p99_ms["gateway"] - p99_ms["engine"], 2),
    }
    bars = {"throughput_ratio": 0.97, "added_first_token_ms": 2.0, "added_first_token_p99_ms": 10.0}
    print(json.dumps({**result, "bars": bars}))


if __name__ == "__main__":
    main()
