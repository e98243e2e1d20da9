"""Draws a schedule in a terminal and as a PNG."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from chorus.population.files import replacing
from chorus.train.schedule import Schedule

_BLOCKS = " ▁▂▃▄▅▆▇█"
_COLOURS = ("#1f6feb", "#c2410c", "#15803d", "#7c3aed")


@dataclass(frozen=True, kw_only=True)
class Traces:
    """The values of a schedule over a trajectory, with one list element per step."""

    epochs: list[float]
    """Passes over the train split before each step."""
    learning_rate: list[float]
    weight_decay: list[float]
    batch_tokens: list[float]
    noise: list[tuple[float, float]]
    """(epoch, sigma) of every perturbation."""
    distils_from: float | None
    """Epoch at which distillation starts; None if it never does, or if that depends on losses (`saturation`)."""

    @classmethod
    def of(cls, schedule: Schedule) -> Self:
        """Evaluate a schedule at every step."""
        cycles = schedule.cycles()
        steps = [(cycle, step) for cycle in cycles for step in range(cycle.steps)]
        rates = [schedule.rates(cycle, step) for cycle, step in steps]
        return cls(
            epochs=[cycle.first_epoch + step / cycle.steps_per_epoch for cycle, step in steps],
            learning_rate=[rate for rate, _ in rates],
            weight_decay=[decay for _, decay in rates],
            batch_tokens=[float(cycle.batch_rows * schedule.context_length) for cycle, _ in steps],
            noise=[
                (cycle.first_epoch + cycle.epochs, cycle.sigma_after)
                for cycle in cycles
                if cycle.sigma_after is not None
            ],
            distils_from=next((float(cycle.first_epoch) for cycle in cycles if cycle.distils), None),
        )


def chart(values: list[float], *, width: int, height: int) -> list[str]:
    """Lines of block characters, top first. Each column shows the mean of its part of the values, from 0 at the bottom."""
    edges = [idx * len(values) // width for idx in range(width + 1)]
    columns = [values[a : max(b, a + 1)] for a, b in itertools.pairwise(edges)]
    top = max(values) or 1.0
    eighths = [round(sum(column) / len(column) / top * 8 * height) for column in columns]
    return ["".join(_BLOCKS[min(8, max(0, filled - 8 * row))] for filled in eighths) for row in reversed(range(height))]


def in_terminal(schedule: Schedule, *, width: int) -> str:
    """Charts of learning rate, weight decay and batch size over a trajectory."""
    traces = Traces.of(schedule)
    charts = (
        ("learning rate", traces.learning_rate, 4),
        ("weight decay", traces.weight_decay, 2),
        ("batch, tokens", traces.batch_tokens, 1),
    )  # fmt: skip
    lines = []
    for name, values, height in charts:
        for idx, line in enumerate(chart(values, width=width - 24, height=height)):
            label = f"{name:>14} {max(values):<8.4g}" if idx == 0 else " " * 23
            lines.append(f"{label} {line.rstrip()}")
    last = f"{schedule.cycles()[-1].first_epoch + schedule.cycles()[-1].epochs}"
    return "\n".join([*lines, f"{'epochs':>23} 0{last:>{width - 25}}"])


def as_png(schedules: dict[str, Schedule], path: Path) -> None:
    """Plot learning rate, weight decay, batch size and noise of named schedules against epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), dpi=120, layout="constrained")
    axes = figure.subplots(4, 1, sharex=True)
    for idx, (name, schedule) in enumerate(schedules.items()):
        traces, colour = Traces.of(schedule), _COLOURS[idx % len(_COLOURS)]
        for ax, values in zip(axes, (traces.learning_rate, traces.weight_decay, traces.batch_tokens), strict=False):
            ax.plot(traces.epochs, values, color=colour, lw=1, label=name)
        if traces.noise:
            axes[3].vlines(*zip(*((at, 0, sigma) for at, sigma in traces.noise), strict=True), color=colour, lw=2)
        if traces.distils_from is not None:
            axes[0].axvline(traces.distils_from, color=colour, lw=0.8, ls=":")
    for ax, title in zip(
        axes, ("learning rate (dotted: distillation starts)", "weight decay", "batch, tokens", "noise"), strict=True
    ):
        ax.set_title(title, fontsize=9, loc="left")
        ax.set_ylim(bottom=0)
    axes[3].set_xlabel("epochs of a trajectory")
    if len(schedules) > 1:
        axes[0].legend(frameon=False, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
