"""The whole of `chorus prior fit`, from a population directory to the same directory with tiers."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.manifest import Name, Pool, Population
from chorus.prior.budgets import Budgets, Spending, resolve
from chorus.prior.distributions import MemberDistributions
from chorus.prior.engine import Engine, connect
from chorus.prior.fit import HeldOut, PriorFit, check_budgets, fit_prior
from chorus.prior.latency import LATENCY_JSON, load_table
from chorus.prior.likelihoods import Progress, likelihoods
from chorus.prior.plots import save_frontier, save_members
from chorus.prior.reading import Marks, Reader
from chorus.prior.report import save_report
from chorus.prior.results import FittedText, NamedFit, fitted_population, save_json, with_prior
from chorus.prior.splits import HELD_OUT, ScoredSplit, corpus_splits, own_splits

logger = logging.getLogger(__name__)

NO_BUDGETS = Budgets(tiers={})
OWN: Mapping[Name | None, str | None] = {None: None}
"""The population's own splits, as the one prior, without a name."""


def fit_population(
    directory: Path,
    *,
    corpora: Mapping[Name | None, str | None] = OWN,
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
    """Fit the priors of a population and write manifest, reports, plots and JSON. The manifest is written last.

    Several fits at once are written one after the other, each under a version of its own.

    Args:
        directory: the population's.
        corpora: name of each prior, and its text; one prior may go without a name, and without a text: see `OWN`.
        max_bytes: most text to take from a corpus.
        split_on: see `population.corpus.read_documents`; and `text_field` too.
        marks: what stands around each text of a corpus; what the members know by default, see `Reader.of`.
        budgets: what tiers may cost.
        latency: a table for budgets in milliseconds; prior/latency.json of the population where there is one.
        shrink: draw weights towards uniform; see `fit_prior`.
        pools: pools to try besides the linear one at temperature 1; see `fit_prior`.
        engine: address of a running engine of this population, which then runs the members instead of this process.
        progress: see `prior.likelihoods`.

    Raises:
        ChorusError: the population or the text cannot be used; nothing has been computed or written then.
    """
    population = manifest.load(directory)
    spending = _spending(budgets, population, directory, latency)
    check_budgets(spending.counts, len(population.members))
    logger.info("Checking the files of %d members ...", len(population.members))
    manifest.verify(population, directory)
    texts = {
        name: _splits(population, directory, text, max_bytes, split_on, text_field, marks)
        for name, text in corpora.items()
    }
    asked = None if engine is None else connect(engine, population)
    if asked is not None:
        asked.request_member(population.members[0].name)  # refused before anything is computed
    fits = []
    for name, splits in texts.items():
        logger.info("%s: %s", corpora[name] or "the population's own held-out splits", _amounts(splits))
        held_out = measure(population, directory, splits, progress, engine=asked)
        logger.info(
            "Choosing members and fitting weights%s ...",
            " and pools, which reads the text several times" if pools else "",
        )
        source = MemberDistributions(population, directory, [splits[part] for part in HELD_OUT]) if pools else None
        found = fit_prior(
            held_out,
            budgets=spending.counts,
            limited=spending.limited,
            limits=spending.limits,
            shrink=shrink,
            source=source,
            pools=pools,
        )
        text = FittedText(
            source=_source(corpora[name], splits),
            num_tokens={part: split.num_scored for part, split in splits.items()},
            num_documents={part: split.split.num_documents for part, split in splits.items()},
        )
        fits.append(NamedFit(name=name, held_out=held_out, fit=_under(name, found), text=text))

    with manifest.updating(directory):
        current = manifest.load(directory)  # another fit may have ended meanwhile, or a member joined
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
    """Likelihoods of all members on the three splits."""
    parts = [splits[name] for name in HELD_OUT]
    return HeldOut(
        probabilities_MN=likelihoods(population, directory, parts, engine=engine, progress=progress),
        num_fitness=parts[0].num_scored,
        num_selection=parts[1].num_scored,
        fitted_offsets=np.concatenate([parts[0].offsets, parts[0].num_scored + parts[1].offsets[1:]]),
        test_offsets=parts[2].offsets,
    )


def _amounts(splits: Mapping[str, ScoredSplit]) -> str:
    return ", ".join(f"{s.name} {s.num_scored:,} tokens in {s.split.num_documents} documents" for s in splits.values())


def _source(corpus: str | None, splits: dict[str, ScoredSplit]) -> str:
    if corpus is None:
        return "the population's own held-out splits"
    is_chat = any(split.is_scored is not None for split in splits.values())
    return f"the answers in the conversations of {corpus}" if is_chat else corpus


def _under(name: str | None, fit: PriorFit) -> PriorFit:
    """The fit with the prior's name before those of its tiers."""
    if name is None:
        return fit
    tiers = tuple(replace(tier, name=f"{name}-{tier.name}") for tier in fit.tiers)
    return replace(fit, tiers=tiers, warnings=tuple(f"{name}: {warning}" for warning in fit.warnings))


def _spending(budgets: Budgets, population: Population, directory: Path, latency: Path | None) -> Spending:
    table = None
    if budgets.unit == "ms" and (latency is not None or (directory / LATENCY_JSON).is_file()):
        table = load_table(latency or directory / LATENCY_JSON)
    elif latency is not None and budgets.unit != "ms":
        raise ChorusError(
            "a latency table was given, but no limit in ms: add --max-latency-ms, or budgets like small=10ms."
        )
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
