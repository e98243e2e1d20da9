"""Reports a fit: Markdown for the population directory, tables for the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from chorus.population.files import write_text
from chorus.population.manifest import Population
from chorus.prior.bootstrap import Interval
from chorus.prior.choosing import MAX_TIER, USEFUL_NATS
from chorus.prior.evaluation import POOL_NATS, Mixture
from chorus.prior.fit import PriorFit
from chorus.prior.frontier import knee
from chorus.prior.plots import FRONTIER_PNG, MEMBERS_PNG
from chorus.prior.results import FittedText, cost, names

REPORT = "report.md"


def tier_table(population: Population, fit: PriorFit) -> Table:
    """Per tier: members, cost, test loss and difference to the best single member. Fits 80 columns."""
    table = Table("tier", box=None, pad_edge=False)
    for heading in ("members", "cost", "test loss, nats", "to the best single"):
        table.add_column(heading, justify="right", no_wrap=True)
    for tier in fit.tiers:
        mixture = tier.mixture
        table.add_row(
            f"[bold]{tier.name}[/]",
            str(len(mixture.members)),
            f"{cost(population, mixture):.2f}x",
            interval_text(mixture.test),
            "same"
            if len(mixture.members) == 1 and tier.mixture.to_best_single.nats == 0
            else signed_text(mixture.to_best_single),
        )
    return table


def member_table(population: Population, fit: PriorFit) -> Table:
    """Per tier: its members and their weights."""
    table = Table("tier", box=None, pad_edge=False)
    table.add_column("members and weights", overflow="fold")
    for tier in fit.tiers:
        pairs = zip(names(population, tier.mixture), tier.mixture.weights, strict=True)
        shown = "  ".join(f"{name}\u00a0{weight:.3f}" for name, weight in pairs)
        table.add_row(f"[bold]{tier.name}[/]", shown + _pool_text(tier.mixture, "  "))
    return table


def _pool_text(mixture: Mixture, prefix: str) -> str:
    """Pool and temperature, unless linear at temperature 1."""
    if (mixture.pool, mixture.temperature) == ("linear", 1.0):
        return ""
    return f"{prefix}({mixture.pool} pool, temperature {mixture.temperature:.3f})"


def save_report(out: Path, population: Population, fit: PriorFit, text: FittedText) -> None:
    """Write report.md to `out`."""
    sections = [
        _headline(population, fit, text),
        _tiers(population, fit),
        _comparisons(fit),
        *([_pools(fit)] if any(tier.pools for tier in fit.tiers) else []),
        _path(population, fit),
        _members(population, fit),
    ]
    write_text(out / REPORT, "\n\n".join(sections) + "\n")


def _headline(population: Population, fit: PriorFit, text: FittedText) -> str:
    best_single, last = min(fit.singles, key=lambda single: single.nats), fit.tiers[-1]
    parts = ", ".join(f"{k} {text.num_tokens[k]:,} ({text.num_documents[k]} documents)" for k in text.num_tokens)
    lines = [
        f"# The prior of {population.name}",
        "",
        f"Version {population.prior_version}, {len(population.members)} members, fitted on {text.source}. Tokens: {parts}.",
        "",
        f"**{last.name}** mixes {len(last.mixture.members)} members and reaches {last.mixture.test.nats:.4f} nats per token on "
        f"the test split; the best single member reaches {best_single.nats:.4f}: a difference of "
        f"{signed_text(last.mixture.to_best_single)}{_chance_note(last.mixture.to_best_single)}.",
    ]
    if fit.warnings:
        lines += ["", *(f"> **Warning**: {warning}." for warning in fit.warnings)]
    return "\n".join(lines)


def _tiers(population: Population, fit: PriorFit) -> str:
    rows = [
        (
            f"**{tier.name}**",
            str(len(tier.mixture.members)),
            f"{cost(population, tier.mixture):.2f}x",
            interval_text(tier.mixture.test) + _pool_text(tier.mixture, ", "),
            ", ".join(
                f"{n} {w:.3f}" for n, w in zip(names(population, tier.mixture), tier.mixture.weights, strict=True)
            ),
        )
        for tier in fit.tiers
    ]
    table = _markdown(("tier", "budget", "cost", "test loss, nats", "members and weights"), rows, right={1, 2, 3})
    return (
        f"## Tiers\n\n{table}\n\n![Loss against cost]({FRONTIER_PNG})\n\n"
        "Members are chosen and weights fitted on the fitness and selection splits. Losses are on the test split, which is not "
        "used for that. Brackets are 95 % intervals from a bootstrap over documents."
    )


def _comparisons(fit: PriorFit) -> str:
    rows = [
        (
            f"**{tier.name}**",
            signed_text(tier.to_tier_below) if tier.to_tier_below else "",
            signed_text(tier.mixture.to_best_single),
            signed_text(tier.to_uniform),
            signed_text(tier.to_reference),
            signed_text(tier.price_of_nesting),
            f"{tier.fitted_to_reference:+.4f}",
        )
        for tier in fit.tiers
    ]
    heads = (
        "tier",
        "tier below",
        "best single",
        "all, equal weights",
        "reference's rule",
        "best free set",
        "reference's rule, fitted text",
    )
    return (
        f"## Differences\n\n{_markdown(heads, rows, right={1, 2, 3, 4, 5, 6})}\n\n"
        "Test loss of the tier minus that of the alternative, in nats, paired by document. Negative means the tier is better; if "
        "the interval contains zero, this text cannot tell the two apart. The best single member is the best on the test split, "
        "picked with hindsight. The reference's rule takes the same number of members with the largest weights of one softmax fit "
        "and renormalises. The best free set has the same number of members but need not contain the tier below: that column is "
        "the price of nesting, with both sets pooled linearly. The last column is the difference on the text that the weights were "
        "fitted on. It can be positive: members are chosen on text that their weights were not fitted on, and include those of "
        "the tier below."
    )


def _pools(fit: PriorFit) -> str:
    rows = []
    for tier in fit.tiers:
        served = tier.mixture.pool, tier.mixture.temperature
        candidates = [("linear", 1.0, tier.linear.held_out_loss, "")]
        candidates += [(p.pooled.pool, p.pooled.temperature, p.held_out_loss, f"{p.gap:.0e}") for p in tier.pools]
        rows += [
            (f"**{tier.name}**", pool, f"{t:.3f}", f"{loss:.4f}", gap, "served" if (pool, t) == served else "")
            for pool, t, loss, gap in candidates
        ]
    heads = ("tier", "pool", "temperature", "held-out loss", "certificate", "")
    return (
        f"## Pools\n\n{_markdown(heads, rows, right={2, 3, 4})}\n\n"
        "Held-out loss: fitted on one of the fitness and selection splits and evaluated on the other, both ways. The certificate "
        f"bounds the excess over the optimum, in nats. The best pool replaces the linear pool at temperature 1 if it gains more "
        f"than {POOL_NATS:g} nats."
    )


def _path(population: Population, fit: PriorFit) -> str:
    costs = [cost(population, mixture) for mixture in fit.path]
    knee_idx = knee(costs, [mixture.test.nats for mixture in fit.path])
    previous: set[int] = set()
    rows = []
    for idx, mixture in enumerate(fit.path):
        joined = ", ".join(population.members[m].name for m in mixture.members if m not in previous)
        previous = set(mixture.members)
        note = "knee" if idx == knee_idx else ""
        rows.append(
            (
                str(idx + 1),
                joined,
                f"{costs[idx]:.2f}x",
                f"{mixture.held_out_loss:.4f}",
                interval_text(mixture.test),
                f"{fit.reference[idx].nats:.4f}",
                note,
            )
        )
    heads = ("members", "joins", "cost", "held-out loss", "test loss", "reference's rule, test", "")
    return (
        f"## The frontier\n\n{_markdown(heads, rows, right={0, 2, 3, 4, 5})}\n\n"
        f"{fit.num_useful} members come within {USEFUL_NATS:g} nats of the lowest held-out loss; `{MAX_TIER}` has no more. "
        f"All members at their optimal weights reach {interval_text(fit.all_members_test)} on the test split (fitted to within "
        f"{fit.all_members.gap:.1e} nats of the optimum); at equal weights {interval_text(fit.uniform)}.\n\n"
        f"If the weights of {fit.tiers[-1].name} adapted to each document (the prior times each member's likelihood of the text so "
        f"far, raised to the power {fit.sequential.power:g}), the test loss would change by "
        f"{signed_text(fit.sequential.difference)}{_chance_note(fit.sequential.difference)}. "
        "Serving does not do this."
    )


def _members(population: Population, fit: PriorFit) -> str:
    order = sorted(range(len(population.members)), key=lambda idx: fit.singles[idx].nats)
    rows = []
    for idx in order:
        member = population.members[idx]
        weights = [dict(zip(t.mixture.members, t.mixture.weights, strict=True)).get(idx) for t in fit.tiers]
        origin = ("" if v is None else f"{v:g}" for v in (member.trajectory, member.cycle))
        shown = ("" if weight is None else f"{weight:.3f}" for weight in weights)
        alone, won = interval_text(fit.singles[idx]), str(fit.member_stats.documents_won_M[idx])
        rows.append((member.name, *origin, alone, won, f"{fit.all_members.weights_M[idx]:.3f}", *shown))
    heads = (
        "member",
        "trajectory",
        "cycle",
        "test loss alone",
        "documents won",
        "weight among all",
        *(tier.name for tier in fit.tiers),
    )
    wins = ", ".join(f"{t.name} {w}" for t, w in zip(fit.tiers, fit.member_stats.tier_wins, strict=True))
    return (
        f"## Members\n\n{_markdown(heads, rows, right=set(range(1, len(heads))))}\n\n"
        f"Documents won: on how many of {fit.member_stats.num_documents} test documents the member is the best of all. "
        f"Documents on which each tier beats the best single member: {wins}.\n\n"
        f"![Weights and correlations of the members]({MEMBERS_PNG})"
    )


def _markdown(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: set[int]) -> str:
    rule = "|".join("--:" if idx in right else "---" for idx in range(len(heads)))
    return "\n".join(["| " + " | ".join(heads) + " |", f"|{rule}|", *("| " + " | ".join(row) + " |" for row in rows)])


def _chance_note(difference: Interval) -> str:
    """Text to append to a difference whose interval contains zero."""
    return ", which may be chance: the interval contains zero" if not difference.excludes_zero else ""


def interval_text(interval: Interval) -> str:
    """An estimate with its interval."""
    return f"{interval.nats:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def signed_text(interval: Interval) -> str:
    """A difference with its interval."""
    return f"{interval.nats:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
