"""Tokens/s of the engine for each tier and for mixed batches, against plain vLLM with one member (compiled and eager), in turn, in
one run. All members run at every token (`decoding: "plain"`).

    python -m bench.random_population POPULATION
    python -m bench.engine POPULATION [--concurrency 1 4 16] [--repeats 5] [--tokens 192] [--json OUT]

Each engine runs in its own process, without an API server, and is idle while another is measured. `bound` is the fraction of plain
vLLM's speed that a row's member rows alone would allow: 1 / members. Below the table are the ratios with required bounds.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from chorus.population import manifest

PROMPT_TOKENS = 16


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("population", type=Path)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=192, help="tokens that each request generates")
    parser.add_argument("--dtype", default="float32", help="dtype of weights and activations")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    population = manifest.load(arguments.population)
    first = population.member(population.tiers[0].members[0])
    mixes = {tier.name: [tier.name] for tier in population.tiers}
    mixes["15 cheapest : 1 dearest"] = [population.tiers[0].name] * 15 + [population.tiers[-1].name]
    budgets = {tier.name: tier.budget for tier in population.tiers}
    member = arguments.population / first.path
    plain, eager, mixed = (
        Engine(model, tokenizer=arguments.population, dtype=arguments.dtype, enforce_eager=is_eager)
        for model, is_eager in ((member, False), (member, True), (arguments.population, False))
    )
    rows = []
    try:
        for concurrency in arguments.concurrency:
            for name, mix in mixes.items():
                if len(mix) > concurrency:
                    continue
                tiers = [mix[idx % len(mix)] for idx in range(concurrency)]
                ratios, eager_ratios, speeds, shares = [], [], [], []
                for repeat in range(arguments.repeats + 1):
                    base, _ = plain.run(concurrency * [None], arguments.tokens)
                    eager_base, _ = eager.run(concurrency * [None], arguments.tokens)
                    speed, mixing_share = mixed.run(tiers, arguments.tokens)
                    if repeat:  # the first repeat is a warm-up
                        ratios.append(speed / base)
                        eager_ratios.append(speed / eager_base)
                        speeds.append((base, speed))
                        shares.append(mixing_share)
                rows.append(
                    {
                        "concurrency": concurrency,
                        "mix": name,
                        "member_rows": sum(budgets[tier] for tier in tiers) / concurrency,
                        "plain_tokens_per_s": statistics.median(base for base, _ in speeds),
                        "tokens_per_s": statistics.median(speed for _, speed in speeds),
                        "ratio": statistics.median(ratios),
                        "ratio_min": min(ratios),
                        "ratio_max": max(ratios),
                        "ratio_to_eager": statistics.median(eager_ratios),
                        "mixing_share": statistics.median(shares),
                    }
                )
        kv_capacity = mixed.kv_tokens / plain.kv_tokens
    finally:
        for engine in (plain, eager, mixed):
            engine.stop()
    report(rows)
    bars = compare_with_bars(rows, budgets, kv_capacity)
    for what, value, bar in bars:
        print(f"{what:<70} {value:6.3f}  (bar {bar})")
    if arguments.json:
        figures = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "dtype": arguments.dtype,
            "rows": rows,
            "bars": [{"what": what, "measured": value, "bar": bar} for what, value, bar in bars],
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def compare_with_bars(
    rows: list[dict[str, Any]], budgets: dict[str, int], kv_capacity: float
) -> list[tuple[str, float, str]]:
    """The ratios with required bounds: description, measured value, bar."""
    # Rows are compared through their ratios to plain vLLM, so that changes in the machine's speed between rows cancel.
    plain = {
        concurrency: statistics.median(row["plain_tokens_per_s"] for row in rows if row["concurrency"] == concurrency)
        for concurrency in {row["concurrency"] for row in rows}
    }
    speeds = {(row["concurrency"], row["mix"]): row["ratio"] * plain[row["concurrency"]] for row in rows}
    cheapest, dearest = next(iter(budgets)), list(budgets)[-1]
    bars = []
    for row in rows:
        concurrency, mix = row["concurrency"], row["mix"]
        if mix == cheapest:
            bars.append((f"one member / plain vLLM, {concurrency} requests", row["ratio"], ">= 0.97"))
        elif mix in budgets:
            step = speeds[concurrency, cheapest] / speeds[concurrency, mix] / budgets[mix]
            bars.append(
                (
                    f"step of {budgets[mix]} members / {budgets[mix]} steps of one member, {concurrency} requests",
                    step,
                    "<= 0.5 if small" if concurrency == 1 else "<= 1.05",
                )
            )
        elif (1, cheapest) in speeds:
            alone = concurrency / speeds[concurrency, cheapest] + (budgets[dearest] - 1) / speeds[1, cheapest]
            bars.append(
                (
                    f"mixed batch / its member rows alone, {concurrency} requests",
                    concurrency / speeds[concurrency, mix] / alone,
                    "<= 1.10",
                )
            )
        if mix == dearest:
            bars.append(
                (f"share of a step spent mixing, {mix}, {concurrency} requests", row["mixing_share"], "<= 0.05")
            )
    return [*bars, ("KV capacity in tokens for one member / plain vLLM, same bytes", kv_capacity, ">= 0.95")]


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table("concurrency", "requests", box=None)
    for heading in ("plain vLLM, tokens/s", "population, tokens/s", "ratio", "to eager", "bound"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["concurrency"]),
            row["mix"],
            f"{row['plain_tokens_per_s']:.0f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['ratio']:.3f} [{row['ratio_min']:.3f}, {row['ratio_max']:.3f}]",
            f"{row['ratio_to_eager']:.3f}",
            f"{1 / row['member_rows']:.3f}",
        )
    Console().print(table)


class Engine:
    """A vLLM engine in its own process, driven through standard input and output."""

    def __init__(self, model: Path, *, tokenizer: Path, **options: Any) -> None:
        command = [sys.executable, __file__, "--engine", str(model), str(tokenizer), json.dumps(options)]
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(options.get("tensor_parallel_size", 1))))
            if "tensor_parallel_size" in options
            else "auto",
        }
        environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
        )

    @cached_property
    def kv_tokens(self) -> float:
        """Capacity of its KV cache, in tokens of one member."""
        return self._answer()[0]

    def run(self, tiers: list[Any], num_tokens: int) -> tuple[float, float]:
        """Run one request per entry of `tiers` as a batch. Returns tokens per second and the share of time spent mixing."""
        assert self.kv_tokens, "the engine has no KV cache"
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([tiers, num_tokens]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> tuple[float, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer "):
                first, second = line.removeprefix("answer ").split()
                return float(first), float(second)
        raise SystemExit(f"the engine exited with status {self._process.wait()}; run its command by hand to see why")


def serve_engine(model: str, tokenizer: str, options: str) -> None:
    """The engine process that `Engine` starts."""
    from vllm import LLM, SamplingParams

    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 30,
        "distributed_executor_backend": "uni",
        "max_num_seqs": 64,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    engine = LLM(model, tokenizer=tokenizer, **(settings | json.loads(options)))
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    cache = engine.llm_engine.vllm_config.cache_config
    counts = getattr(scheduler, "counts", None)
    print(f"answer {cache.num_gpu_blocks * cache.block_size} 0", flush=True)
    for line in sys.stdin:
        tiers, num_tokens = json.loads(line)
        arguments = [
            {"extra_args": {"chorus_tier": tier, "chorus_decoding": "plain"}} if tier else {} for tier in tiers
        ]
        parameters = [
            SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **more) for more in arguments
        ]
        prompts = [{"prompt_token_ids": [2 + idx, *range(3, 2 + PROMPT_TOKENS)]} for idx in range(len(tiers))]
        # Not timed: threads of the other engine keep spinning for a while.
        engine.generate(prompts, parameters, use_tqdm=False)
        mixed_before = counts.mixing_s if counts else 0.0
        start = time.perf_counter()
        engine.generate(prompts, parameters, use_tqdm=False)
        seconds = time.perf_counter() - start
        mixing_s = counts.mixing_s - mixed_before if counts else 0.0
        print(f"answer {len(tiers) * num_tokens / seconds} {mixing_s / seconds}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--engine"]:
        serve_engine(*sys.argv[2:])
    else:
        main()
