"""Reproduces q0 at small scale: `python -m bench.faithful WIKITEXT-2 --out DIR`. Resumes if killed; `--report` only prints tables.

Compares q0 with one long run, independent models, no distillation, flat weight decay and chained independent models, at matched
epochs and numbers of members, over three seeds, on articles not used for training or fitting. Members and weights are fitted on
the fitness and selection articles only, by the same code (`prior/`) for every method. Intervals are 95 %, from a paired bootstrap
over documents of losses averaged over seeds. `seeds` counts the seeds in which the difference has the sign of the mean.
"""

import argparse
import fcntl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench import wikitext
from chorus.prior.selection import cross_folds, nested_path
from chorus.prior.weights import fit_weights, mixture_losses
from chorus.train.run import Run, member_name

SEEDS = (0, 1, 2)
CYCLES = 15  # per trajectory of q0, which has three
EPOCHS = 6 * CYCLES
MATCHED = 6  # members in compared mixtures
_Q0 = {"trajectories": 3, "cycles": CYCLES, "epochs_per_cycle": 2}
_INDEPENDENT = {"trajectories": 1, "cycles": EPOCHS // 6, "epochs_per_cycle": 6, "restart": True}
METHODS: dict[str, dict[str, object]] = {
    "q0": _Q0,
    "independent models": {**_INDEPENDENT, "distil_alpha": 0.0},
    "q0 without distillation": {**_Q0, "distil_alpha": 0.0},
    "chained independent models": _INDEPENDENT,
    # The mean of the cyclic decay: 0.7 + 0.3 / 2 of its peak.
    "q0 with flat weight decay": {**_Q0, "weight_decay": 0.85 * wikitext.BASE.weight_decay, "weight_decay_floor": 1.0},
    "q0, one trajectory": {"trajectories": 1, "cycles": 3 * CYCLES, "epochs_per_cycle": 2},
    "one long run": {"trajectories": 1, "cycles": 1, "epochs_per_cycle": EPOCHS},
}
# Fewer and longer independent models, to find how many epochs these need to match q0.
EXTRA_METHODS: dict[str, dict[str, object]] = {
    "longer independent models": {**_INDEPENDENT, "cycles": EPOCHS // 10, "epochs_per_cycle": 10, "distil_alpha": 0.0},
}
Losses = NDArray[np.float64]


def main() -> None:
    """Train what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with valid.txt and test.txt of WikiText-2")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and results.json")
    parser.add_argument("--report", action="store_true", help="do not train; print finished runs")
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *EXTRA_METHODS], help="train only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="train these, in this order")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.report:
        for methods in (METHODS, EXTRA_METHODS):
            for seed in arguments.seeds:
                for method in (method for method in methods if method in arguments.methods):
                    train(arguments.data, arguments.out, seed, method)
    from bench.faithful_report import report  # here, because it imports this module

    report(arguments.out)


def train(data: Path, out: Path, seed: int, method: str) -> None:
    """Train and score one method with one seed, unless another process is doing so."""
    directory = run_directory(out, seed, method)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_suffix(".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        started = time.monotonic()
        # An extra method has its own seeds, so that its models differ from those of METHODS.
        own_seed = seed + 100 * [*METHODS, *EXTRA_METHODS].index(method) if method in EXTRA_METHODS else seed
        run = wikitext.prepared_run(data, directory, seed=own_seed, **{**METHODS, **EXTRA_METHODS}[method])
        wikitext.train_run(run)
        for split in ("fitness", "selection", "test"):
            wikitext.scores(run, split)
        print(f"seed {seed}: {method}, {time.monotonic() - started:.0f} s", flush=True)


def run_directory(out: Path, seed: int, method: str) -> Path:
    """Directory of the run of a method with a seed."""
    return out / f"seed-{seed}" / method.replace(" ", "-").replace(",", "")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One method with one seed: its run, and its members' likelihoods (M, N) of the held-out articles."""

    run: Run
    fitness_MN: NDArray[np.float32]
    selection_MN: NDArray[np.float32]
    test_MN: NDArray[np.float32]
    cache: dict[object, Any] = field(default_factory=dict, repr=False)
    """Results that several tables share."""

    def first(self, cycles: int) -> "Trained":
        """The members of the first `cycles` cycles of every trajectory."""
        if ("first", cycles) in self.cache:
            known: Trained = self.cache["first", cycles]
            return known
        count = cycles * self.run.settings.trajectories
        fitness, selection, test = self.fitness_MN[:count], self.selection_MN[:count], self.test_MN[:count]
        self.cache["first", cycles] = Trained(run=self.run, fitness_MN=fitness, selection_MN=selection, test_MN=test)
        return self.first(cycles)

    def alone(self) -> "Trained":
        """The members of the first trajectory."""
        rows = [idx for idx, (trajectory, _) in enumerate(wikitext.members(self.run)) if trajectory == 0]
        fitness, selection, test = (part[rows] for part in self.parts())
        return Trained(run=self.run, fitness_MN=fitness, selection_MN=selection, test_MN=test)

    def chosen(self, budget: int) -> tuple[tuple[int, ...], Losses]:
        """At most `budget` members, chosen and weighted without the test split, and their mixture's loss on each test token."""
        if budget in self.cache:
            known: tuple[tuple[int, ...], Losses] = self.cache[budget]
            return known
        num_fitness, num_selection = self.fitness_MN.shape[1], self.selection_MN.shape[1]
        heldout_MN = np.concatenate([self.fitness_MN, self.selection_MN], axis=1)
        members = nested_path(heldout_MN, cross_folds(num_fitness, num_selection), budget)[-1].members
        weights = fit_weights(heldout_MN[list(members)]).weights_M
        self.cache[budget] = members, np.asarray(mixture_losses(self.test_MN[list(members)], weights))
        return self.chosen(budget)

    def parts(self) -> tuple[NDArray[np.float32], ...]:
        """The likelihoods on fitness, selection and test."""
        return self.fitness_MN, self.selection_MN, self.test_MN

    def losses(self, budget: int) -> Losses:
        """The losses of `chosen`."""
        return self.chosen(budget)[1]

    def uniform(self) -> Losses:
        """Test losses of all members with equal weights."""
        return np.asarray(-np.log(self.test_MN.astype(np.float64).mean(axis=0)))

    def fitted(self) -> Losses:
        """Test losses of all members with weights fitted on the fitness articles, as in q0."""
        return np.asarray(mixture_losses(self.test_MN, fit_weights(self.fitness_MN).weights_M))


def finished(directory: Path) -> bool:
    """Whether a run is trained and its last member scored on the last split."""
    if not (directory / "training" / "run.json").exists():
        return False
    settings = Run.load(directory).settings
    last = member_name(settings.trajectories - 1, settings.cycles - 1)
    return (directory / "scores" / "test" / f"{last}.npy").exists()


def load(directory: Path) -> Trained:
    """A finished run with its scores."""
    run = Run.load(directory)
    fitness, selection, test = (wikitext.scores(run, split) for split in ("fitness", "selection", "test"))
    return Trained(run=run, fitness_MN=fitness, selection_MN=selection, test_MN=test)


if __name__ == "__main__":
    main()
