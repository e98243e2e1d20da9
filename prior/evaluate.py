"""`chorus prior evaluate`: a population's tiers on any text, run in this process or through a running engine."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.manifest import Population
from chorus.population.shell import command
from chorus.prior.distributions import needs_only_likelihoods, tier_losses
from chorus.prior.engine import connect, engine_losses
from chorus.prior.likelihoods import Progress, likelihoods
from chorus.prior.reading import Marks, Reader
from chorus.prior.report import interval_text, signed_text
from chorus.prior.shift import TierShift, WeightedTier, evaluate_shift
from chorus.prior.splits import HELD_OUT, ScoredSplit, own_splits, whole_corpus
from chorus.prior.weights import mixture_losses

TOLERANCE_NATS = 1e-3  # largest difference between an engine's mean loss and ours that rounding explains


def evaluate_population(
    directory: Path,
    *,
    corpus: str,
    max_bytes: int,
    split_on: str | None,
    text_field: str = "text",
    marks: Marks | None = None,
    progress: Progress | None = None,
) -> tuple[Population, ScoredSplit, list[TierShift]]:
    """Evaluate every tier on a corpus. Caches the likelihoods; leaves the manifest unchanged.

    Raises:
        ChorusError: the population or the corpus cannot be used, or a tier has a log pool or a temperature other than 1: its loss
            needs whole distributions, not only likelihoods.
    """
    population = _load(directory)
    if other := [tier.name for tier in population.tiers if not needs_only_likelihoods(tier)]:
        raise ChorusError(
            f"tiers {', '.join(other)} do not pool probabilities at temperature 1, so the gain from new weights cannot be computed "
            f"from likelihoods. Fit linear tiers (`{command('chorus', 'prior', 'fit', directory)}`), or evaluate these tiers "
            "with --engine."
        )
    manifest.verify(population, directory)
    split = whole_corpus(
        corpus,
        Reader.of(population, directory, marks, text_field=text_field),
        context_length=population.context_length,
        vocab_size=population.vocab_size,
        max_bytes=max_bytes,
        split_on=split_on,
    )
    probabilities_MN = likelihoods(population, directory, [split], progress=progress)
    idx_of = {member.name: idx for idx, member in enumerate(population.members)}
    tiers = [
        WeightedTier(name=tier.name, members=tuple(idx_of[name] for name in tier.members), weights=tier.weights)
        for tier in population.tiers
    ]
    return population, split, evaluate_shift(probabilities_MN, split.offsets, tiers)


@dataclass(frozen=True, kw_only=True)
class ServedTier:
    """A tier's loss through a running engine, and the loss computed in this process from the members' checkpoints."""

    tier: str
    engine_nats: float
    nats: float
    largest_difference: float
    """Largest absolute difference between the two losses of any token, in nats."""

    @property
    def agrees(self) -> bool:
        """Whether the mean losses agree up to rounding."""
        return abs(self.engine_nats - self.nats) <= TOLERANCE_NATS


def check_engine(
    directory: Path,
    url: str,
    *,
    corpus: str | None,
    max_bytes: int,
    split_on: str | None,
    text_field: str = "text",
    marks: Marks | None = None,
    progress: Progress | None = None,
) -> tuple[Population, ScoredSplit, list[ServedTier]]:
    """Evaluate every tier through a running engine, on a corpus or on the population's own test split.

    Raises:
        ChorusError: the population, the text or the engine cannot be used.
    """
    population = _load(directory)
    engine = connect(url, population)
    manifest.verify(population, directory)
    shape = {"context_length": population.context_length, "vocab_size": population.vocab_size}
    if corpus is None:
        splits = own_splits(directory, **shape)
        split = splits["test"]
        parts = [splits[name] for name in HELD_OUT]  # the cache key of a fit, so its likelihoods are reused
    else:
        reader = Reader.of(population, directory, marks, text_field=text_field)
        split = whole_corpus(corpus, reader, max_bytes=max_bytes, split_on=split_on, **shape)
        parts = [split]
    probabilities_MN = likelihoods(population, directory, parts, progress=progress)[:, -split.num_scored :]
    idx_of = {member.name: idx for idx, member in enumerate(population.members)}
    others = [tier for tier in population.tiers if not needs_only_likelihoods(tier)]
    exact = dict(zip((t.name for t in others), tier_losses(population, directory, split, others), strict=True))
    served = []
    for tier in population.tiers:
        if tier.name not in exact:
            rows = [idx_of[name] for name in tier.members]
            exact[tier.name] = mixture_losses(probabilities_MN[rows], np.asarray(tier.weights))

        def advance(scored: int, name: str = tier.name) -> None:
            if progress is not None:
                progress(f"tier {name}", "the engine", scored, split.num_scored)

        served_N = engine_losses(engine, engine.request(tier.name), split, progress=advance)
        served.append(
            ServedTier(
                tier=tier.name,
                engine_nats=float(served_N.mean()),
                nats=float(exact[tier.name].mean()),
                largest_difference=float(np.abs(served_N - exact[tier.name]).max()),
            )
        )
    return population, split, served


def served_table(population: Population, served: list[ServedTier]) -> Table:
    """Per tier: loss through the engine and in this process, their difference, and the manifest's test loss. Fits 80 columns."""
    table = Table("tier", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("engine, nats", "members here", "difference", "largest, a token", "manifest"):
        table.add_column(heading, justify="right", no_wrap=True)
    for tier, result in zip(population.tiers, served, strict=True):
        table.add_row(
            f"[bold]{tier.name}[/]",
            f"{result.engine_nats:.5f}",
            f"{result.nats:.5f}",
            f"{result.engine_nats - result.nats:+.1e}",
            f"{result.largest_difference:.1e}",
            "-" if tier.test_loss is None else f"{tier.test_loss.nats:.5f}",
        )
    return table


def _load(directory: Path) -> Population:
    population = manifest.load(directory)
    if not population.tiers:
        raise ChorusError(
            f"{directory} has no tiers yet. Fit them first: `{command('chorus', 'prior', 'fit', directory)}`."
        )
    return population


def shift_table(population: Population, shifts: list[TierShift]) -> Table:
    """Per tier: loss on this text and on the test split, differences to the best single member and to new fits. Fits 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("tier", no_wrap=True)
    for heading in ("loss here, nats", "at\nhome", "to best\nsingle", "with new\nweights", "with new\nmembers"):
        table.add_column(heading, justify="right", no_wrap=True)
    for tier, shift in zip(population.tiers, shifts, strict=True):
        table.add_row(
            f"[bold]{tier.name}[/]",
            interval_text(shift.loss).replace(" [", "\n[", 1),
            "-" if tier.test_loss is None else f"{tier.test_loss.nats:.3f}",
            f"{shift.to_best_single.nats:+.4f}",
            signed_text(shift.new_weights).replace(" [", "\n[", 1),
            signed_text(shift.new_members).replace(" [", "\n[", 1),
        )
    return table
