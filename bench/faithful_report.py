"""Prints the tables of `bench.faithful`: means over seeds and paired differences with intervals, one block per question."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench import wikitext
from bench.faithful import (
    CYCLES,
    EPOCHS,
    EXTRA_METHODS,
    MATCHED,
    METHODS,
    SEEDS,
    Losses,
    Trained,
    finished,
    load,
    run_directory,
)
from chorus.population.tokens import TokenSplit, split_path
from chorus.prior.bootstrap import Bootstrap
from chorus.prior.weights import fit_weights
from chorus.train.run import Run, member_name
from chorus.train.snapshot import load_member

# M members, N tokens, V vocabulary

Seed = dict[str, Trained]
Of = Callable[[Seed], Losses]
"""Computes losses on the test tokens for one seed; raises KeyError if a method that it needs is not finished."""


def report(out: Path) -> None:
    """Print tables of the finished runs, and write results.json."""
    methods = [*METHODS, *EXTRA_METHODS]
    seeds = [
        {
            method: load(run_directory(out, seed, method))
            for method in methods
            if finished(run_directory(out, seed, method))
        }
        for seed in SEEDS
    ]
    tables = Tables([seed for seed in seeds if "q0" in seed])
    tables.methods()
    tables.budgets()
    tables.epochs()
    tables.checks()
    (out / "results.json").write_text(json.dumps(tables.results, indent=2) + "\n", encoding="utf-8")


class Tables:
    """Computes and prints all tables, and collects `results`."""

    def __init__(self, seeds: list[Seed]) -> None:
        self.seeds = seeds
        self.bootstrap = Bootstrap(wikitext.scored_offsets(seeds[0]["q0"].run, "test"))
        self.results: dict[str, object] = {}

    def each(self, of: Of) -> dict[int, Losses]:
        """Losses by seed, for seeds with all methods that `of` needs."""
        by_seed = {}
        for idx, seed in enumerate(self.seeds):
            with suppress(KeyError):
                by_seed[idx] = of(seed)
        return by_seed

    def mean(self, of: Of) -> float:
        """Mean loss over these seeds, nats per token."""
        return float(np.mean([losses.mean() for losses in self.each(of).values()]))

    def difference(self, name: str, ours: Of, theirs: Of) -> str:
        """Format `-0.0310 [-0.0350, -0.0270], 3 of 3`: ours minus theirs, and the seeds with that sign."""
        a, b = self.each(ours), self.each(theirs)
        common = sorted(a.keys() & b.keys())
        if not common:
            return "not finished"
        paired = [np.mean([losses[idx] for idx in common], axis=0) for losses in (a, b)]
        mean = self.bootstrap.difference(*paired)
        by_seed = [float((a[idx] - b[idx]).mean()) for idx in common]
        agreeing = sum(np.sign(value) == np.sign(mean.nats) for value in by_seed)
        self.results[name] = {"nats": mean.nats, "low": mean.low, "high": mean.high, "seeds": by_seed}
        return f"{mean.nats:+.4f} [{mean.low:+.4f}, {mean.high:+.4f}], {agreeing} of {len(common)}"

    def methods(self) -> None:
        """Print every method at the same epochs and number of members."""
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
        """Print losses against K."""
        print(f"| K of q0's {3 * CYCLES} | loss | less the row above |\n|--:|--:|---|")
        for before, size in ((0, 1), (1, 2), (2, 4), (4, 6), (6, 12), (12, 3 * CYCLES)):
            step = (
                self.difference(f"K = {size} less {before}", matched("q0", size), matched("q0", before))
                if before
                else ""
            )
            print(f"| {size} | {self.mean(matched('q0', size)):.4f} | {step} |")

    def epochs(self) -> None:
        """Print losses against epochs, and how many times fewer epochs q0 needs (item 5)."""
        print(
            f"\n| epochs | q0, K = {MATCHED} | all, equal weights | last singles | one trajectory, K = {MATCHED} | independent |"
        )
        print("|--:|--:|--:|--:|--:|--:|")
        curves: dict[str, dict[int, float]] = {"q0": {}, "q0, one trajectory": {}}
        for count in range(1, CYCLES + 1):
            epochs = 6 * count
            for method, cycles in (("q0", count), ("q0, one trajectory", 3 * count)):
                curves[method][epochs] = self.mean(
                    lambda seed, m=method, c=cycles: seed[m].first(c).losses(MATCHED)  # type: ignore[misc]
                )
            uniform = self.mean(lambda seed, c=count: seed["q0"].first(c).uniform())  # type: ignore[misc]
            q0, one = (curve[epochs] for curve in curves.values())
            theirs = self.mean(lambda seed, c=count: independent(seed, c))  # type: ignore[misc]
            print(
                f"| {epochs} | {q0:.4f} | {uniform:.4f} | {self.mean(single('q0', count - 1)):.4f} | {one:.4f} | {theirs:.4f} |"
            )
        print("\n| | reaches independent models of | with loss | after epochs | times fewer |\n|---|--:|--:|--:|--:|")
        rivals: dict[str, tuple[int, Of]] = {
            **{f"{e // 6} of 6 epochs": (e, lambda seed, c=e // 6: independent(seed, c)) for e in (36, 60, EPOCHS)},  # type: ignore[misc]
            f"{EPOCHS // 10} of 10 epochs": (EPOCHS, all_members("longer independent models")),
        }
        for method, curve in curves.items():
            for rival, (epochs, of) in rivals.items():
                if len(self.each(of)) < len(self.seeds):
                    continue  # means over different seeds are not comparable
                theirs = self.mean(of)
                reached = next((own for own, loss in curve.items() if loss <= theirs), None)
                times = f"{epochs / reached:.1f}" if reached else "-"
                print(f"| {method} | {rival} | {theirs:.4f} | {reached or f'not by {EPOCHS}'} | {times} |")
                self.results[f"5, {method}, {rival}"] = {"loss": theirs, "epochs of q0": reached}
        print()

    def checks(self) -> None:
        """Print the other items that a faithful reproduction must show."""
        q0, plain, one = "q0", "q0 without distillation", "q0, one trajectory"
        chained, alone = "chained independent models", "independent models"
        last, length = CYCLES - 1, 2 * CYCLES
        rows: list[tuple[str, Of, Of]] = [
            (f"1. mixture of {MATCHED} less best single", matched(q0, MATCHED), matched(q0, 1))
        ]
        for cycle in (1, 3, 5, 9, last):
            rows.append((f"2. distillation, single members of cycle {cycle}", single(q0, cycle), single(plain, cycle)))
        for idx in (1, 2, 5, last):
            rows.append((f"2. chained model {idx} less the independent one", single(chained, idx), single(alone, idx)))
        rows += [
            (f"2. distillation, mixture of {MATCHED}", matched(q0, MATCHED), matched(plain, MATCHED)),
            (
                f"2. chained less independent, mixture of {MATCHED}",
                matched(chained, MATCHED),
                matched(alone, MATCHED),
            ),
            (f"3. one model of {EPOCHS} epochs less one of 6", single("one long run", 0), single(alone, 0)),
            (f"3. q0: its members of cycle {last} less those of cycle 5", single(q0, last), single(q0, 5)),
            (
                f"3. its mixture of 6 after cycle {last} less that after cycle 5",
                matched(q0, 6),
                lambda s: s[q0].first(6).losses(6),
            ),
            ("3. one trajectory: its last member less that of cycle 5", single(one, 3 * CYCLES - 1), single(one, 5)),
            (
                "3. its mixture of 6 less that of 6 among the first 6",
                matched(one, 6),
                lambda s: s[one].first(6).losses(6),
            ),
            ("4. linear less logits, q0's 6, fitted weights", *pools(q0, chosen=True, fitted=True)),
            ("4. linear less logits, q0's 6, equal weights", *pools(q0, chosen=True, fitted=False)),
            ("4. linear less logits, all independent models, equal weights", *pools(alone, chosen=False, fitted=False)),
            ("4. linear less logits, all chained models, equal weights", *pools(chained, chosen=False, fitted=False)),
            (
                f"6. fitted less equal weights, all {3 * CYCLES}, test",
                lambda s: s[q0].fitted(),
                lambda s: s[q0].uniform(),
            ),
            (
                f"7. three trajectories of {length} epochs less one of {length}, K = 6",
                matched(q0, 6),
                lambda s: s[q0].alone().losses(6),
            ),
            (f"7. three trajectories of {length} epochs less one of {EPOCHS}, K = 6", matched(q0, 6), matched(one, 6)),
            (f"7. three trajectories of {length} epochs less one of {EPOCHS}, K = 3", matched(q0, 3), matched(one, 3)),
        ]
        print("| item | nats [95 %], seeds of that sign |\n|---|---|")
        for name, ours, theirs in rows:
            print(f"| {name} | {self.difference(name, ours, theirs)} |")
        gains = [fitted_gain(seed[q0].fitness_MN) for seed in self.seeds]
        print(f"| 6. fitted less equal weights on the fitted text | {', '.join(f'{gain:+.4f}' for gain in gains)} |")
        within, across = np.mean([divergences(seed[q0].run) for seed in self.seeds], axis=0)
        print(f"| 7. KL of neighbours in a trajectory; across trajectories | {within:.3f}; {across:.3f} |")
        self.results["KL"] = {"within": within, "across": across}


def independent(seed: Seed, count: int) -> Losses:
    """Test losses of the mixture of the first `count` independent models, with weights fitted on held-out articles."""
    return seed["independent models"].first(count).losses(count)


def matched(method: str, budget: int) -> Of:
    """Test losses of a method's mixture of `budget` members, chosen and weighted on held-out articles."""
    return lambda seed: seed[method].losses(budget)


