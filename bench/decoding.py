"""What one sampled member per token saves: tokens/s of `plain`, `sampled` and `auto` decoding, in turn, in one engine.

    python -m bench.random_population POPULATION
    python -m bench.decoding POPULATION [--streams 1 4 16] [--repeats 5] [--tokens 128]

Requests of the dearest tier at temperature 1. Medians of the repeats; the first is a warm-up. The last column is the limit by the
step costs that the engine learned in the same run: a sampled step runs one pass for each member that is drawn, and in the long run
the same rows as a plain one.
"""

import argparse
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

from chorus.population import manifest

WAYS = ("plain", "sampled", "auto")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("population", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM

    engine = LLM(
        str(arguments.population), dtype=arguments.dtype, block_size=32, kv_cache_memory_bytes=1 << 30,
        distributed_executor_backend="uni", max_num_seqs=max(64, *arguments.streams),
    )  # fmt: skip
    tier = manifest.load(arguments.population).tiers[-1]
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    print(f"{tier.name}: {tier.budget} members; tokens/s, medians of {arguments.repeats}")
    print("| requests | plain | sampled | auto | sampled / plain | auto / plain | limit by step costs |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for streams in arguments.streams:
        speeds: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(arguments.repeats + 1):
            for way in WAYS:
                speed = run(engine, way, streams, arguments.tokens)
                if repeat:
                    speeds[way].append(speed)
        plain, sampled, auto = (statistics.median(speeds[way]) for way in WAYS)
        bound = limit(scheduler._step_cost.parts(), tier.weights, streams)
        ratios = f"**{sampled / plain:.2f}** | {auto / plain:.2f} | {bound:.2f}"
        print(f"| {streams} | {plain:.1f} | {sampled:.1f} | {auto:.1f} | {ratios} |", flush=True)


def run(engine: Any, way: str, streams: int, tokens: int) -> float:
    """Tokens per second of that many requests at once."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=1, max_tokens=tokens, ignore_eos=True, extra_args={"chorus_decoding": way})
    prompts = [{"prompt_token_ids": [random.randrange(2, 300) for _ in range(16)]} for _ in range(streams)]
    began = time.perf_counter()
    engine.generate(prompts, parameters, use_tqdm=False)
    return streams * tokens / (time.perf_counter() - began)


def limit(parts: dict[str, float], weights: tuple[float, ...], streams: int) -> float:
    """Plain step / sampled step by what a step, request, member and row cost."""
    fixed = parts["step"] + streams * parts["request"] + streams * len(weights) * parts["row"]
    drawn = sum(1 - (1 - weight) ** streams for weight in weights)
    return (fixed + len(weights) * parts["member"]) / (fixed + drawn * parts["member"])


if __name__ == "__main__":
    main()
