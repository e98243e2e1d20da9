"""`chorus train --plan`: prints the schedule of each cycle, and the cost estimated from a few steps of the real model."""

import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from chorus.train import drawing
from chorus.train import run as runs
from chorus.train.launch import plan_processes
from chorus.train.prepare import check_fits_a_batch, disk_bytes, read_corpus
from chorus.train.schedule import Cycle, Schedule
from chorus.train.settings import Settings
from chorus.train.shape import Shape

_LONG_STEP_SECONDS = 3.0
_TIMED_STEPS = 3
_BARS = "▁▂▃▄▅▆▇█"


def print_plan(settings: Settings, picture: Path | None = None) -> None:
    """Print the plan of a run. Writes no files except the picture, if requested."""
    with (
        tempfile.TemporaryDirectory(prefix="chorus-plan-") as name,
        read_corpus(settings, Path(name)) as (tokenizer, tokenised),
    ):
        train_tokens = tokenised.counts()["train"]
    check_fits_a_batch(settings, train_tokens)
    shape = runs.make_shape(settings, tokenizer.vocab_size)
    schedules = {
        label: runs.make_schedule(settings.of_trajectory(idxs[0]), train_tokens)
        for label, idxs in _group_by_variation(settings).items()
    }
    console = Console()
    for label, schedule in schedules.items():
        click.echo(f"{label}\n" if len(schedules) > 1 else "", nl=False)
        console.print(_table(schedule, schedule.cycles()))
        click.echo("\n" + drawing.in_terminal(schedule, width=min(100, console.width)) + "\n")
    if picture is not None:
        drawing.as_png(schedules, picture)
        click.echo(f"Picture: {picture}\n")

    world, threads = plan_processes(settings.trajectories)
    seconds, distilled_seconds = _time_steps(settings, shape, threads)
    all_cycles = [
        cycle
        for idx in range(settings.trajectories)
        for cycle in runs.make_schedule(settings.of_trajectory(idx), train_tokens).cycles()
    ]
    total_s = sum(
        cycle.steps * (seconds if cycle.distils is False else distilled_seconds) * cycle.batch_rows
        for cycle in all_cycles
    )
    tokens = sum(cycle.steps * cycle.batch_rows * settings.context_length for cycle in all_cycles)
    click.echo(
        f"{settings.trajectories} trajectories of {settings.cycles} members with {shape.num_parameters:,} parameters; "
        f"{train_tokens:,} train tokens, {tokens:,} tokens in all\n"
        f"{world} process{'es' if world > 1 else ''} of {threads} thread{'s' if threads > 1 else ''}: "
        f"about {total_s / world / 60:.1f} min, "
        f"{tokens * shape.flops_per_token / 1e12:,.0f} TFLOP without teachers; "
        f"at most {disk_bytes(settings, shape, train_tokens) / 1e6:,.0f} MB of disk"
    )


def _group_by_variation(settings: Settings) -> dict[str, list[int]]:
    """Group trajectories of equal settings, under a label of the settings that vary: `trajectories 0, 2: lr 0.01`."""
    groups: dict[str, list[int]] = {}
    for idx in range(settings.trajectories):
        trajectory = settings.of_trajectory(idx)
        groups.setdefault(", ".join(f"{name} {getattr(trajectory, name)}" for name in settings.vary), []).append(idx)
    return {
        f"trajector{'ies' if len(idxs) > 1 else 'y'} {', '.join(map(str, idxs))}: {values}": idxs
        for values, idxs in groups.items()
    }


def _table(schedule: Schedule, cycles: list[Cycle]) -> Table:
    table = Table("cycle", box=None, pad_edge=False)
    for heading in ("epochs", "steps", "batch, tokens", "rate", "decay", "teacher", "sigma"):
        table.add_column(heading, justify="right")
    for cycle in cycles:
        rates = [schedule.rates(cycle, step) for step in range(cycle.steps)]
        table.add_row(
            str(cycle.idx),
            f"{cycle.first_epoch + 1}-{cycle.first_epoch + cycle.epochs}",
            str(cycle.steps),
            f"{cycle.batch_rows * schedule.context_length:,}",
            _trace([rate for rate, _ in rates]),
            _trace([decay for _, decay in rates]),
            "when saturated" if cycle.distils is None else "previous" if cycle.distils else "-",
            "-" if cycle.sigma_after is None else f"{cycle.sigma_after:.3f}",
        )
    return table


def _trace(values: list[float], width: int = 8) -> str:
    """`█▇▆▅▄▃▂▁`: a value over a cycle, relative to its peak in that cycle."""
    picked = [values[idx * (len(values) - 1) // (width - 1)] for idx in range(width)]
    top = max(values) or 1.0
    return "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in picked)


def _time_steps(settings: Settings, shape: Shape, threads: int) -> tuple[float, float]:
    """Seconds per row of a batch, without and with a teacher, for one process that runs alone on `threads` threads."""
    import torch

    from chorus.train.loss import Distillation, Teacher, next_token_loss
    from chorus.train.model import Llama
    from chorus.train.perturb import generator_for
    from chorus.train.schedule import batch_rows
    from chorus.train.step import autocast, make_optimiser, micro_tokens
    from chorus.train.worker import choose_device

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    device = choose_device(0)
    model = Llama(shape).to(device)
    model.initialise(generator_for(settings.seed))
    optimiser = make_optimiser(model, settings)
    rows = batch_rows(min(settings.batch_tokens, micro_tokens(settings, device)), settings.context_length)
    tokens = torch.randint(shape.vocab_size, (rows, shape.context_length + 1), generator=generator_for(0)).to(device)

    def step(distils: bool) -> float:
        with autocast(device):
            hidden = model(tokens[:, :-1]).flatten(0, 1)
            head = model.lm_head.weight
            distillation = None
            if distils:
                with torch.no_grad():
                    teacher_hidden = model(tokens[:, :-1]).flatten(0, 1)
                teacher = Teacher(hidden_ND=teacher_hidden, head_VD=head.detach())
                distillation = Distillation(teachers=(teacher,), alpha=0.5, temperature=1.0)
            loss, _ = next_token_loss(hidden, head, tokens[:, 1:].flatten(), distillation)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step(learning_rate=settings.lr, weight_decay=settings.weight_decay)
        return float(loss.detach())

    def timed(distils: bool) -> float:
        started = time.perf_counter()
        step(distils)
        if (first := time.perf_counter() - started) > _LONG_STEP_SECONDS:
            return first / rows  # too slow to repeat
        started = time.perf_counter()
        for _ in range(_TIMED_STEPS):
            step(distils)
        return (time.perf_counter() - started) / _TIMED_STEPS / rows

    times = timed(False), timed(True)
    torch.set_num_threads(before)
    return times