def all_members(method: str) -> Of:
    """Test losses of a method's mixture with no limit on members."""
    return lambda seed: seed[method].losses(len(seed[method].test_MN))


def single(method: str, cycle: int) -> Of:
    """Test losses of a method's members of one cycle, averaged over trajectories."""
    return lambda seed: singles(seed[method], cycle)


def singles(trained: Trained, cycle: int) -> Losses:
    """Losses of the members of one cycle, averaged over trajectories."""
    rows = [wikitext.members(trained.run).index((t, cycle)) for t in range(trained.run.settings.trajectories)]
    return np.asarray(-np.log(trained.test_MN[rows].astype(np.float64)).mean(axis=0))


def fitted_gain(p_MN: NDArray[np.float32]) -> float:
    """Loss with fitted weights minus that with equal weights, on the tokens that were fitted."""
    return float(fit_weights(p_MN).loss + np.log(p_MN.astype(np.float64).mean(axis=0)).mean())


def pools(method: str, *, chosen: bool, fitted: bool) -> tuple[Of, Of]:
    """Test losses of a method's linear pool, and of the mean of its logits, with the same weights: fitted for the linear pool, or
    equal.
    """

    def of(seed: Seed, idx: int) -> Losses:
        trained = seed[method]
        rows = trained.chosen(MATCHED)[0] if chosen else tuple(range(len(trained.test_MN)))
        key = "pools", rows, fitted
        if key not in trained.cache:
            heldout_MN = np.concatenate([trained.fitness_MN, trained.selection_MN], axis=1)[list(rows)]
            weights_M = fit_weights(heldout_MN).weights_M if fitted else np.full(len(rows), 1 / len(rows))
            names = [wikitext.members(trained.run)[row] for row in rows]
            trained.cache[key] = pooled(trained.run, names, weights_M, kept="fitted" if fitted else "equal")
        return np.asarray(trained.cache[key][idx])

    return lambda seed: of(seed, 0), lambda seed: of(seed, 1)


