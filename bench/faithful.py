"""Does q0 hold at small scale? `python -m bench.faithful WIKITEXT-2 --out DIR`; killed, it goes on; `--report` prints the tables.

q0 against one long run, independent models, no distillation, flat weight decay, and chained independent models: at matched epochs
and matched numbers of members, over three seeds, on articles that nothing was trained or fitted on. Members are chosen and
weighed on the fitness and selection articles alone, by the same code for every method (`prior/`). Intervals: 95 %, documents
resampled, paired, losses averaged over the seeds; `seeds` counts those in which the difference has the sign of the mean.
"""

import argparse
import fcntl
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench import wikitext
from population.tokens import TokenSplit, split_path
from prior.bootstrap import Bootstrap
from prior.selection import cross_folds, nested_path
from prior.weights import fit_weights, mixture_losses
from train.run import Run, member_name
from train.snapshot import load_member

SEEDS = (0, 1, 2)
EPOCHS = 36
MATCHED = 6  # members
_Q0 = {"trajectories": 3, "cycles": 6, "epochs_per_cycle": 2}
_INDEPENDENT = {"trajectories": 1, "cycles": 6, "epochs_per_cycle": 6, "restart": True}
METHODS: dict[str, dict[str, object]] = {
    "q0": _Q0,
    "independent models": {**_INDEPENDENT, "distil_alpha": 0.0},
    "q0 without distillation": {**_Q0, "distil_alpha": 0.0},
    "chained independent models": _INDEPENDENT,
    # The mean of the cyclic decay, 0.7 + 0.3 / 2 of its peak.
    "q0 with flat weight decay": {**_Q0, "weight_decay": 0.85 * wikitext.BASE.weight_decay, "weight_decay_floor": 1.0},
    "q0, one trajectory": {"trajectories": 1, "cycles": 18, "epochs_per_cycle": 2},
    "one long run": {"trajectories": 1, "cycles": 1, "epochs_per_cycle": EPOCHS},
}
# For the question how many epochs independent models need to get where q0 is: more of them, and longer ones.
FURTHER: dict[str, dict[str, object]] = {
    "four more independent models": {**_INDEPENDENT, "cycles": 4, "distil_alpha": 0.0},
    "independent models, 4 x 9": {**_INDEPENDENT, "cycles": 4, "epochs_per_cycle": 9, "distil_alpha": 0.0},
}
Losses = NDArray[np.float64]


def main() -> None:
    """Train what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with valid.txt and test.txt of WikiText-2")
    parser.add_argument("--out", type=Path, required=True, help="where the runs and results.json go")
    parser.add_argument("--report", action="store_true", help="only print what is finished")
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *FURTHER], help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="in this order")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.report:
        for methods in (METHODS, FURTHER):
            for seed in arguments.seeds:
                for method in (method for method in methods if method in arguments.methods):
                    train(arguments.data, arguments.out, seed, method)
    report(arguments.out)


def train(data: Path, out: Path, seed: int, method: str) -> None:
    """Train and score one method under one seed, unless another process is at it."""
    directory = place(out, seed, method)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_suffix(".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        started = time.monotonic()
        # A further method draws its own models: none of them is one of the first six.
        own_seed = seed + 100 * [*METHODS, *FURTHER].index(method) if method in FURTHER else seed
        run = wikitext.prepared_run(data, directory, seed=own_seed, **{**METHODS, **FURTHER}[method])
        wikitext.train_run(run)
        for split in ("fitness", "selection", "test"):
            wikitext.scores(run, split)
        print(f"seed {seed}: {method}, {time.monotonic() - started:.0f} s", flush=True)


def place(out: Path, seed: int, method: str) -> Path:
    """Where the run of a method under a seed lies."""
    return out / f"seed-{seed}" / method.replace(" ", "-").replace(",", "")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One method under one seed: what its members make of the held-out articles."""

    run: Run
    fitness_MN: NDArray[np.float32]
    selection_MN: NDArray[np.float32]
    test_MN: NDArray[np.float32]
    cache: dict[object, Any] = field(default_factory=dict, repr=False)
    """Of what several tables ask for."""

    def first(self, cycles: int) -> "Trained":
        """What was there after so many cycles of every trajectory."""
        if ("first", cycles) in self.cache:
            found: Trained = self.cache["first", cycles]
            return found
        count = cycles * self.run.settings.trajectories
        fitness, selection, test = self.fitness_MN[:count], self.selection_MN[:count], self.test_MN[:count]
        self.cache["first", cycles] = Trained(run=self.run, fitness_MN=fitness, selection_MN=selection, test_MN=test)
        return self.first(cycles)

    def alone(self) -> "Trained":
        """The members of its first trajectory."""
        rows = [idx for idx, (trajectory, _) in enumerate(wikitext.members(self.run)) if trajectory == 0]
        fitness, selection, test = (part[rows] for part in self.parts())
        return Trained(run=self.run, fitness_MN=fitness, selection_MN=selection, test_MN=test)

    def chosen(self, budget: int) -> tuple[tuple[int, ...], Losses]:
        """At most `budget` members and the mixture's loss on each test token; test plays no part in the choice."""
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
        """The three matrices."""
        return self.fitness_MN, self.selection_MN, self.test_MN

    def losses(self, budget: int) -> Losses:
        """As `chosen`, the losses alone."""
        return self.chosen(budget)[1]

    def uniform(self) -> Losses:
        """All members under equal weights."""
        return np.asarray(-np.log(self.test_MN.astype(np.float64).mean(axis=0)))

    def fitted(self) -> Losses:
        """All members under weights fitted on the fitness articles, as q0 fits them."""
        return np.asarray(mixture_losses(self.test_MN, fit_weights(self.fitness_MN).weights_M))


