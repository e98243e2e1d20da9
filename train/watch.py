"""Shows the progress of a run: bars in a terminal, plain lines elsewhere, and a table at the end."""

import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.shell import command
from chorus.train import heldout
from chorus.train import report as reports
from chorus.train.log import Record
from chorus.train.run import Run, likelihoods_path

_LINE_EVERY_SECONDS = 10.0
_SMOOTHING = 0.9


def follow(run: Run, records: Iterable[Record]) -> None:
    """Show records as they arrive, until the last one."""
    console = Console()
    if console.is_terminal:
        _follow_bars(run, records, console)
    else:
        _follow_lines(run, records)


def check_tensorboard() -> None:
    """Check that `--tensorboard` can work, before any compute is spent.

    Raises:
        ChorusError: tensorboard is not installed.
    """
    if find_spec("tensorboard") is None:
        raise ChorusError(
            "--tensorboard needs the package tensorboard, which is not installed. "
            "Run `pip install tensorboard`, or drop --tensorboard."
        )


def recorded(run: Run, records: Iterable[Record]) -> Iterator[Record]:
    """Yield the records unchanged, and write them to DIR/training/tensorboard, with one folder per trajectory."""
    from torch.utils.tensorboard import SummaryWriter

    directory = run.directory / "training" / "tensorboard"
    writers = [SummaryWriter(directory / f"t{idx}") for idx in range(run.settings.trajectories)]
    last_step = [0] * len(writers)
    for record in records:
        idx = int(record["trajectory"])
        if record["event"] == "step":
            last_step[idx] = int(record["step"])
            for key in ("loss", "cross_entropy", "learning_rate", "weight_decay", "gradient_norm"):
                writers[idx].add_scalar(f"train/{key}", float(record[key]), last_step[idx])
        elif record["event"] == "member":
            loss = float(record["selection_loss"])
            writers[idx].add_scalar("selection/loss", loss, last_step[idx])
        yield record
    for writer in writers:
        writer.close()


class Smooth:
    """Exponential moving averages of a trajectory's loss and speed."""

    def __init__(self) -> None:
        self.loss = self.tokens_per_s = float("nan")
        self.steps_per_s = float("nan")

    def add(self, record: Record) -> None:
        """Add one step."""
        seconds = max(float(record["seconds"]), 1e-6)
        self.loss = _smoothed(self.loss, float(record["cross_entropy"]))
        self.tokens_per_s = _smoothed(self.tokens_per_s, float(record["tokens"]) / seconds)
        self.steps_per_s = _smoothed(self.steps_per_s, 1 / seconds)


def _follow_bars(run: Run, records: Iterable[Record], console: Console) -> None:
    totals, cycles = _totals(run), run.settings.cycles
    columns = (
        TextColumn("trajectory {task.fields[trajectory]}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("cycle {task.fields[cycle]}"), TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[tokens_per_s]:,.0f} tokens/s"), TimeRemainingColumn(),
    )  # fmt: skip
    smooth = [Smooth() for _ in range(run.settings.trajectories)]
    with Progress(*columns, console=console) as progress:
        tasks: list[TaskID] = [
            progress.add_task("", total=totals[idx], trajectory=idx, cycle=f"-/{cycles}", loss=0.0, tokens_per_s=0.0)
            for idx in range(run.settings.trajectories)
        ]
        for record in records:
            idx = int(record["trajectory"])
            if record["event"] == "member":
                progress.console.print(_member_line(record), highlight=False)
                continue
            smooth[idx].add(record)
            progress.update(
                tasks[idx],
                completed=int(record["step"]) + 1,
                cycle=f"{int(record['cycle']) + 1}/{cycles}",
                loss=smooth[idx].loss,
                tokens_per_s=smooth[idx].tokens_per_s,
            )


def _follow_lines(run: Run, records: Iterable[Record]) -> None:
    totals, cycles = _totals(run), run.settings.cycles
    smooth = [Smooth() for _ in range(run.settings.trajectories)]
    shown_at = [time.monotonic()] * run.settings.trajectories
    for record in records:
        idx = int(record["trajectory"])
        if record["event"] == "member":
            click.echo(_member_line(record))
            continue
        smooth[idx].add(record)
        if time.monotonic() - shown_at[idx] < _LINE_EVERY_SECONDS:
            continue
        shown_at[idx] = time.monotonic()
        left_s = (totals[idx] - int(record["step"]) - 1) / smooth[idx].steps_per_s
        click.echo(
            f"trajectory {idx}  step {int(record['step']) + 1}/{totals[idx]}  cycle {int(record['cycle']) + 1}/{cycles}  "
            f"epoch {float(record['epoch']):.1f}  loss {smooth[idx].loss:.3f}  "
            f"{smooth[idx].tokens_per_s:,.0f} tokens/s  {left_s / 60:.1f} min left"
        )


def report(run: Run) -> None:
    """Print the held-out losses of the members and of the uniform mixture. Write the report if it does not exist."""
    population = manifest.load(run.directory)
    table = Table("member", box=None, pad_edge=False)
    for heading in ("epochs", "selection loss, nats"):
        table.add_column(heading, justify="right")
    rows = []
    for member in population.members:
        path = likelihoods_path(run, member.name)
        if path.exists():
            rows.append(np.load(path))
            table.add_row(member.name, f"{member.epochs:g}", f"{heldout.loss(rows[-1]):.4f}")
    if len(rows) > 1:
        table.add_row(f"[bold]all {len(rows)}, uniform weights", "", f"[bold]{heldout.mixture_loss(rows):.4f}")
    console = Console()
    console.print(table)
    if not (run.directory / reports.MARKDOWN).exists():
        reports.write_report(run)
    click.echo(f"\nReport: {run.directory / reports.MARKDOWN}")
    click.echo(f"Next: {command('chorus', 'prior', 'fit', run.directory)}")


def _totals(run: Run) -> list[int]:
    """Steps of every trajectory."""
    last = [run.schedule(idx).cycles()[-1] for idx in range(run.settings.trajectories)]
    return [cycle.first_step + cycle.steps for cycle in last]


def _member_line(record: Record) -> str:
    return f"member {record['name']}: {float(record['selection_loss']):.4f} nats on the selection split"


def _smoothed(mean: float, value: float) -> float:
    return value if mean != mean else _SMOOTHING * mean + (1 - _SMOOTHING) * value
