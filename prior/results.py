"""Converts a fit to member names: tiers and losses for the manifest, and everything as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import JsonValue

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.files import write_text
from chorus.population.manifest import Loss, Population, Tier
from chorus.prior.bootstrap import Interval
from chorus.prior.evaluation import Mixture, TierFit
from chorus.prior.fit import PriorFit
from chorus.prior.held_out import HeldOut

FIT_JSON = "fit.json"


@dataclass(frozen=True, kw_only=True)
class FittedText:
    """The text that a prior was fitted on, for the report."""

    source: str
    num_tokens: dict[str, int]
    num_documents: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class NamedFit:
    """A fit on one text. With several priors, each has a name that prefixes the names of its tiers."""

    name: str | None
    held_out: HeldOut
    fit: PriorFit
    text: FittedText

    @property
    def directory(self) -> Path:
        """Where its report and plots go, relative to the population directory."""
        return Path("prior") if self.name is None else Path("prior") / self.name


def fitted_population(population: Population, fits: Sequence[NamedFit]) -> Population:
    """The population with the tiers and losses of all fits and the next prior version.

    Tiers are sorted by rising cost. Among tiers of the same cost, those of the first fit come last: a budget given as a number of
    members then selects the first prior. Members' own losses are those on the first fit's test split.
    """
    tiers = [
        Tier(
            name=tier.name,
            members=names(population, tier.mixture),
            weights=tier.mixture.weights,
            pool=tier.mixture.pool,
            temperature=tier.mixture.temperature,
            test_loss=_loss(named.held_out, tier.mixture.test),
            relative_cost=cost(population, tier.mixture),
        )
        for named in reversed(fits)
        for tier in named.fit.tiers
    ]
    first = fits[0]
    tiers.sort(key=lambda tier: tier.relative_cost)  # stable
    members = tuple(
        member.model_copy(update={"test_loss": _loss(first.held_out, interval)})
        for member, interval in zip(population.members, first.fit.singles, strict=True)
    )
    return population.model_copy(
        update={"tiers": tuple(tiers), "members": members, "prior_version": population.prior_version + 1}
    )


def with_prior(current: Population, fitted: Population) -> Population:
    """The current population with the prior of `fitted`, which was fitted to an earlier state of it.

    Members added since then keep their manifest entries and belong to no tier yet. A tier keeps the `decoding` of the current tier
    of that name.

    Raises:
        ChorusError: a member that the prior was fitted for has been removed or has other weights.
    """
    weights = {member.name: member.sha256 for member in current.members}
    if stale := [member.name for member in fitted.members if weights.get(member.name) != member.sha256]:
        raise ChorusError(
            f"the population changed while its prior was fitted: {', '.join(stale)} was removed or has other weights. Fit again."
        )
    losses = {member.name: member.test_loss for member in fitted.members}
    members = tuple(
        member.model_copy(update={"test_loss": losses.get(member.name, member.test_loss)}) for member in current.members
    )
    decodings = {tier.name: tier.decoding for tier in current.tiers}
    tiers = tuple(
        tier.model_copy(
            update={
                "relative_cost": current.relative_cost(tier.members),
                "decoding": decodings.get(tier.name, tier.decoding),
            }
        )
        for tier in fitted.tiers
    )
    return current.model_copy(update={"members": members, "tiers": tiers, "prior_version": fitted.prior_version})


def _loss(held_out: HeldOut, interval: Interval) -> Loss:
    return Loss(nats=interval.nats, low=interval.low, high=interval.high, num_tokens=int(held_out.test_offsets[-1]))


def names(population: Population, mixture: Mixture) -> tuple[str, ...]:
    """Names of a mixture's members, in descending order of weight."""
    return tuple(population.members[idx].name for idx in mixture.members)


def cost(population: Population, mixture: Mixture) -> float:
    """Relative cost of a mixture; see `Population.relative_cost`."""
    return population.relative_cost(names(population, mixture))


def save_json(directory: Path, population: Population, named: NamedFit) -> None:
    """Write all results of a fit to fit.json in its directory."""
    fit, text = named.fit, named.text

    def mixture_json(mixture: Mixture) -> dict[str, JsonValue]:
        return {
            "weights": dict(zip(names(population, mixture), mixture.weights, strict=True)),
            "pool": mixture.pool,
            "temperature": mixture.temperature,
            "relative_cost": cost(population, mixture),
            "held_out_loss": mixture.held_out_loss,
            "fitted_loss": mixture.fitted_loss,
            "pseudo_tokens": mixture.pseudo_tokens,
            "test_loss": asdict(mixture.test),
        }

    def tier_json(tier: TierFit) -> dict[str, JsonValue]:
        return {
            "budget": len(tier.mixture.members),
            **mixture_json(tier.mixture),
            "difference_to": {
                "best_single": asdict(tier.mixture.to_best_single),
                "uniform": asdict(tier.to_uniform),
                "reference": asdict(tier.to_reference),
                "tier_below": None if tier.to_tier_below is None else asdict(tier.to_tier_below),
            },
            "unrestricted": mixture_json(tier.unrestricted),
            "price_of_nesting": asdict(tier.price_of_nesting),
            "fitted_to_reference": tier.fitted_to_reference,
            "linear": mixture_json(tier.linear),
            "pools": [
                {
                    "pool": pool_fit.pooled.pool,
                    "temperature": pool_fit.pooled.temperature,
                    "weights": {
                        population.members[m].name: w
                        for m, w in zip(pool_fit.pooled.members, pool_fit.pooled.weights, strict=True)
                    },
                    "held_out_loss": pool_fit.held_out_loss,
                    "gap": pool_fit.gap,
                }
                for pool_fit in tier.pools
            ],
        }

    member_names = [member.name for member in population.members]
    written: dict[str, JsonValue] = {
        "population": population.name,
        "prior_version": population.prior_version,
        "fitted_at": manifest.now().isoformat(),
        "text": {"source": text.source, "tokens": dict(text.num_tokens), "documents": dict(text.num_documents)},
        "tiers": {tier.name: tier_json(tier) for tier in fit.tiers},
        "path": [mixture_json(mixture) for mixture in fit.path],
        "num_useful": fit.num_useful,
        "singles": {name: asdict(single) for name, single in zip(member_names, fit.singles, strict=True)},
        "uniform": asdict(fit.uniform),
        "all_members": {
            "weights": dict(zip(member_names, map(float, fit.all_members.weights_M), strict=True)),
            "fitted_loss": fit.all_members.loss,
            "gap": fit.all_members.gap,
            "test_loss": asdict(fit.all_members_test),
        },
        "reference": {
            "weights": dict(zip(member_names, map(float, fit.reference_M), strict=True)),
            "test_loss": [asdict(interval) for interval in fit.reference],
        },
        "following_weights": {"power": fit.sequential.power, "difference": asdict(fit.sequential.difference)},
        "correlation": [[round(float(value), 6) for value in row] for row in fit.member_stats.correlation_MM],
        "documents_won": dict(zip(member_names, map(int, fit.member_stats.documents_won_M), strict=True)),
        "warnings": list(fit.warnings),
    }
    write_text(directory / named.directory / FIT_JSON, json.dumps(written, indent=2) + "\n")
