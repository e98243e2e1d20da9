"""Finds how to spend a budget of epochs: `python -m bench.recipes WIKITEXT-2 --out DIR`. Resumes if killed; `--report` only prints.

Trains a few long populations in the setup of `bench/wikitext.py`. Their first trajectories and first cycles serve as smaller
populations, which differ from separately trained ones only in batch size and noise. Each way to spend a budget is ranked by the
*mixture's* loss: at most K members, chosen and weighted on one of two held-out splits and evaluated on the other, both ways. The
test split is not used. `train/recipes.py` is based on this.
"""

import argparse
import fcntl
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench import wikitext
from chorus.prior.selection import cross_folds, nested_path
from chorus.train.run import Run

BUDGETS = (6, 12, 24, 36, 60, 90)
MEMBERS = 6
SEED = 100  # not used by bench.faithful
_BASE = {"trajectories": 3, "cycles": 15, "epochs_per_cycle": 2}
POPULATIONS: dict[str, dict[str, object]] = {
    "cycles of 2": _BASE,
    "cycles of 2, one long trajectory": {**_BASE, "trajectories": 1, "cycles": 45},
    "cycles of 4": {**_BASE, "cycles": 8, "epochs_per_cycle": 4},
    "cycles of 2, burn-in 4": {**_BASE, "cycles": 13, "burn_in": 4},
    "cycles of 2, teacher at saturation": {**_BASE, "distil_after": "saturation"},
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One way to spend a number of epochs, and its losses."""

    trajectories: int
    cycles: int
    epochs: int
    single: float
    """Loss of the best member."""
    mixture: float


def main() -> None:
    """Train what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with valid.txt and test.txt of WikiText-2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", action="store_true", help="do not train; print finished runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in POPULATIONS if not arguments.report else ():
        train(arguments.data, arguments.out / name.replace(" ", "-").replace(",", ""), POPULATIONS[name])
    report(arguments.out)


def train(data: Path, directory: Path, changes: dict[str, object]) -> None:
    """Train and score one population, unless another process is doing so."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_suffix(".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        started = time.monotonic()
        run = wikitext.prepared_run(data, directory, seed=SEED, **changes)
        wikitext.train_run(run)
        for split in ("fitness", "selection"):
            wikitext.scores(run, split)
        print(f"{directory.name}: {time.monotonic() - started:.0f} s", flush=True)


def report(out: Path) -> None:
    """Print the trained ways to spend each budget, best first."""
    ways: dict[int, list[tuple[str, Result]]] = defaultdict(list)
    for name in POPULATIONS:
        directory = out / name.replace(" ", "-").replace(",", "")
        if not (directory / "training" / "run.json").exists() or not Run.load(directory).finished:
            continue
        for result in sub_populations(Run.load(directory)):
            budget = min(BUDGETS, key=lambda budget: abs(budget - result.epochs))
            if 0.9 * budget <= result.epochs <= budget:
                ways[budget].append((name, result))
    print("| budget | way | trajectories x cycles | epochs | best single | mixture |\n|--:|---|---|--:|--:|--:|")
    for budget in BUDGETS:
        for name, result in sorted(ways[budget], key=lambda way: way[1].mixture):
            print(
                f"| {budget} | {name} | {result.trajectories} x {result.cycles} | {result.epochs} | {result.single:.4f} | "
                f"{result.mixture:.4f} |"
            )


def sub_populations(run: Run) -> list[Result]:
    """Results of the first trajectories and first cycles of a run, for the numbers of epochs near a budget."""
    settings, members = run.settings, wikitext.members(run)
    fitness_MN, selection_MN = wikitext.scores(run, "fitness"), wikitext.scores(run, "selection")
    both_MN: NDArray[np.float32] = np.concatenate([fitness_MN, selection_MN], axis=1)
    folds = cross_folds(fitness_MN.shape[1], selection_MN.shape[1])
    results = []
    for trajectories in range(1, settings.trajectories + 1):
        for cycles in range(1, settings.cycles + 1):
            epochs = trajectories * (settings.burn_in + cycles * settings.epochs_per_cycle)
            if not any(0.9 * budget <= epochs <= budget for budget in BUDGETS):
                continue
            rows = [idx for idx, (t, c) in enumerate(members) if t < trajectories and c < cycles]
            path = nested_path(both_MN[rows], folds, min(MEMBERS, len(rows)))
            results.append(
                Result(
                    trajectories=trajectories,
                    cycles=cycles,
                    epochs=epochs,
                    single=path[0].loss,
                    mixture=min(choice.loss for choice in path),
                )
            )
    return results


if __name__ == "__main__":
    main()
