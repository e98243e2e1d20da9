"""`chorus prior`: fits the members and weights of every tier, evaluates them and measures latencies."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chorus.population.errors import ChorusError

if TYPE_CHECKING:
    from chorus.population.manifest import Pool
    from chorus.prior.budgets import Amount
    from chorus.prior.likelihoods import Progress
    from chorus.prior.reading import Marks

_DIRECTORY = click.argument("directory", type=click.Path(path_type=Path))
_MAX_BYTES = click.option(
    "--max-bytes",
    default=2_000_000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Most bytes of text to take from a corpus.",
)
_SPLIT_ON = click.option(
    "--split-on", help="Start a new document at every line of a text file that matches this regular expression."
)
_MARKS = click.option(
    "--marks",
    type=click.Choice(["tokenizer", "both", "none"]),
    help="Tokens around each text of a corpus: what the tokenizer adds by default, its bos and eos (both), or none. Default: both "
    "for members from `chorus train`, tokenizer for others.",
)

_TEXT_FIELD = click.option(
    "--text-field",
    default="text",
    show_default=True,
    help="Field of a JSON or Parquet row, or column of a dataset, that holds the text.",
)
_LINE_EVERY_SECONDS = 10.0


@click.group()
def prior() -> None:
    """Fit the weights and members for every budget."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("chorus").setLevel(logging.INFO)


@prior.command()
@_DIRECTORY
@click.option(
    "--corpus",
    "corpora",
    multiple=True,
    metavar="[NAME=]TEXT",
    help="Text to fit on: file, folder, dataset name or `stdlib`. Of JSON lines with `messages` (conversations), only the answers "
    "are scored. Default: the population's own splits. Repeat with names for several priors, with tiers NAME-economy and so on.",
)
@_MAX_BYTES
@_SPLIT_ON
@_TEXT_FIELD
@_MARKS
@click.option(
    "--budgets",
    help="Tiers and their limits: in members `economy=1,standard=2`, or `small=1.5x`, `small=200MB`, `small=12ms`. A tier `max` of "
    "all useful members is added if it is larger.",
)
@click.option(
    "--max-latency-ms", type=click.FloatRange(min=0, min_open=True), help="Most milliseconds per token, for every tier."
)
@click.option(
    "--max-flops",
    type=click.FloatRange(min=0, min_open=True),
    help="Most forward passes of the largest member per token, for every tier.",
)
@click.option("--max-memory", help="Most bytes of weights, for every tier: 2GB or 800MiB.")
@click.option(
    "--latency",
    type=click.Path(path_type=Path),
    help="Table of measured ms per token. Default: prior/latency.json, which `chorus prior measure` writes.",
)
@click.option(
    "--pools",
    help="Pools to fit with a temperature: `linear`, `log` or `linear,log`. The one with the lowest held-out loss is served. Takes "
    "several passes over the text. Default: linear at temperature 1.",
)
@click.option(
    "--engine",
    help="Address of a running `chorus engine serve` or `vllm serve` of this population, which then runs the members.",
)
@click.option(
    "--shrink",
    is_flag=True,
    help="Shrink weights towards uniform, with a strength from cross-validation; for small texts.",
)
def fit(
    directory: Path,
    corpora: tuple[str, ...],
    max_bytes: int,
    split_on: str | None,
    text_field: str,
    marks: "Marks | None",
    budgets: str | None,
    max_latency_ms: float | None,
    max_flops: float | None,
    max_memory: str | None,
    latency: Path | None,
    pools: str | None,
    engine: str | None,
    shrink: bool,
) -> None:
    """Choose members and fit weights for every tier of the population in DIRECTORY, on held-out text.

    Writes the tiers and their losses to population.json, and a report, plots and fit.json to prior/.
    """
    from chorus.prior.budgets import Budgets
    from chorus.prior.run import OWN_SPLITS, fit_population

    parsed = Budgets.parse(budgets, _cap(max_latency_ms, max_flops, max_memory))
    with _progress() as progress:
        population, fits = fit_population(
            directory,
            corpora=_parse_corpora(corpora) if corpora else OWN_SPLITS,
            max_bytes=max_bytes,
            split_on=split_on,
            text_field=text_field,
            marks=marks,
            budgets=parsed,
            latency=latency,
            shrink=shrink,
            pools=_parse_pools(pools),
            engine=engine,
            progress=progress,
        )

    from rich.console import Console

    from chorus.prior.report import REPORT, member_table, tier_table

    console = Console()
    for named in fits:
        if named.name is not None:
            click.echo(f"{named.name}, fitted on {named.text.source}")
        console.print(tier_table(population, named.fit), highlight=False)
        console.print()
        console.print(member_table(population, named.fit), highlight=False)
        for warning in named.fit.warnings:
            console.print(f"[yellow]warning:[/] {warning}", highlight=False, soft_wrap=True)
        console.print()
    reports = ", ".join(str(directory / named.directory / REPORT) for named in fits)
    click.echo(
        f"Prior version {population.prior_version} written to {directory / 'population.json'}; "
        f"{'report' if len(fits) == 1 else 'reports'}: {reports}"
    )


