"""`chorus population`: print a population, make one from existing checkpoints, or fetch one from an archive."""

import logging
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from chorus.population import assemble, manifest
from chorus.population import fetch as fetching
from chorus.population.manifest import Loss, Population
from chorus.population.shell import command


@click.group()
def population() -> None:
    """Inspect a population, or make one from checkpoints."""


@population.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Also check every weight file against its sha256.")
def show(directory: Path, verify: bool) -> None:
    """Print members, tiers, losses and costs of the population in DIRECTORY."""
    loaded = manifest.load(directory)
    if verify:
        manifest.verify(loaded, directory)
    console = Console()
    console.print(_headline(loaded, verified=verify), highlight=False)
    console.print(_member_table(loaded))
    console.print(_tier_table(loaded))


@population.command()
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the new population.")
@click.option("--name", help="Name of the population. Default: the directory's name.")
def init(checkpoints: tuple[Path, ...], out: Path, name: str | None) -> None:
    """Make a population with uniform weights from Hugging Face CHECKPOINTS that share a tokenizer."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    made = assemble.gather(list(checkpoints), out, name=name)
    click.echo(
        f"{out}: {len(made.members)} members with uniform weights. Fit weights on a TEXT, or serve it as it is:\n"
        f"    {command('chorus', 'prior', 'fit', out, '--corpus', 'TEXT')}\n"
        f"    {command('chorus', 'serve', out)}"
    )


@population.command()
@click.argument("url")
@click.option("--sha256", required=True, help="SHA-256 of the archive.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Directory of the population; it may already exist."
)
@click.option(
    "--only-manifest", is_flag=True, help="Keep only the manifest, which is enough for `chorus serve --engine`."
)
@click.option(
    "--max-bytes",
    type=click.IntRange(min=1),
    default=fetching.MAX_BYTES,
    show_default=True,
    help="Maximum size of the archive, packed and unpacked.",
)
def fetch(url: str, sha256: str, out: Path, only_manifest: bool, max_bytes: int) -> None:
    """Fetch a population from the tar archive at URL, and check it against its digest and those in its manifest.

    The archive may hold only plain files and folders, no links. URL begins with http:// or https://.
    If the server needs an Authorization header, set its value in the environment variable CHORUS_FETCH_AUTHORIZATION.
    """
    found = fetching.fetch(url, sha256=sha256, out=out, only_manifest=only_manifest, max_bytes=max_bytes)
    what = "its manifest" if only_manifest else f"{len(found.members)} members; all digests match"
    Console().print(f"[bold]{found.name}[/]: {what}", highlight=False)


def _headline(loaded: Population, *, verified: bool) -> str:
    prior = f"prior version {loaded.prior_version}" if loaded.prior_version else "uniform weights, no prior fitted"
    return (
        f"[bold]{loaded.name}[/]  {len(loaded.members)} members, vocabulary {loaded.vocab_size:,}, "
        f"context {loaded.context_length:,}; {prior}{'; all digests match' if verified else ''}"
    )


def _member_table(loaded: Population) -> Table:
    table = Table("member", title="Members", title_justify="left", box=None, pad_edge=False)
    for heading in ("trajectory", "cycle", "epochs", "parameters", "test loss, nats"):
        table.add_column(heading, justify="right")
    table.add_column("teacher")
    for member in loaded.members:
        table.add_row(
            member.name,
            *("-" if value is None else f"{value:g}" for value in (member.trajectory, member.cycle, member.epochs)),
            f"{member.num_parameters:,}",
            _interval(member.test_loss),
            member.teacher or "-",
        )
    return table


def _tier_table(loaded: Population) -> Table:
    table = Table("tier", title="\nTiers", title_justify="left", box=None, pad_edge=False)
    for heading in ("budget", "cost", "test loss, nats"):
        table.add_column(heading, justify="right")
    table.add_column("pool")
    table.add_column("members and weights", overflow="fold")
    for tier in loaded.tiers:
        mixture = "  ".join(f"{name} {weight:.3f}" for name, weight in zip(tier.members, tier.weights, strict=True))
        pool = tier.pool if tier.temperature == 1 else f"{tier.pool}, T={tier.temperature:.3g}"
        table.add_row(
            tier.name, str(tier.budget), f"{tier.relative_cost:.2f}x", _interval(tier.test_loss), pool, mixture
        )
    return table


def _interval(loss: Loss | None) -> str:
    return "-" if loss is None else f"{loss.nats:.4f} [{loss.low:.4f}, {loss.high:.4f}]"
