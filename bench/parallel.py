"""Tokens/s on two ranks: every member sharded over both, against whole members on each. Per tier, in turn, in one run.

python -m bench.random_population POPULATION
python -m bench.parallel POPULATION [--concurrency 1 16] [--repeats 5] [--tokens 64]
"""

import argparse
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.engine import Engine
from chorus.population import manifest
from chorus.serve.engine.parallel import SWITCH


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("population", type=Path)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="tokens that each request generates")
    arguments = parser.parse_args()
    two_ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    engines = [
        Engine(arguments.population, tokenizer=arguments.population, **two_ranks, additional_config={SWITCH: whole})
        for whole in (False, True)
    ]
    table = Table("requests", "tier", box=None)
    for heading in ("sharded, tokens/s", "whole members, tokens/s", "ratio"):
        table.add_column(heading, justify="right")
    try:
        for concurrency in arguments.concurrency:
            for tier in manifest.load(arguments.population).tiers:
                speeds = [
                    tuple(engine.run([tier.name] * concurrency, arguments.tokens)[0] for engine in engines)
                    for _ in range(arguments.repeats + 1)
                ][1:]
                ratios = [whole / sharded for sharded, whole in speeds]
                sharded, whole = (statistics.median(column) for column in zip(*speeds, strict=True))
                spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
                table.add_row(str(concurrency), tier.name, f"{sharded:.0f}", f"{whole:.0f}", spread)
    finally:
        for engine in engines:
            engine.stop()
    Console().print(table)


if __name__ == "__main__":
    main()