@prior.command()
@_DIRECTORY
@click.option("--corpus", help="Text to evaluate on: file, folder, dataset name or `stdlib`.")
@click.option(
    "--engine",
    help="Address of a running `chorus serve` or `vllm serve` of this population: evaluate the tiers through it and compare with "
    "the checkpoints in DIRECTORY. Without --corpus: on the population's own test split.",
)
@_MAX_BYTES
@_SPLIT_ON
@_TEXT_FIELD
@_MARKS
def evaluate(
    directory: Path,
    corpus: str | None,
    engine: str | None,
    max_bytes: int,
    split_on: str | None,
    text_field: str,
    marks: "Marks | None",
) -> None:
    """Evaluate the tiers of the population in DIRECTORY on other text, and what fitting again would gain there.

    With --engine: check that a running engine gives the same losses as the checkpoints.
    """
    from rich.console import Console

    from chorus.prior.evaluate import check_engine, evaluate_population, served_table, shift_table

    console = Console()
    if engine is not None:
        with _progress() as progress:
            population, split, served = check_engine(
                directory,
                engine,
                corpus=corpus,
                max_bytes=max_bytes,
                split_on=split_on,
                text_field=text_field,
                marks=marks,
                progress=progress,
            )
        click.echo(f"{split.num_scored:,} tokens in {split.split.num_documents} documents, through {engine}")
        console.print(served_table(population, served), highlight=False)
        if differing := [tier.tier for tier in served if not tier.agrees]:
            raise ChorusError(
                f"the engine at {engine} gives other losses than the checkpoints in {directory}, for {', '.join(differing)}. It "
                "may serve another prior or other members, or compute in a coarser dtype: restart it, or serve with "
                "`-- --dtype float32` to find out."
            )
        return
    if corpus is None:
        raise ChorusError("evaluate needs --corpus TEXT, or --engine URL to use the population's own test split.")
    with _progress() as progress:
        population, split, shifts = evaluate_population(
            directory,
            corpus=corpus,
            max_bytes=max_bytes,
            split_on=split_on,
            text_field=text_field,
            marks=marks,
            progress=progress,
        )
    click.echo(f"{split.num_scored:,} tokens in {split.split.num_documents} documents of {corpus}")
    console.print(shift_table(population, shifts), highlight=False)
    console.print(
        "\nWith new weights, with new members: the change in loss from fitting new weights for the same members, or from choosing "
        "the same number of members anew. Both are fitted on one half of this text and evaluated on the other, both ways. Only an "
        "interval entirely below zero shows a gain.",
        highlight=False,
        soft_wrap=True,
    )


@prior.command()
@_DIRECTORY
@click.option("--engine", required=True, help="Address of a running `chorus serve` or `vllm serve` of this population.")
def measure(directory: Path, engine: str) -> None:
    """Measure the time per token at every tier of the population in DIRECTORY, on a running engine without other load.

    Writes prior/latency.json, which `chorus prior fit --max-latency-ms` reads.
    """
    from rich.console import Console
    from rich.table import Table

    from chorus.population import manifest
    from chorus.prior.engine import connect
    from chorus.prior.latency import LATENCY_JSON, save_table
    from chorus.prior.latency import measure as measure_latency

    population = manifest.load(directory)
    table = measure_latency(connect(engine, population), population)
    save_table(table, directory)
    shown = Table("tier", box=None, pad_edge=False)
    for heading in ("members", "cost", "ms per token"):
        shown.add_column(heading, justify="right")
    for tier, point in zip(population.tiers, table.points, strict=True):
        shown.add_row(tier.name, str(tier.budget), f"{point.relative_cost:.2f}x", f"{point.ms_per_token:.2f}")
    console = Console()
    console.print(shown, highlight=False)
    click.echo(f"\nWrote {directory / LATENCY_JSON}.")


