"""`chorus train`: trains a population from text."""

import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from chorus.population.errors import ChorusError
from chorus.train.recipes import allocate
from chorus.train.settings import Settings, default_max_bytes
from chorus.train.vary import parse_variations

if TYPE_CHECKING:
    from chorus.train.run import Run

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])
_DEFAULT = Settings(corpus="stdlib")
_SET_BY_RECIPE = ("trajectories", "cycles", "epochs_per_cycle", "burn_in")


class _CountOrSaturation(click.ParamType[int | str]):
    name = "integer|saturation"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return "saturation" if value == "saturation" else int(click.INT.convert(value, param, ctx))


def _option(name: str, kind: Any, text: str) -> Callable[[_Decorated], _Decorated]:
    default = getattr(_DEFAULT, name.replace("-", "_"))
    return click.option(f"--{name}", type=kind, default=default, show_default=default is not None, help=text)


@click.command()
@click.argument("corpus")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the population.")
@click.option(
    "--epochs", type=int, help="Total passes over the train split. A recipe allocates them and the command prints why."
)
@_option("trajectories", int, "Independent chains of members.")
@_option("cycles", int, "Members per trajectory.")
@_option("epochs-per-cycle", int, "Passes over the train split per member.")
@_option("burn-in", int, "Extra epochs of the first cycle.")
@_option("layers", int, "Layers of a member.")
@_option("width", int, "Width of a member.")
@_option("heads", int, "Attention heads of a member.")
@_option("context-length", int, "Maximum sequence length, in tokens.")
@_option("vocab-size", int, "Vocabulary size of the tokenizer to train; 2,048 by default.")
@_option("tokenizer", str, "Directory or tokenizer.json to use instead of training one.")
@click.option("--max-bytes", type=int, help="Bytes of the corpus to sample; by default all of it (stdlib: 360 kB).")
@_option("split-on", str, "Regular expression. Each matching line starts a new document.")
@_option("text-field", str, "Text field of JSON and Parquet rows, or text column of a dataset.")
@_option("batch-tokens", int, "Peak batch size in tokens.")
@_option("micro-batch-tokens", int, "Tokens per forward and backward pass; gradients are accumulated over the batch.")
@_option("optimiser", click.Choice(["muon", "adamw"]), "Optimiser of the matrices; other parameters always use AdamW.")
@_option("lr", float, "Peak learning rate.")
@_option("weight-decay", float, "Peak weight decay.")
@_option(
    "weight-decay-floor", float, "Fraction of the peak weight decay at the start of a cycle; 1 for constant decay."
)
@click.option("--cautious", is_flag=True, help="Decay only elements that the update also moves towards zero.")
@_option("embedding-rate", float, "Learning rate of the embeddings and output head, as a multiple of --lr.")
@_option(
    "distil-alpha",
    float,
    "Weight of the distillation term in the loss; the teacher is the previous member. 0 for no distillation.",
)
@_option("distil-temperature", float, "Distillation temperature.")
@_option(
    "distil-after", _CountOrSaturation(), "Completed cycles before distillation starts, 1 by default; or `saturation`."
)
@_option("perturbation", float, "Noise after the first cycle, in standard deviations of each tensor.")
@click.option("--restart", is_flag=True, help="Start every cycle from a fresh initialisation, for independent models.")
@click.option(
    "--vary",
    multiple=True,
    metavar="NAME=A,B,...",
    help="Values of a setting, assigned to the trajectories in turn; repeatable.",
)
@click.option(
    "--compile/--no-compile",
    default=None,
    help="Use torch.compile, which needs a C++ compiler. By default on GPUs, if it saves time.",
)
@_option("seed", int, "Seed of the corpus sample, initialisations, document orders and noise.")
@click.option("--checkpoint-seconds", type=float, default=60.0, show_default=True, help="Seconds between checkpoints.")
@click.option("--tensorboard", is_flag=True, help="Also write the log to DIR/training/tensorboard.")
@click.option("--plan", is_flag=True, help="Print the schedule and its estimated cost, and exit.")
@click.option("--plan-picture", type=click.Path(path_type=Path), help="PNG file for the schedule drawn by --plan.")
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
    """Train a population of models from CORPUS: a text, JSON lines or Parquet file, a folder, a dataset name, or `stdlib`.

    CORPUS may also be a .bin or .npy file of token ids, or a folder of such files, with the --tokenizer that made them.
    Run the same command again to continue an interrupted run.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    given = {name for name in options if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if options["max_bytes"] is None:
        options["max_bytes"] = default_max_bytes(corpus)
    if epochs is not None:
        options |= _recipe_options(epochs, given, distils=options["distil_alpha"] > 0)
    options["vary"] = _variations(vary, given)
    settings = Settings(corpus=corpus, **options)
    if plan:
        from chorus.train.plan import print_plan

        print_plan(settings, plan_picture)
        return
    if plan_picture is not None:
        raise click.UsageError(
            "--plan-picture needs --plan, whose schedule it draws. Add --plan, or drop --plan-picture."
        )
    if out is None:
        raise click.UsageError("--out is missing: set the directory of the population. (--plan does not need it.)")
    _train(settings, out, checkpoint_seconds, tensorboard)


def _recipe_options(epochs: int, given: set[str], *, distils: bool) -> dict[str, Any]:
    """Print the recipe of a budget, and return the options that it sets.

    Raises:
        ChorusError: the user has set one of these options.
    """
    if clash := sorted(given.intersection(_SET_BY_RECIPE)):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in clash)
        raise ChorusError(f"--epochs {epochs} already sets {flags}. Drop --epochs, or drop {flags}.")
    allocation = allocate(epochs)
    click.echo(allocation.describe(epochs))
    chosen: dict[str, Any] = {name: getattr(allocation, name) for name in _SET_BY_RECIPE}
    if "distil_after" not in given and distils:
        chosen |= (
            {"distil_after": allocation.distil_after} if allocation.distil_after is not None else {"distil_alpha": 0.0}
        )
    return chosen


def _variations(texts: tuple[str, ...], given: set[str]) -> dict[str, Any]:
    variations = parse_variations(texts)
    if clash := sorted(given.intersection(variations)):
        flag = clash[0].replace("_", "-")
        raise ChorusError(f"--{flag} contradicts --vary {flag}=..., which sets it for every trajectory. Drop one.")
    return variations


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
        raise ChorusError(launch.disk_error_message(error, out)) from None
    click.echo(_headline(prepared))
    if prepared.finished:
        click.echo(f"{out} is already finished.")
        watch.report(prepared)
        return
    with launch.exclusive(out):
        workers = launch.Workers(prepared, checkpoint_seconds=checkpoint_seconds)
        with workers.stopping_on_signals():
            records = workers.records()
            watch.follow(prepared, watch.recorded(prepared, records) if tensorboard else records)
    if not workers.finished:
        click.echo(
            "Stopped after writing a checkpoint. Run the same command again to continue. Finished members stay usable."
        )
        sys.exit(128 + (workers.interrupted_by or signal.SIGTERM))
    watch.report(prepared)


def _headline(run: "Run") -> str:
    tokens = ", ".join(f"{split} {count:,}" for split, count in run.prepared.tokens.items())
    empty = run.prepared.empty_documents
    skipped = (
        f"\nSkipped {empty} document{'s' * (empty > 1)} without text. "
        "If this is unexpected, check the corpus and --text-field."
    )
    return (
        f"{run.settings.trajectories} trajectories of {run.settings.cycles} members with {run.shape.num_parameters:,} "
        f"parameters each; tokens: {tokens}{skipped if empty else ''}"
    )
