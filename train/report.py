"""Writes the report of a finished run, DIR/training/report.md and report.png, from the files of the run. Needs no torch.

It shows the losses of members and of their uniform mixture against epochs, the divergence between members, and the learning rate,
weight decay and training loss at every step.
"""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chorus.population import manifest
from chorus.population.files import replacing, write_text
from chorus.train import diversity, heldout
from chorus.train.run import Run, diversity_path, likelihoods_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKDOWN, PNG = Path("training") / "report.md", Path("training") / "report.png"
_COLOURS = ("#1f6feb", "#c2410c", "#15803d", "#7c3aed", "#b45309", "#0e7490")
_GREY = "#9aa5b1"
_MAX_POINTS = 2_000  # per trace; more would only blacken the picture


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished member, in the order in which parallel trajectories finish them."""

    name: str
    trajectory: int
    epochs: float
    """Epochs of its trajectory up to this member."""
    total_epochs: float
    """Epochs of all trajectories up to the end of its cycle."""
    loss: float
    """Nats per token on the selection split."""
    mixture: float
    """Loss of the mixture of all members up to this one, with equal weights."""


def results(run: Run) -> list[Result]:
    """The finished members, with the loss of the mixture after each."""
    found: list[Result] = []
    mean_N: NDArray[np.float64] | None = None
    for member in manifest.load(run.directory).members:
        path = likelihoods_path(run, member.name)
        if member.trajectory is None or member.cycle is None or not path.exists():
            continue
        likelihoods_N = np.load(path)
        count = len(found)
        mean_N = likelihoods_N.astype(np.float64) if mean_N is None else (mean_N * count + likelihoods_N) / (count + 1)
        epochs = float(run.settings.burn_in + (member.cycle + 1) * run.settings.epochs_per_cycle)
        found.append(
            Result(
                name=member.name,
                trajectory=member.trajectory,
                epochs=epochs,
                total_epochs=epochs * run.settings.trajectories,
                loss=heldout.loss(likelihoods_N),
                mixture=heldout.loss(mean_N),
            )
        )
    return found


def write_report(run: Run) -> Path:
    """Write both files of a run with members, the picture only if matplotlib is installed. Returns the path of report.md."""
    found = results(run)
    paths = [diversity_path(run, result.name) for result in found]
    kl_MM = diversity.divergences(paths) if all(path.exists() for path in paths) else None
    drawn = find_spec("matplotlib") is not None
    if drawn:
        _draw(run, found, kl_MM)
    write_text(run.directory / MARKDOWN, _markdown(run, found, kl_MM, drawn))
    return run.directory / MARKDOWN


def _markdown(run: Run, found: list[Result], kl_MM: NDArray[np.float64] | None, drawn: bool) -> str:
    best = min(found, key=lambda result: result.loss)
    tokens = ", ".join(f"{split} {count:,}" for split, count in run.prepared.tokens.items())
    lines = [
        f"# Training of {run.directory.resolve().name}",
        "",
        f"Corpus `{run.settings.corpus}`; tokens: {tokens}. {len(found)} members of {run.shape.num_parameters:,} parameters, "
        f"{run.settings.trajectories} trajectories. Losses in nats per token of the selection split.",
        "",
        f"Best member: {best.name}, {best.loss:.4f}. All {len(found)} members with equal weights: {found[-1].mixture:.4f}.",
        "",
        f"![Losses, diversity, traces]({PNG.name})" if drawn else "No picture: matplotlib is not installed.",
        "",
        "| member | epochs | loss | mixture so far | mean KL to the others |",
        "|---|--:|--:|--:|--:|",
    ]
    for idx, result in enumerate(found):
        kl = "" if kl_MM is None or len(found) < 2 else f"{kl_MM[idx].sum() / (len(found) - 1):.3f}"
        lines.append(f"| {result.name} | {result.epochs:g} | {result.loss:.4f} | {result.mixture:.4f} | {kl} |")
    if kl_MM is not None:
        lines += ["", *_diversity_lines(found, kl_MM)]
    lines += ["", "Settings:", "", "| setting | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in run.settings.as_json().items() if value not in (None, {})]
    return "\n".join(lines) + "\n"


def _diversity_lines(found: list[Result], kl_MM: NDArray[np.float64]) -> list[str]:
    kinds: dict[str, list[float]] = {"neighbours in a trajectory": [], "members of different trajectories": []}
    for i, one in enumerate(found):
        later = [j for j in range(i + 1, len(found)) if found[j].trajectory == one.trajectory]
        kinds["neighbours in a trajectory"] += [float(kl_MM[i, j]) for j in later[:1]]
        others = [j for j, other in enumerate(found) if other.trajectory != one.trajectory]
        kinds["members of different trajectories"] += [float(kl_MM[i, j]) for j in others]
    return [f"Mean KL between {kind}: {np.mean(values):.3f} nats.  " for kind, values in kinds.items() if values]


def _draw(run: Run, found: list[Result], kl_MM: NDArray[np.float64] | None) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), dpi=120, layout="constrained")
    losses, distances, rates, training = figure.subplots(2, 2).flat
    for idx in range(run.settings.trajectories):
        members = [result for result in found if result.trajectory == idx]
        colour = _COLOURS[idx % len(_COLOURS)]
        losses.plot(
            [r.total_epochs for r in members],
            [r.loss for r in members],
            "o-",
            color=colour,
            ms=3,
            lw=1,
            label=f"t{idx}",
        )
    mixtures = {r.total_epochs: r.mixture for r in found}  # the last of each cycle
    losses.plot(list(mixtures), list(mixtures.values()), "ko-", ms=3, lw=1.6, label="all so far, equal weights")
    losses.set(xlabel="epochs of all trajectories", ylabel="selection loss, nats", title="Members and their mixture")
    losses.legend(frameon=False, fontsize=8)
    if kl_MM is None:
        distances.set_axis_off()
    else:
        image = distances.imshow(kl_MM, cmap="viridis")
        figure.colorbar(image, ax=distances, label="KL(row ‖ column), nats")
        distances.set(title="Divergence between members")
        distances.set_xticks(range(len(found)), [r.name for r in found], rotation=90, fontsize=min(8, 160 / len(found)))
        distances.set_yticks(range(len(found)), [r.name for r in found], fontsize=min(8, 160 / len(found)))
    _draw_traces(run, rates, training)
    path = run.directory / PNG
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_traces(run: Run, rates: "Axes", training: "Axes") -> None:
    decay_axes = rates.twinx()
    for idx in range(run.settings.trajectories):
        path = run.directory / "training" / f"t{idx}" / "log.jsonl"
        steps = _steps(path)
        if not steps:
            continue
        epochs = [step["epoch"] for step in steps]
        colour = _COLOURS[idx % len(_COLOURS)]
        training.plot(epochs, [step["cross_entropy"] for step in steps], color=colour, lw=0.6, label=f"t{idx}")
        if idx == 0 or run.settings.vary:  # otherwise all trajectories have the same schedule
            rates.plot(epochs, [step["learning_rate"] for step in steps], color=_COLOURS[0], lw=1)
            decay_axes.plot(epochs, [step["weight_decay"] for step in steps], color=_COLOURS[1], lw=1)
    rates.set(xlabel="epochs of a trajectory", title="Learning rate and weight decay")
    rates.set_ylabel("learning rate", color=_COLOURS[0])
    decay_axes.set_ylabel("weight decay", color=_COLOURS[1])
    training.set(xlabel="epochs of a trajectory", ylabel="cross-entropy, nats", title="Training batches")
    training.legend(frameon=False, fontsize=8)


def _steps(path: Path) -> list[dict[str, float]]:
    """The steps of a log, thinned to about `_MAX_POINTS`."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        lines = [line for line in file if '"event": "step"' in line]
    return [json.loads(line) for line in lines[:: max(1, len(lines) // _MAX_POINTS)]]