def _cap(max_latency_ms: float | None, max_flops: float | None, max_memory: str | None) -> "Amount | None":
    from chorus.prior.budgets import Amount

    caps = []
    if max_latency_ms is not None:
        caps.append(Amount(number=max_latency_ms, unit="ms"))
    if max_flops is not None:
        caps.append(Amount(number=max_flops, unit="x"))
    if max_memory is not None:
        caps.append(Amount.parse(max_memory, "--max-memory"))
        if caps[-1].unit != "bytes":
            raise ChorusError(f"--max-memory {max_memory!r} is not an amount of memory. Write it as 2GB or 800MiB.")
    if len(caps) > 1:
        raise ChorusError("give one of --max-latency-ms, --max-flops and --max-memory, not several.")
    return caps[0] if caps else None


def _parse_corpora(corpora: tuple[str, ...]) -> dict[str | None, str | None]:
    """Texts by name of their prior. A single corpus may have no name."""
    from chorus.prior.budgets import TIER_NAME

    texts: dict[str | None, str | None] = {}
    for corpus in corpora:
        name, separator, text = corpus.partition("=")
        is_named = bool(separator and text and TIER_NAME.fullmatch(name)) and not Path(corpus).exists()
        if not is_named and len(corpora) > 1:
            raise ChorusError(
                f"--corpus {corpus!r} has no name, but there are {len(corpora)} corpora. Write each as `--corpus news=PATH`."
            )
        if is_named and name in texts:
            raise ChorusError(f"two corpora are named {name!r}: give each prior its own name.")
        if is_named and len(name) > 40:
            raise ChorusError(
                f"the prior name {name!r} is too long: it prefixes the names of tiers. Use at most 40 characters."
            )
        texts[name if is_named else None] = text if is_named else corpus
    return texts


def _parse_pools(text: str | None) -> "tuple[Pool, ...]":
    known: dict[str, Pool] = {"linear": "linear", "log": "log"}
    requested = [] if text is None else [part.strip() for part in text.split(",")]
    if unknown := [part for part in requested if part not in known]:
        raise ChorusError(f"--pools {text!r}: unknown pool {unknown[0]!r}. The pools are linear and log.")
    return tuple(known[part] for part in dict.fromkeys(requested))


@contextlib.contextmanager
def _progress() -> "Iterator[Progress]":
    """Progress of scoring: a bar per member and split, or lines without a terminal. Cached rows are not shown."""
    from rich.console import Console

    if not Console().is_terminal:
        yield _progress_lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("scoring {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as bars:
        tasks: dict[tuple[str, str], int] = {}

        def advance(member: str, split: str, scored: int, total: int) -> None:
            if (member, split) not in tasks:
                for done in tasks.values():
                    bars.update(done, visible=False)  # type: ignore[arg-type]
                tasks[member, split] = bars.add_task(f"{member} on {split}", total=total)
            bars.advance(tasks[member, split], scored)  # type: ignore[arg-type]

        yield advance


def _progress_lines() -> "Progress":
    """Print a line at the start and end of each member and split, and every ten seconds in between."""
    scored_of: dict[tuple[str, str], int] = {}
    shown_at = time.monotonic()

    def advance(member: str, split: str, scored: int, total: int) -> None:
        nonlocal shown_at
        is_new = (member, split) not in scored_of
        done = scored_of[member, split] = scored_of.get((member, split), 0) + scored
        if is_new or done == total or time.monotonic() - shown_at >= _LINE_EVERY_SECONDS:
            shown_at = time.monotonic()
            click.echo(f"scoring {member} on {split}: {done:,} of {total:,} tokens")

    return advance
