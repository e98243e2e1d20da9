"""`chorus prior fit`: reads a population directory, fits its priors, and writes tiers, reports and plots back to it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.manifest import Name, Pool, Population
from chorus.prior.budgets import Budgets, ResolvedBudgets, resolve
from chorus.prior.choosing import check_budgets
from chorus.prior.distributions import MemberDistributions
from chorus.prior.engine import Engine, connect
from chorus.prior.fit import PriorFit, fit_prior
from chorus.prior.held_out import HeldOut
from chorus.prior.latency import LATENCY_JSON, load_table
from chorus.prior.likelihoods import Progress, likelihoods
from chorus.prior.plots import save_frontier, save_members
from chorus.prior.reading import Marks, Reader
from chorus.prior.report import save_report
from chorus.prior.results import FittedText, NamedFit, fitted_population, save_json, with_prior
from chorus.prior.splits import HELD_OUT, ScoredSplit, corpus_splits, own_splits

logger = logging.getLogger(__name__)

NO_BUDGETS = Budgets(tiers={})
OWN_SPLITS: Mapping[Name | None, str | None] = {None: None}
"""One unnamed prior, fitted on the population's own splits."""


def fit_population(
    directory: Path,
    *,
    corpora: Mapping[Name | None, str | None] = OWN_SPLITS,
    max_bytes: int = 2_000_000,
    split_on: str | None = None,
    text_field: str = "text",
    marks: Marks | None = None,
    budgets: Budgets = NO_BUDGETS,
    latency: Path | None = None,
    shrink: bool = False,
    pools: Sequence[Pool] = (),
    engine: str | None = None,
    progress: Progress | None = None,
) -> tuple[Population, list[NamedFit]]:
    """Fit the priors of a population and write reports, plots, JSON and, last, the manifest.

    Concurrent fits are written one after the other, each with its own prior version.

    Args:
        directory: the population directory.
        corpora: text of each prior, by name. A single prior may have no name, and None as its text: see `OWN_SPLITS`.
        max_bytes: most bytes of text to take from a corpus.
        split_on: see `population.corpus.read_documents`.
        text_field: see `population.corpus.read_documents`.
        marks: tokens around each text of a corpus; by default those that the members were trained with, see `Reader.of`.
        budgets: cost limits of the tiers.
        latency: table for budgets in milliseconds; default: prior/latency.json of the population.
        shrink: shrink weights towards uniform; see `fit_prior`.
        pools: pools to try besides the linear one at temperature 1; see `fit_prior`.
        engine: address of a running engine of this population, which runs the members instead of this process.
        progress: see `prior.likelihoods`.

    Raises:
        ChorusError: the population or the text cannot be used, or the population changed meanwhile. The manifest is then unchanged.
    """
    population = manifest.load(directory)
    resolved = _resolve_budgets(budgets, population, directory, latency)
    check_budgets(resolved.counts, len(population.members))
    logger.info("Checking the files of %d members ...", len(population.members))
    manifest.verify(population, directory)
    texts = {
        name: _splits(population, directory, text, max_bytes, split_on, text_field, marks)
        for name, text in corpora.items()
    }
    connected = None if engine is None else connect(engine, population)
    if connected is not None:
        connected.request_member(population.members[0].name)  # a gateway raises here, before anything is computed
    fits = []
    for name, splits in texts.items():
        logger.info("%s: %s", corpora[name] or "the population's own held-out splits", _describe_sizes(splits))
        held_out = measure(population, directory, splits, progress, engine=connected)
        logger.info(
            "Choosing members and fitting weights%s ...",
            " and pools (several passes over the text)" if pools else "",
        )
        source = MemberDistributions(population, directory, [splits[part] for part in HELD_OUT]) if pools else None
        fit = fit_prior(
            held_out,
            budgets=resolved.counts,
            limited=resolved.limited,
            limits=resolved.limits,
            shrink=shrink,
            source=source,
            pools=pools,
        )
        text = FittedText(
            source=_describe_source(corpora[name], splits),
            num_tokens={part: split.num_scored for part, split in splits.items()},
            num_documents={part: split.split.num_documents for part, split in splits.items()},
        )
        fits.append(NamedFit(name=name, held_out=held_out, fit=_prefix_tiers(name, fit), text=text))

    with manifest.updating(directory):
        current = manifest.load(directory)  # another fit may have finished meanwhile, or a member been added
        fitted = fitted_population(population.model_copy(update={"prior_version": current.prior_version}), fits)
        updated = with_prior(current, fitted)
        for named in fits:
            out = directory / named.directory
            save_json(directory, fitted, named)
            save_frontier(out, fitted, named.fit)
            save_members(out, fitted, named.fit)
            save_report(out, fitted, named.fit, named.text)
        manifest.save(updated, directory)
    return fitted, fits


def measure(
    population: Population,
    directory: Path,
    splits: dict[str, ScoredSplit],
    progress: Progress | None = None,
    *,
    engine: Engine | None = None,
) -> HeldOut:
    """Likelihoods of all members on the three held-out splits."""
    parts = [splits[name] for name in HELD_OUT]
    return HeldOut(
        probabilities_MN=likelihoods(population, directory, parts, engine=engine, progress=progress),
        num_fitness=parts[0].num_scored,
        num_selection=parts[1].num_scored,
        fitted_offsets=np.concatenate([parts[0].offsets, parts[0].num_scored + parts[1].offsets[1:]]),
        test_offsets=parts[2].offsets,
    )


def _describe_sizes(splits: Mapping[str, ScoredSplit]) -> str:
    return ", ".join(f"{s.name} {s.num_scored:,} tokens in {s.split.num_documents} documents" for s in splits.values())


def _describe_source(corpus: str | None, splits: dict[str, ScoredSplit]) -> str:
    if corpus is None:
        return "the population's own held-out splits"
    is_chat = any(split.is_scored is not None for split in splits.values())
    return f"the answers in the conversations of {corpus}" if is_chat else corpus


def _prefix_tiers(name: str | None, fit: PriorFit) -> PriorFit:
    """The fit with its tiers' names and its warnings prefixed by the prior's name."""
    if name is None:
        return fit
    tiers = tuple(replace(tier, name=f"{name}-{tier.name}") for tier in fit.tiers)
    return replace(fit, tiers=tiers, warnings=tuple(f"{name}: {warning}" for warning in fit.warnings))


def _resolve_budgets(
    budgets: Budgets, population: Population, directory: Path, latency: Path | None
) -> ResolvedBudgets:
    table = None
    if budgets.unit == "ms" and (latency is not None or (directory / LATENCY_JSON).is_file()):
        table = load_table(latency or directory / LATENCY_JSON)
    elif latency is not None and budgets.unit != "ms":
        raise ChorusError("--latency was given, but no limit in ms: add --max-latency-ms, or budgets like small=10ms.")
    return resolve(budgets, population, directory, table)


def _splits(
    population: Population,
    directory: Path,
    corpus: str | None,
    max_bytes: int,
    split_on: str | None,
    text_field: str,
    marks: Marks | None,
) -> dict[str, ScoredSplit]:
    shape = {"context_length": population.context_length, "vocab_size": population.vocab_size}
    if corpus is None:
        return own_splits(directory, **shape)
    reader = Reader.of(population, directory, marks, text_field=text_field)
    return corpus_splits(corpus, reader, max_bytes=max_bytes, split_on=split_on, **shape)