def report(out: Path) -> None:
    """Print the tables of what is finished, and write results.json."""
    methods = [*METHODS, *FURTHER]
    seeds = [
        {method: load(place(out, seed, method)) for method in methods if finished(place(out, seed, method))}
        for seed in SEEDS
    ]
    tables = Tables([seed for seed in seeds if "q0" in seed])
    tables.methods()
    tables.budgets()
    tables.epochs()
    tables.checks()
    (out / "results.json").write_text(json.dumps(tables.results, indent=2) + "\n", encoding="utf-8")


def finished(directory: Path) -> bool:
    """Whether a run was trained and its last member scored on the last split."""
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


Seed = dict[str, Trained]
Of = Callable[[Seed], Losses]
"""Losses on the test tokens, of one seed; KeyError where it needs a method that is not finished."""


class Tables:
    """Everything that is printed: means over seeds, and paired differences with their intervals."""

    def __init__(self, seeds: list[Seed]) -> None:
        self.seeds = seeds
        self.bootstrap = Bootstrap(wikitext.scored_offsets(seeds[0]["q0"].run, "test"))
        self.results: dict[str, object] = {}

    def each(self, of: Of) -> dict[int, Losses]:
        """By seed, where its methods are finished."""
        found = {}
        for idx, seed in enumerate(self.seeds):
            with suppress(KeyError):
                found[idx] = of(seed)
        return found

    def mean(self, of: Of) -> float:
        """Nats per token, over all seeds that have it."""
        return float(np.mean([losses.mean() for losses in self.each(of).values()]))

    def difference(self, name: str, ours: Of, theirs: Of) -> str:
        """`-0.0310 [-0.0350, -0.0270], 3 of 3`: below zero, ours is better."""
        a, b = self.each(ours), self.each(theirs)
        common = sorted(a.keys() & b.keys())
        if not common:
            return "not finished"
        paired = [np.mean([losses[idx] for idx in common], axis=0) for losses in (a, b)]
        found = self.bootstrap.difference(*paired)
        by_seed = [float((a[idx] - b[idx]).mean()) for idx in common]
        agreeing = sum(np.sign(value) == np.sign(found.nats) for value in by_seed)
        self.results[name] = {"nats": found.nats, "low": found.low, "high": found.high, "seeds": by_seed}
        return f"{found.nats:+.4f} [{found.low:+.4f}, {found.high:+.4f}], {agreeing} of {len(common)}"

    def methods(self) -> None:
        """Every method at the same epochs and the same number of members."""
        print(
            f"| {EPOCHS} epochs each | members | best single | K = {MATCHED} | q0 less this, K = {MATCHED} |\n|---|--:|--:|--:|---|"
        )
        for method in METHODS:
            single, several = matched(method, 1), matched(method, MATCHED)
            if not self.each(single):
                continue
            count = len(next(seed for seed in self.seeds if method in seed)[method].test_MN)
            versus = self.difference(f"q0 less {method}", matched("q0", MATCHED), several) if method != "q0" else ""
            shown = f"{self.mean(several):.4f}" if count > 1 else "-"
            print(f"| {method} | {count} | {self.mean(single):.4f} | {shown} | {versus} |")
        alone = self.difference("q0 less one long run, K = 1", matched("q0", 1), matched("one long run", 1))
        print(f"\nq0's best single less the long run: {alone}\n")

    def budgets(self) -> None:
        """Losses against K."""
        print("| K of q0's 18 | loss | less the row above |\n|--:|--:|---|")
        for before, size in ((0, 1), (1, 2), (2, 4), (4, 6), (6, 12), (12, 18)):
            step = (
                self.difference(f"K = {size} less {before}", matched("q0", size), matched("q0", before))
                if before
                else ""
            )
            print(f"| {size} | {self.mean(matched('q0', size)):.4f} | {step} |")

    def epochs(self) -> None:
        """Losses against epochs, and item 5: how many fewer q0 needs."""
        print(
            f"\n| epochs | q0, K = {MATCHED} | all, equal weights | last singles | one trajectory, K = {MATCHED} | independent |"
        )
        print("|--:|--:|--:|--:|--:|--:|")
        curves: dict[str, dict[int, float]] = {"q0": {}, "q0, one trajectory": {}}
        for count in range(1, 11):
            epochs, ours = 6 * count, "| | | | "
            if epochs <= EPOCHS:
                for method, cycles in (("q0", count), ("q0, one trajectory", 3 * count)):
                    curves[method][epochs] = self.mean(
                        lambda seed, m=method, c=cycles: seed[m].first(c).losses(MATCHED)
                    )  # type: ignore[misc]
                uniform = self.mean(lambda seed, c=count: seed["q0"].first(c).uniform())  # type: ignore[misc]
                q0, one = (curve[epochs] for curve in curves.values())
                ours = f"| {q0:.4f} | {uniform:.4f} | {self.mean(single('q0', count - 1)):.4f} | {one:.4f} "
            print(f"| {epochs} {ours}| {self.mean(lambda seed, c=count: independent(seed, c)):.4f} |")  # type: ignore[misc]
        print("\n| | reaches independent models of | with loss | after epochs | times fewer |\n|---|--:|--:|--:|--:|")
        for method, curve in curves.items():
            for epochs in (36, 48, 60):
                # Over the seeds of this method alone, so that both means are of the same ones.
                theirs = self.mean(lambda seed, m=method, c=epochs // 6: (seed[m], independent(seed, c))[1])  # type: ignore[misc]
                reached = next((own for own, loss in curve.items() if loss <= theirs), None)
                times = f"{epochs / reached:.1f}" if reached else "-"
                print(f"| {method} | {epochs} epochs | {theirs:.4f} | {reached or 'not by 36'} | {times} |")
                self.results[f"5, {method}, {epochs}"] = {"loss": theirs, "epochs of q0": reached}
        print()

    def checks(self) -> None:
        """The other items of the list that a faithful reproduction must show."""
        q0, plain, one = "q0", "q0 without distillation", "q0, one trajectory"
        chained, alone = "chained independent models", "independent models"
        rows: list[tuple[str, Of, Of]] = [
            (f"1. mixture of {MATCHED} less best single", matched(q0, MATCHED), matched(q0, 1))
        ]
        for cycle in (1, 3, 5):
            rows.append((f"2. distillation, single members of cycle {cycle}", single(q0, cycle), single(plain, cycle)))
        for idx in (1, 2, 5):
            rows.append((f"2. chained model {idx} less the independent one", single(chained, idx), single(alone, idx)))
        rows += [
            (f"2. distillation, mixture of {MATCHED}", matched(q0, MATCHED), matched(plain, MATCHED)),
            (
                f"2. chained less independent, mixture of {MATCHED}",
                matched(chained, MATCHED),
                matched(alone, MATCHED),
            ),
            (f"3. one model of {EPOCHS} epochs less one of 6", single("one long run", 0), single(alone, 0)),
            ("3. one trajectory: its last member less that of cycle 5", single(one, 17), single(one, 5)),
            (
                "3. its mixture of all 18 less that of the first 6",
                everything(one),
                lambda s: s[one].first(6).losses(18),
            ),
            ("4. linear less logit averaging, same members", lambda s: pooled(s[q0])[0], lambda s: pooled(s[q0])[1]),
            ("6. fitted less equal weights, all 18, test", lambda s: s[q0].fitted(), lambda s: s[q0].uniform()),
            (
                "7. three trajectories of 12 epochs less one of 12, K = 6",
                matched(q0, 6),
                lambda s: s[q0].alone().losses(6),
            ),
            ("7. three trajectories of 12 epochs less one of 36, K = 6", matched(q0, 6), matched(one, 6)),
        ]
        print("| item | nats [95 %], seeds of that sign |\n|---|---|")
        for name, ours, theirs in rows:
            print(f"| {name} | {self.difference(name, ours, theirs)} |")
        gains = [fitted_gain(seed[q0].fitness_MN) for seed in self.seeds]
        print(
            f"| 6. fitted less equal weights on the text that is fitted | {', '.join(f'{gain:+.4f}' for gain in gains)} |"
        )
        within, across = np.mean([divergences(seed[q0].run) for seed in self.seeds], axis=0)
        print(f"| 7. KL of neighbours in a trajectory; across trajectories | {within:.3f}; {across:.3f} |")
        self.results["KL"] = {"within": within, "across": across}


def independent(seed: Seed, count: int) -> Losses:
    """The mixture of the first so many independent models, all of them weighed on held-out articles."""
    key = "independent", count
    if key in seed["independent models"].cache:
        return np.asarray(seed["independent models"].cache[key])
    ours, more = seed["independent models"], seed["four more independent models"] if count > 6 else None
    if more is None:
        return ours.first(count).losses(count)
    parts = zip(ours.parts(), more.first(count - 6).parts(), strict=True)
    fitness, selection, test = (np.concatenate(pair) for pair in parts)
    ours.cache[key] = Trained(run=ours.run, fitness_MN=fitness, selection_MN=selection, test_MN=test).losses(count)
    return independent(seed, count)


def matched(method: str, budget: int) -> Of:
    """A method's mixture of so many members, chosen and weighed on held-out articles."""
    return lambda seed: seed[method].losses(budget)


def everything(method: str) -> Of:
    """Its mixture of at most all members."""
    return lambda seed: seed[method].losses(len(seed[method].test_MN))


def single(method: str, cycle: int) -> Of:
    """Its members of one cycle, the mean over trajectories."""
    return lambda seed: singles(seed[method], cycle)


def after(cycles: int, of: Callable[[Trained], Losses]) -> Of:
    """q0 as it was after so many cycles."""
    return lambda seed: of(seed["q0"].first(cycles))


def singles(trained: Trained, cycle: int) -> Losses:
    """Losses of the members of one cycle, averaged over trajectories."""
    rows = [wikitext.members(trained.run).index((t, cycle)) for t in range(trained.run.settings.trajectories)]
    return np.asarray(-np.log(trained.test_MN[rows].astype(np.float64)).mean(axis=0))


def fitted_gain(p_MN: NDArray[np.float32]) -> float:
    """Loss of fitted less that of equal weights on the same tokens."""
    return float(fit_weights(p_MN).loss + np.log(p_MN.astype(np.float64).mean(axis=0)).mean())


def pooled(trained: Trained) -> tuple[Losses, Losses]:
    """Losses on the test tokens of the chosen members under equal weights: probabilities averaged, and logits averaged."""
    if "pooled" in trained.cache:
        known: tuple[Losses, Losses] = trained.cache["pooled"]
        return known
    members = [wikitext.members(trained.run)[idx] for idx in trained.chosen(MATCHED)[0]]
    linear, logits = [], []
    for log_p_MNV, targets_N in distributions(trained.run, members, "test"):
        at = np.arange(len(targets_N))
        linear.append(-np.log(np.exp(log_p_MNV[:, at, targets_N]).mean(axis=0)))
        mean_NV = log_p_MNV.mean(axis=0)
        logits.append(np.log(np.exp(mean_NV).sum(axis=-1)) - mean_NV[at, targets_N])
    trained.cache["pooled"] = np.concatenate(linear), np.concatenate(logits)
    return pooled(trained)


def divergences(run: Run) -> tuple[float, float]:
    """Mean KL in nats between neighbours of one trajectory, and between trajectories at the same cycle; the last four cycles."""
    settings = run.settings
    names = [(t, c) for t in range(settings.trajectories) for c in range(settings.cycles - 4, settings.cycles)]
    log_p_MNV, _ = next(distributions(run, names, "selection"))
    within, across = [], []
    for i, (t, c) in enumerate(names):
        for j, (u, d) in enumerate(names):
            if (t == u and d == c + 1) or (t != u and c == d):
                kl = float((np.exp(log_p_MNV[i]) * (log_p_MNV[i] - log_p_MNV[j])).sum(-1).mean())
                (within if t == u else across).append(kl)
    return float(np.mean(within)), float(np.mean(across))


def distributions(run: Run, names: list[tuple[int, int]], split: str) -> Iterator[tuple[Losses, NDArray[np.int64]]]:
    """Log-probabilities (M, N, V) of these members and the true tokens (N), some windows at a time."""
    tokens = TokenSplit.load(split_path(run.directory, split))
    models = [load_member(run, member_name(t, c), torch.device("cpu")) for t, c in names]
    windows = tokens.windows(run.settings.context_length)
    for start in range(0, len(windows), 16):
        found, targets = [], []
        for _, first, stop in windows[start : start + 16]:
            ids = torch.from_numpy(tokens.tokens[first:stop].astype(np.int64))
            with torch.no_grad():
                found.append(
                    torch.stack([torch.log_softmax(m(ids[None, :-1])[0] @ m.lm_head.weight.T, -1) for m in models])
                )
            targets.append(ids[1:].numpy())
        yield torch.cat(found, dim=1).double().numpy(), np.concatenate(targets)


if __name__ == "__main__":
    main()
