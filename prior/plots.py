"""Plots of a fit: loss against cost, and the members' weights and correlations."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chorus.population.files import replacing
from chorus.population.manifest import Population
from chorus.prior.bootstrap import Interval
from chorus.prior.fit import PriorFit
from chorus.prior.frontier import knee
from chorus.prior.results import cost

MEMBERS_PNG = "members.png"
FRONTIER_PNG = "frontier.png"
INK, BLUE, GREY, RED = "#1f2933", "#1f6feb", "#9aa5b1", "#c2410c"
STYLE = {
    "font.size": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
}


def save_frontier(out: Path, population: Population, fit: PriorFit) -> None:
    """Plot loss against relative cost: nested path with intervals, tiers, knee, single members and the reference's rule."""
    costs = [cost(population, mixture) for mixture in fit.path]
    losses = [mixture.test.nats for mixture in fit.path]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 5), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        _draw_path(axes, costs, losses, [mixture.to_best_single for mixture in fit.path])
        single_costs = [population.relative_cost((member.name,)) for member in population.members]
        single_losses = [single.nats for single in fit.singles]
        axes.scatter(single_costs, single_losses, s=22, color=GREY, alpha=0.8, lw=0, label="single members", zorder=2)
        axes.plot(
            costs,
            [i.nats for i in fit.reference],
            color=RED,
            lw=1.2,
            ls=(0, (4, 2)),
            label="reference's rule",
            zorder=2,
        )
        axes.axhline(fit.uniform.nats, color=GREY, lw=1, ls=":", zorder=1, label="all members, equal weights")
        _label_tiers(axes, population, fit)
        knee_idx = knee(costs, losses)
        if knee_idx is not None:
            axes.plot(
                costs[knee_idx],
                losses[knee_idx],
                "o",
                ms=15,
                mfc="none",
                mec=INK,
                mew=1.2,
                label=f"knee: {knee_idx + 1} members",
            )
        _zoom(axes, fit, single_losses)
        axes.set_xlabel("cost per token, forward passes of the largest member")
        axes.set_ylabel("loss on the test split, nats per token")
        axes.set_title(f"{population.name}: what each budget buys", loc="left", fontweight="bold", fontsize=12)
        axes.grid(axis="y", color="#e4e7eb", lw=0.8, zorder=0)
        axes.legend(frameon=False, loc="upper right")
        with replacing(out / FRONTIER_PNG) as temporary:
            figure.savefig(temporary, format="png")


def save_members(out: Path, population: Population, fit: PriorFit) -> None:
    """Plot each member's weight in each tier and the correlation of members' losses, ordered by trajectory and cycle."""
    order = sorted(
        range(len(population.members)),
        key=lambda idx: (population.members[idx].trajectory or 0, population.members[idx].cycle or 0, idx),
    )
    labels = [population.members[idx].name for idx in order]
    weights = np.zeros((len(fit.tiers) + 1, len(order)))
    for row, tier in zip(weights, fit.tiers, strict=False):
        row[[order.index(member) for member in tier.mixture.members]] = tier.mixture.weights
    weights[-1] = fit.all_members.weights_M[order]
    correlation = fit.member_stats.correlation_MM[np.ix_(order, order)]
    size = min(max(4.2, 0.32 * len(order)), 12)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2 * size + 1.2, size + 0.8), dpi=120, layout="constrained")
        left, right = figure.subplots(1, 2)
        rows = [*(tier.name for tier in fit.tiers), "all members"]
        left.imshow(weights.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        _label(left, rows, labels, "Weight of each member")
        _annotate_cells(left, weights.T)
        between = np.where(np.eye(len(order), dtype=bool), np.nan, correlation)
        colours = mpl.colormaps["Blues"].with_extremes(bad="#e4e7eb")
        shown = right.imshow(between, cmap=colours)
        _label(right, labels, labels, "Correlation of losses over test tokens")
        figure.colorbar(shown, ax=right, shrink=0.6).outline.set_visible(False)
        with replacing(out / MEMBERS_PNG) as temporary:
            figure.savefig(temporary, format="png")


def _label(axes: Axes, columns: list[str], rows: list[str], title: str) -> None:
    small = 8 if len(rows) <= 40 else 5
    few = len(columns) <= 6
    axes.set_xticks(range(len(columns)), columns, rotation=0 if few else 90, ha="center", fontsize=small)
    axes.set_yticks(range(len(rows)), rows, fontsize=small)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)


def _annotate_cells(axes: Axes, values: NDArray[np.float64]) -> None:
    if len(values) > 40:
        return
    for y, x in np.argwhere(values >= 0.005):
        colour = "white" if values[y, x] > 0.5 else INK
        axes.text(x, y, f"{values[y, x]:.2f}", ha="center", va="center", fontsize=8, color=colour)


def _draw_path(axes: Axes, costs: list[float], losses: list[float], differences: list[Interval]) -> None:
    """Draw the path with intervals of the paired difference: the documents' difficulty is common to all points and hides it."""
    below = [difference.nats - difference.low for difference in differences]
    above = [difference.high - difference.nats for difference in differences]
    axes.errorbar(costs, losses, yerr=[below, above], fmt="none", ecolor=BLUE, elinewidth=1.6, alpha=0.45, zorder=2)
    label = "nested sets; bars: 95 % interval of the\ndifference to the best single member"
    axes.plot(costs, losses, "-o", color=BLUE, ms=4, lw=1.8, label=label, zorder=3)


def _label_tiers(axes: Axes, population: Population, fit: PriorFit) -> None:
    for tier in fit.tiers:
        point = cost(population, tier.mixture), tier.mixture.test.nats
        axes.plot(*point, "o", ms=8, color=BLUE, zorder=4)
        axes.annotate(
            f"{tier.name}  {point[1]:.3f}",
            point,
            xytext=(6, 9),
            textcoords="offset points",
            fontweight="bold",
            fontsize=9,
            zorder=5,
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75},
        )


def _zoom(axes: Axes, fit: PriorFit, single_losses: list[float]) -> None:
    """Scale the loss axis to the frontier: a note counts the single members that lie above it."""
    paired = [(m.test.nats, m.to_best_single) for m in fit.path]
    low = min(fit.uniform.nats, *(nats - d.nats + d.low for nats, d in paired))
    high = max(*(nats - d.nats + d.high for nats, d in paired), *(interval.nats for interval in fit.reference))
    top = high + 0.35 * (high - low)
    hidden = sum(loss > top for loss in single_losses)
    axes.set_ylim(low - 0.06 * (high - low), top)
    if hidden:
        axes.text(
            0.01,
            0.99,
            f"↑ {hidden} single members above",
            transform=axes.transAxes,
            va="top",
            fontsize=8,
            color="#616e7c",
        )