def pooled(run: Run, members: list[tuple[int, int]], weights_M: Losses, *, kept: str) -> Losses:
    """Losses (2, N) on the test tokens of the weighted means of the members' probabilities and logits. Cached with the run."""
    path = run.directory / "scores" / f"pools-{kept}-{'-'.join(member_name(*member) for member in members)}.npy"
    if path.exists():
        return np.asarray(np.load(path))
    weights_M11 = torch.from_numpy(weights_M).float().to(wikitext.DEVICE)[:, None, None]
    linear, logits = [], []
    for log_p_MNV, targets_N in distributions(run, members, "test"):
        own_MN = log_p_MNV.gather(2, targets_N.expand(len(members), -1)[..., None])[..., 0]
        linear.append(-torch.logsumexp(own_MN + weights_M11[..., 0].log(), dim=0))
        mean_NV = (log_p_MNV * weights_M11).sum(dim=0)
        logits.append(torch.logsumexp(mean_NV, dim=-1) - mean_NV.gather(1, targets_N[:, None])[:, 0])
    both_2N: Losses = torch.stack([torch.cat(linear), torch.cat(logits)]).double().cpu().numpy()
    np.save(path, both_2N)
    return both_2N


def divergences(run: Run) -> tuple[float, float]:
    """Mean KL in nats over the last four cycles: neighbours in a trajectory, and trajectories at the same cycle."""
    settings = run.settings
    names = [(t, c) for t in range(settings.trajectories) for c in range(settings.cycles - 4, settings.cycles)]
    log_p_MNV, _ = next(distributions(run, names, "selection"))
    within, across = [], []
    for i, (t, c) in enumerate(names):
        for j, (u, d) in enumerate(names):
            if (t == u and d == c + 1) or (t != u and c == d):
                kl = float((log_p_MNV[i].exp() * (log_p_MNV[i] - log_p_MNV[j])).sum(-1).mean())
                (within if t == u else across).append(kl)
    return float(np.mean(within)), float(np.mean(across))


def distributions(run: Run, names: list[tuple[int, int]], split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities (M, N, V) of these members, and the true tokens (N), for 16 windows at a time."""
    tokens = TokenSplit.load(split_path(run.directory, split))
    models = [load_member(run, member_name(t, c), wikitext.DEVICE) for t, c in names]
    windows = tokens.windows(run.settings.context_length)
    for start in range(0, len(windows), 16):
        log_p, targets = [], []
        for _, first, stop in windows[start : start + 16]:
            ids = torch.from_numpy(tokens.tokens[first:stop].astype(np.int64)).to(wikitext.DEVICE)
            with torch.no_grad():
                log_p.append(
                    torch.stack([torch.log_softmax(m(ids[None, :-1])[0] @ m.lm_head.weight.T, -1) for m in models])
                )
            targets.append(ids[1:])
        yield torch.cat(log_p, dim=1), torch.cat(targets)
