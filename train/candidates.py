"""`chorus distil` and `chorus average`: members made of a finished population, for `chorus prior fit` to judge."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.shell import command

if TYPE_CHECKING:
    from chorus.train.run import Run


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--name", default="student", show_default=True, help="Of the new member.")
@click.option("--tier", help="The mixture that teaches; by default the dearest tier.")
@click.option("--epochs", type=int, help="Passes over the train split; by default those of one trajectory.")
@click.option("--layers", type=int, help="Layers of the student; by default a member's.")
@click.option("--width", type=int, help="Width of the student; by default a member's.")
@click.option("--heads", type=int, help="Attention heads of the student; by default a member's.")
@click.option("--alpha", type=float, default=0.9, show_default=True, help="Share of the divergence in the loss.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Temperature of that divergence.")
@click.option("--checkpoint-seconds", type=float, default=60.0, show_default=True, help="Seconds between checkpoints.")
def distil(directory: Path, name: str, tier: str | None, checkpoint_seconds: float, **options: float | None) -> None:
    """Distil the mixture of the population in DIRECTORY into one student, and add it as a member.

    An interrupted run continues when the same command is run again.
    """
    import signal

    from chorus.train import launch, student, watch
    from chorus.train.run import Run

    run = Run.load(directory)
    if not run.finished:
        raise ChorusError(f"{directory} is not finished. Run `chorus train` on it to the end first.")
    population = manifest.load(directory)
    own = run.settings
    epochs = options.pop("epochs")
    plan = student.make_plan(
        run,
        population.tiers[-1] if tier is None else population.tier(tier),
        epochs=own.epochs if epochs is None else int(epochs),
        **{key: getattr(own, key, None) if value is None else value for key, value in options.items()},  # type: ignore[arg-type]
    )
    with launch.only_one(directory):
        plan = student.claim(run, name, plan)
        one = student.student_run(run, plan)
        click.echo(f"{name}: {one.shape.num_parameters:,} parameters, taught by {len(plan.teachers)} members")
        workers = launch.Workers(one, checkpoint_seconds=checkpoint_seconds, student=name)
        with workers.stopping_on_signals():
            watch.follow(one, workers.records())
    if not workers.finished:
        click.echo("Stopped with a checkpoint; run the same command again to continue.")
        sys.exit(128 + (workers.interrupted_by or signal.SIGTERM))
    _report(run, [name])


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--last", type=int, default=3, show_default=True, help="Members of each trajectory that are averaged.")
def average(directory: Path, last: int) -> None:
    """Add the mean of the weights of each trajectory's last members to the population in DIRECTORY.

    An interrupted run continues when the same command is run again.
    """
    import torch

    from chorus.train import launch
    from chorus.train.average import average as mean
    from chorus.train.average import missing_averages
    from chorus.train.member import add_member
    from chorus.train.run import Run

    run = Run.load(directory)
    missing_averages(run, last)  # refused before anything is written
    with launch.only_one(directory):
        missing = missing_averages(run, last)
        for trajectory, name in missing.items():
            model, epochs = mean(run, trajectory, last), float(run.settings.epochs)
            add_member(model, run, name, torch.device("cpu"), epochs=epochs)
    _report(run, list(missing.values()))


def _report(run: "Run", names: list[str]) -> None:
    """The new members beside those that were there, on the selection split."""
    import numpy as np

    from chorus.train import heldout
    from chorus.train.run import likelihoods_path

    known = {
        member.name: np.load(likelihoods_path(run, member.name))
        for member in manifest.load(run.directory).members
        if likelihoods_path(run, member.name).exists()
    }
    trained = {name: row for name, row in known.items() if name not in names}
    best = min(trained, key=lambda name: heldout.loss(trained[name]))
    for name in names:
        click.echo(f"{name}: {heldout.loss(known[name]):.4f} nats on the selection split")
    click.echo(f"best of the others: {best}, {heldout.loss(trained[best]):.4f}; all of them under equal weights: "
               f"{heldout.mixture_loss(list(trained.values())):.4f}")  # fmt: skip
    click.echo(f"Next: {command('chorus', 'prior', 'fit', run.directory)}")
