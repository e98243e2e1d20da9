"""Which constants of the member cap and of demand matter: loss and deadlines in virtual time, with each of them changed in turn.

    python -m bench.member_cap POPULATION [--seeds 2] [--seconds 25]

The gateway's own admission in front of an engine whose steps take as long as measured ones. The same on every machine.
"""

import argparse
import asyncio
import math
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from chorus.population import manifest
from chorus.population.manifest import Population
from chorus.serve.expected_loss import expected_loss
from chorus.serve.gateway.admission import demand, member_cap
from chorus.serve.gateway.admission.admission import Limits
from tests.serve.gateway.virtual import Costs, Outcome, World, in_virtual_time

ROWS_AND_MEMBERS = Costs(step_s=0.0019, member_s=0.0011, row_s=0.00004, prompt_row_s=0.000005, prompt_s=0.002)
MEMBERS = Costs(step_s=0.003, member_s=0.005, row_s=0.00002, prompt_row_s=0.000004)
CASES = [
    *[(ROWS_AND_MEMBERS, factor, is_bursty) for factor in (1.0, 1.5, 2.0) for is_bursty in (False, True)],
    *[(MEMBERS, factor, False) for factor in (1.2, 1.8)],
]
VARIANTS: dict[str, tuple[ModuleType, str, float] | None] = {
    "as it is": None,
    "rises at any backlog": (member_cap, "_MAX_BACKLOG_TO_RISE", 1.0),
    "rises at a quarter of the slack": (member_cap, "_MAX_BACKLOG_TO_RISE", 0.25),
    "risk over 0.25 s": (member_cap, "_HORIZON_S", 0.25),
    "risk over 3 s": (member_cap, "_HORIZON_S", 3.0),
    "demand over 1 budget": (demand, "_MEMORY_BUDGETS", 1.0),
    "demand over 3 budgets": (demand, "_MEMORY_BUDGETS", 3.0),
    "rates since the first request": (demand, "_MIN_OBSERVED", 0.01),
    "rates over the whole memory": (demand, "_MIN_OBSERVED", 1.0),
}
BURST = 8


async def under_load(
    population: Population, costs: Costs, factor: float, is_bursty: bool, seed: int, seconds: float
) -> list[Outcome]:
    """Requests at a multiple of the largest tier's capacity, each with twice the time that it takes alone."""
    world = World(population, costs=costs, limits=Limits(max_sequences=16), seed=seed)
    working = world.working()
    largest = max(population.tiers, key=lambda tier: tier.budget).name
    alone_s = statistics.median(each.seconds for each in await world.closed_loop(1, 3, budget_s=None, tier=largest))
    rate = factor * len(await world.closed_loop(16, 8, budget_s=None, tier=largest)) / 8
    if is_bursty:
        end_at, tasks = time.perf_counter() + seconds, []
        while time.perf_counter() < end_at:
            tasks += [asyncio.create_task(world.send(budget_s=2 * alone_s)) for _ in range(BURST)]
            await asyncio.sleep(world.rng.expovariate(rate / BURST))
        outcomes = list(await asyncio.gather(*tasks))
    else:
        outcomes = await world.arrivals(rate, seconds, budget_s=2 * alone_s)
    for task in working:
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)
    return outcomes


def figures(outcomes: list[Outcome], losses: dict[int, float]) -> tuple[float, float, float]:
    """Part of all offered requests in time; mean expected loss and members of those."""

    def loss(members: float) -> float:
        below, above = expected_loss(math.floor(members), losses), expected_loss(math.ceil(members), losses)
        return below + (members - math.floor(members)) * (above - below)

    in_time = [each for each in outcomes if each.is_in_time]
    return (
        len(in_time) / len(outcomes),
        statistics.fmean(loss(each.members) for each in in_time),
        statistics.fmean(each.members for each in in_time),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("population", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=25)
    options = parser.parse_args()
    population = manifest.load(options.population)
    losses = {tier.budget: tier.test_loss.nats for tier in population.tiers if tier.test_loss is not None}
    if not losses:
        parser.error(f"the tiers of {options.population} have no test loss; run `chorus prior fit` first.")
    clock = pytest.MonkeyPatch()
    print("| variant | in time | loss, nats | members |\n|---|--:|--:|--:|")
    for name, change in VARIANTS.items():
        with clock.context() as patch:
            if change is not None:
                patch.setattr(*change)
            found = [
                figures(in_virtual_time(clock, under_load(population, *case, seed, options.seconds)), losses)
                for case in CASES
                for seed in range(1, options.seeds + 1)
            ]
        in_time, loss, members = (statistics.fmean(column) for column in zip(*found, strict=True))
        print(f"| {name} | {in_time:.2%} | {loss:.4f} | {members:.2f} |", flush=True)


if __name__ == "__main__":
    main()
