"""Tokens/s of each decoding mode against plain decoding, in turn, in one engine.

    python -m bench.decoding POPULATION [--streams 1 4 16 64] [--repeats 5] [--tokens 128] [--tier NAME]

Requests of the largest tier, at temperature 1 and greedy, on excerpts of the standard library's source. Medians after a warm-up.
`accepted` is the fraction of drafts that were accepted. The last column is the highest speed-up possible for `sampled`, by the
step costs that the engine learned in the same run: a sampled step runs one pass per drawn member and, in the long run, as many
rows as a plain step.
"""

import argparse
import os
import random
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

from chorus.population import manifest
from chorus.population.corpus import read_documents
from chorus.population.tokens import TextTokenizer
from chorus.population.wire import StepCosts

MODES = {1.0: ("plain", "sampled", "speculative", "auto"), 0.0: ("plain", "speculative", "auto")}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("population", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tier", help="default: the largest")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.0], choices=list(MODES))
    arguments = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM

    engine = LLM(
        str(arguments.population), dtype=arguments.dtype, block_size=32, kv_cache_memory_bytes=1 << 30,
        distributed_executor_backend="uni", max_num_seqs=max(64, *arguments.streams),
    )  # fmt: skip
    population = manifest.load(arguments.population)
    tier = population.tier(arguments.tier) if arguments.tier else population.tiers[-1]
    tokenizer = TextTokenizer.load(arguments.population)
    texts = [tokenizer.encode_document(each.text)[:32] for each in islice(read_documents("stdlib"), 256)]
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    print(
        f"{tier.name}: {tier.budget} members; tokens/s, medians of {arguments.repeats}; in brackets: relative to plain"
    )
    print("| temperature | requests | plain | sampled | speculative | accepted | auto | limit of sampled |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for temperature in arguments.temperatures:
        for streams in arguments.streams:
            speeds: dict[str, list[float]] = {mode: [] for mode in MODES[temperature]}
            for repeat in range(arguments.repeats + 1):
                prompts = random.sample(texts, streams)
                for mode in MODES[temperature]:
                    speed = run(engine, mode, tier.name, temperature, prompts, arguments.tokens)
                    if repeat:
                        speeds[mode].append(speed)
            medians = {mode: statistics.median(values) for mode, values in speeds.items()}
            cells = {mode: f"{value:.1f} ({value / medians['plain']:.2f})" for mode, value in medians.items()}
            max_gain = (
                max_sampled_gain(scheduler._step_cost.parts(), tier.weights, streams) if "sampled" in medians else None
            )
            print(
                f"| {temperature:g} | {streams} | {medians['plain']:.1f} | {cells.get('sampled', '')} | {cells['speculative']} "
                f"| {scheduler._chooser.acceptance.rate(0):.2f} | {cells['auto']} | {f'{max_gain:.2f}' if max_gain else ''} |",
                flush=True,
            )


def run(engine: Any, mode: str, tier: str, temperature: float, prompts: list[list[int]], tokens: int) -> float:
    """Tokens per second of these requests, run together."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=temperature, max_tokens=tokens, ignore_eos=True,
        extra_args={"chorus_tier": tier, "chorus_decoding": mode},
    )  # fmt: skip
    began = time.perf_counter()
    engine.generate([{"prompt_token_ids": each} for each in prompts], parameters, use_tqdm=False)
    return len(prompts) * tokens / (time.perf_counter() - began)


def max_sampled_gain(costs: StepCosts, weights: tuple[float, ...], streams: int) -> float:
    """Time of a plain step over that of a sampled step, from the learned costs of a step, request, member and row."""
    fixed = costs.step + streams * costs.request + streams * len(weights) * costs.row
    drawn = sum(1 - (1 - weight) ** streams for weight in weights)
    return (fixed + len(weights) * costs.member) / (fixed + drawn * costs.member)


if __name__ == "__main__":
    main()
