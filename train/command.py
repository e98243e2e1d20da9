"""`chorus train`: text in, a population out."""

import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from chorus.population.errors import ChorusError
from chorus.train.recipes import deal
from chorus.train.settings import Settings, default_max_bytes
from chorus.train.vary import parse_variations

if TYPE_CHECKING:
    from chorus.train.run import Run

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])
_DEFAULT = Settings(corpus="stdlib")
_DEALT = ("trajectories", "cycles", "epochs_per_cycle", "burn_in")  # by --epochs


class _CountOrSaturation(click.ParamType[int | str]):
    name = "integer|saturation"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return "saturation" if value == "saturation" else int(click.INT.convert(value, param, ctx))


def _option(name: str, kind: Any, what: str) -> Callable[[_Decorated], _Decorated]:
    default = getattr(_DEFAULT, name.replace("-", "_"))
    return click.option(f"--{name}", type=kind, default=default, show_default=default is not None, help=what)


@click.command()
@click.argument("corpus")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the population.")
@click.option("--epochs", type=int, help="Passes over the train split in all: a recipe deals them out, and says why.")
@_option("trajectories", int, "Independent chains of members.")
@_option("cycles", int, "Members per trajectory.")
@_option("epochs-per-cycle", int, "Passes over the train split per member.")
@_option("burn-in", int, "Epochs of the first cycle beyond those of the others.")
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
@_option("micro-batch-tokens", int, "Tokens that go through the model at once; gradients add up to the batch.")
@_option("optimiser", click.Choice(["muon", "adamw"]), "For matrices; the rest is always AdamW.")
@_option("lr", float, "Peak learning rate.")
@_option("weight-decay", float, "Peak weight decay.")
@_option("weight-decay-floor", float, "Share of that peak at a cycle's start; 1 for a flat decay.")
@click.option("--cautious", is_flag=True, help="Decay only where the update pulls towards zero as well.")
@_option("embedding-rate", float, "Learning rate of embeddings and head, in multiples of --lr.")
@_option("distil-alpha", float, "Share of the divergence from the previous member in the loss; 0 for none.")
@_option("distil-temperature", float, "Temperature of that divergence.")
@_option("distil-after", _CountOrSaturation(), "Completed cycles before it counts, 1 by default; or `saturation`.")
@_option("perturbation", float, "Noise at the first boundary, in standard deviations of each tensor.")
@click.option("--restart", is_flag=True, help="Begin every cycle from a fresh initialisation: independent models.")
@click.option(
    "--vary", multiple=True, metavar="NAME=A,B,...", help="Values that trajectories take in turn; repeatable."
)
@click.option(
    "--compile/--no-compile",
    default=None,
    help="By torch.compile, which needs a C++ compiler; by default on GPUs, when it pays.",
)
@_option("seed", int, "Seed of sample, initialisations, orders and noise.")
@click.option("--checkpoint-seconds", type=float, default=60.0, show_default=True, help="Seconds between checkpoints.")
@click.option("--tensorboard", is_flag=True, help="Write what is logged to DIR/training/tensorboard as well.")
@click.option("--plan", is_flag=True, help="Print and draw the schedule and an estimate of its cost, and stop.")
@click.option("--plan-picture", type=click.Path(path_type=Path), help="Where --plan puts the drawing as a PNG as well.")
@click.pass_context
def train(
    context: click.Context,
    /,
    corpus: str,
    out: Path | None,
    epochs: int | None,
    vary: tuple[str, ...],
    checkpoint_seconds: float,
    tensorboard: bool,
    plan: bool,
    plan_picture: Path | None,
    **options: Any,
) -> None:
    """Train a population of models from CORPUS: a text, JSON lines or Parquet file, a folder, a dataset's name, or `stdlib`.

    Tokens are taken too: a .bin or .npy file of them, or a folder of such files, with the --tokenizer that made them.
    An interrupted run continues when the same command is run again.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    given = {name for name in options if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if options["max_bytes"] is None:
        options["max_bytes"] = default_max_bytes(corpus)
    if epochs is not None:
        options |= _dealt(epochs, given, distils=options["distil_alpha"] > 0)
    options["vary"] = _varied(vary, given)
    settings = Settings(corpus=corpus, **options)
    if plan:
        from chorus.train.plan import print_plan

        print_plan(settings, plan_picture)
        return
    if plan_picture is not None:
        raise click.UsageError("--plan-picture draws what --plan prints. Add --plan, or leave it out.")
    if out is None:
        raise click.UsageError("--out is missing: the directory of the population. (With --plan it is not needed.)")
    _train(settings, out, checkpoint_seconds, tensorboard)


def _dealt(epochs: int, given: set[str], *, distils: bool) -> dict[str, Any]:
    """What the recipe of a budget sets, after saying so.

    Raises:
        ChorusError: the user has set some of it.
    """
    if clash := sorted(given.intersection(_DEALT)):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in clash)
        raise ChorusError(f"--epochs {epochs} chooses {flags} itself. Drop --epochs, or drop {flags}.")
    dealt = deal(epochs)
    click.echo(dealt.sentence(epochs))
    chosen: dict[str, Any] = {name: getattr(dealt, name) for name in _DEALT}
    if "distil_after" not in given and distils:
        chosen |= {"distil_after": dealt.distil_after} if dealt.distil_after is not None else {"distil_alpha": 0.0}
    return chosen


def _varied(texts: tuple[str, ...], given: set[str]) -> dict[str, Any]:
    varied = parse_variations(texts)
    if clash := sorted(given.intersection(varied)):
        flag = clash[0].replace("_", "-")
        raise ChorusError(f"--{flag} contradicts --vary {flag}=..., which sets it for every trajectory. Drop one.")
    return varied


def _train(settings: Settings, out: Path, checkpoint_seconds: float, tensorboard: bool) -> None:
    from chorus.train import launch, run, watch
    from chorus.train.prepare import prepare

    run.check_out(out, settings)
    if settings.compile:
        launch.check_compiler()
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
    empty = run.prepared.empty_documents
    left_out = (
        f"\n{empty} document{'s hold' if empty > 1 else ' holds'} no text and stay{'s' * (empty == 1)} out. "
        "If that is not as it should be, check the corpus and --text-field."
    )
    return (
        f"{run.settings.trajectories} trajectories of {run.settings.cycles} members with {run.shape.num_parameters:,} "
        f"parameters each; tokens: {tokens}{left_out if empty else ''}"
    )
