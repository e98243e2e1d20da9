"""`chorus train`: text in, a population out."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from population.errors import ChorusError
from train.settings import Settings, default_max_bytes

if TYPE_CHECKING:
    from train.run import Run

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])
_DEFAULT = Settings(corpus="stdlib")


def _option(name: str, kind: Any, what: str) -> Callable[[_Decorated], _Decorated]:
    default = getattr(_DEFAULT, name.replace("-", "_"))
    return click.option(f"--{name}", type=kind, default=default, show_default=default is not None, help=what)


@click.command()
@click.argument("corpus")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the population.")
@_option("trajectories", int, "Independent chains of members.")
@_option("cycles", int, "Members per trajectory.")
@_option("epochs-per-cycle", int, "Passes over the train split per member.")
@_option("layers", int, "Layers of a member.")
@_option("width", int, "Width of a member.")
@_option("heads", int, "Attention heads of a member.")
@_option("context-length", int, "Longest sequence, in tokens.")
@_option("vocab-size", int, "Tokens of the tokenizer to train; 2,048 by default.")
@_option("tokenizer", str, "Directory or tokenizer.json to use instead of training one.")
@click.option("--max-bytes", type=int, help="Sample of the corpus; by default all of it (of stdlib, 360 kB).")
@_option("split-on", str, "Regular expression: a line where it matches begins a document.")
@_option("text-field", str, "Field of a JSON or Parquet row, or column of a dataset, that holds the text.")
@_option("batch-tokens", int, "Peak batch size in tokens.")
@_option("optimiser", click.Choice(["muon", "adamw"]), "For matrices; the rest is always AdamW.")
@_option("lr", float, "Peak learning rate.")
@_option("weight-decay", float, "Peak weight decay.")
@_option("weight-decay-floor", float, "Share of that peak at a cycle's start; 1 for a flat decay.")
@click.option("--cautious", is_flag=True, help="Decay only where the update pulls towards zero as well.")
@_option("embedding-rate", float, "Learning rate of embeddings and head, in multiples of --lr.")
@_option("distil-alpha", float, "Share of the divergence from the previous member in the loss; 0 for none.")
@_option("distil-temperature", float, "Temperature of that divergence.")
@_option("distil-after", int, "Completed cycles before it counts; 1 by default.")
@_option("perturbation", float, "Noise at the first boundary, in standard deviations of each tensor.")
@click.option("--restart", is_flag=True, help="Begin every cycle from a fresh initialisation: independent models.")
@_option("seed", int, "Seed of sample, initialisations, orders and noise.")
@click.option("--checkpoint-seconds", type=float, default=60.0, show_default=True, help="Seconds between checkpoints.")
@click.option("--tensorboard", is_flag=True, help="Write what is logged to DIR/training/tensorboard as well.")
@click.option("--plan", is_flag=True, help="Print the schedule and an estimate of its cost, and stop.")
def train(
    corpus: str, out: Path | None, checkpoint_seconds: float, tensorboard: bool, plan: bool, **options: object
) -> None:
    """Train a population of models from CORPUS: a text, JSON lines or Parquet file, a folder, a dataset's name, or `stdlib`.

    An interrupted run continues when the same command is run again.
    """
    if options["max_bytes"] is None:
        options["max_bytes"] = default_max_bytes(corpus)
    settings = Settings(corpus=corpus, **options)  # type: ignore[arg-type]
    if plan:
        from train.plan import print_plan

        print_plan(settings)
        return
    if out is None:
        raise click.UsageError("--out is missing: the directory of the population. (With --plan it is not needed.)")
    _train(settings, out, checkpoint_seconds, tensorboard)


def _train(settings: Settings, out: Path, checkpoint_seconds: float, tensorboard: bool) -> None:
    from train import launch, run, watch
    from train.prepare import prepare

    run.check_out(out, settings)
    if tensorboard:
        watch.check_tensorboard()
    try:
        prepared = prepare(settings, out)
    except OSError as error:
        raise ChorusError(launch.disk_sentence(error, out)) from None
    click.echo(_headline(prepared))
    if prepared.finished:
        click.echo(f"{out} is finished already.")
        watch.report(prepared)
        return
    with launch.only_one(out):
        workers = launch.Workers(prepared, checkpoint_seconds=checkpoint_seconds)
        with workers.stopping_on_signals():
            records = workers.records()
            watch.follow(prepared, watch.recorded(prepared, records) if tensorboard else records)
    if not workers.finished:
        click.echo("Stopped with a checkpoint; run the same command again to continue. Finished members stay usable.")
        sys.exit(128 + (workers.interrupted_by or signal.SIGTERM))
    watch.report(prepared)


def _headline(run: "Run") -> str:
    tokens = ", ".join(f"{split} {count:,}" for split, count in run.prepared.tokens.items())
    return (
        f"{run.settings.trajectories} trajectories of {run.settings.cycles} members with {run.shape.num_parameters:,} "
        f"parameters each; tokens: {tokens}"
    )
