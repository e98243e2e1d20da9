"""`chorus distil` and `chorus average`: add members made from a finished population. `chorus prior fit` then weighs them."""

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
@click.option("--name", default="student", show_default=True, help="Name of the new member.")
@click.option("--tier", help="Tier to distil; by default the most expensive one.")
@click.option("--epochs", type=int, help="Passes over the train split; by default as many as one trajectory.")
@click.option("--layers", type=int, help="Layers of the student; by default as in the members.")
@click.option("--width", type=int, help="Width of the student; by default as in the members.")
@click.option("--heads", type=int, help="Attention heads of the student; by default as in the members.")
@click.option(
    "--alpha", type=float, default=0.9, show_default=True, help="Weight of the distillation term in the loss."
)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Distillation temperature.")
@click.option("--checkpoint-seconds", type=float, default=60.0, show_default=True, help="Seconds between checkpoints.")
def distil(directory: Path, name: str, tier: str | None, checkpoint_seconds: float, **options: float | None) -> None:
    """Distil the mixture of the population in DIRECTORY into one student, and add it as a member.

    Run the same command again to continue an interrupted run.
    """
    import signal

    from chorus.train import launch, student, watch
    from chorus.train.run import Run

    run = Run.load(directory)
    if not run.finished:
        raise ChorusError(f"{directory} is not finished. Finish it with `chorus train` first.")
    population = manifest.load(directory)
    settings = run.settings
    epochs = options.pop("epochs")
    plan = student.make_plan(
        run,
        population.tiers[-1] if tier is None else population.tier(tier),
        epochs=settings.epochs if epochs is None else int(epochs),
        **{key: getattr(settings, key, None) if value is None else value for key, value in options.items()},  # type: ignore[arg-type]
    )
    with launch.exclusive(directory):
        plan = student.claim(run, name, plan)
        student_run = student.student_run(run, plan)
        click.echo(
            f"{name}: {student_run.shape.num_parameters:,} parameters, distilled from {len(plan.teachers)} members"
        )
        workers = launch.Workers(student_run, checkpoint_seconds=checkpoint_seconds, student=name)
        with workers.stopping_on_signals():
            watch.follow(student_run, workers.records())
    if not workers.finished:
        click.echo("Stopped after writing a checkpoint. Run the same command again to continue.")
        sys.exit(128 + (workers.interrupted_by or signal.SIGTERM))
    _report(run, [name])


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--last", type=int, default=3, show_default=True, help="Members of each trajectory to average.")
def average(directory: Path, last: int) -> None:
    """Add the mean of the weights of each trajectory's last members to the population in DIRECTORY.

    Run the same command again to continue an interrupted run.
    """
    import torch

    from chorus.train import launch
    from chorus.train.average import average as mean
    from chorus.train.average import missing_averages
    from chorus.train.member import add_member
    from chorus.train.run import Run

    run = Run.load(directory)
    missing_averages(run, last)  # raises before anything is written
    with launch.exclusive(directory):
        missing = missing_averages(run, last)
        for trajectory, name in missing.items():
            model, epochs = mean(run, trajectory, last), float(run.settings.epochs)
            add_member(model, run, name, torch.device("cpu"), epochs=epochs)
    _report(run, list(missing.values()))


def _report(run: "Run", names: list[str]) -> None:
    """Print the losses of the new and the earlier members on the selection split."""
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
    click.echo(f"best of the others: {best}, {heldout.loss(trained[best]):.4f}; all of them with equal weights: "
               f"{heldout.mixture_loss(list(trained.values())):.4f}")  # fmt: skip
    click.echo(f"Next: {command('chorus', 'prior', 'fit', run.directory)}")
