"""A fit in the population's own words: names for numbers, tiers for the manifest, one JSON file of everything."""

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
from chorus.prior.fit import HeldOut, Mixture, PriorFit, TierFit

FIT_JSON = "fit.json"


@dataclass(frozen=True, kw_only=True)
class FittedText:
    """Which text a prior was fitted on, for the report."""

    source: str
    num_tokens: dict[str, int]
    num_documents: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class NamedFit:
    """A fit on one text. Where a population has several priors each has a name, and its tiers' names begin with it."""

    name: str | None
    held_out: HeldOut
    fit: PriorFit
    text: FittedText

    @property
    def directory(self) -> Path:
        """Of its report and plots, below the population's."""
        return Path("prior") if self.name is None else Path("prior") / self.name


def fitted_population(population: Population, fits: Sequence[NamedFit]) -> Population:
    """The population with the tiers and losses of all fits, one prior version later.

    Tiers stand from the cheapest to the dearest. Of tiers that cost the same, those of the first fit come last, so that a number of
    members asks for the first prior where both have such a tier. Members' own losses are those on the
    first fit's test part.
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
    """The population as it stands now under the prior that was fitted to it as it stood before.

    Members that joined in between keep what the manifest says of them; no tier names them yet. A tier keeps the `decoding` of the
    one that had its name.

    Raises:
        ChorusError: a member that the prior was fitted for is gone or has other weights.
    """
    weights = {member.name: member.sha256 for member in current.members}
    if lost := [member.name for member in fitted.members if weights.get(member.name) != member.sha256]:
        raise ChorusError(
            f"the population changed while its prior was fitted: {', '.join(lost)} is gone or has other weights. Fit again."
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
    """Names of a mixture's members, by falling weight."""
    return tuple(population.members[idx].name for idx in mixture.members)


def cost(population: Population, mixture: Mixture) -> float:
    """A mixture's relative cost; see `Population.relative_cost`."""
    return population.relative_cost(names(population, mixture))


def save_json(directory: Path, population: Population, named: NamedFit) -> None:
    """Everything that the fit found, in fit.json of its directory."""
    fit, text = named.fit, named.text

    def mixture(found: Mixture) -> dict[str, JsonValue]:
        return {
            "weights": dict(zip(names(population, found), found.weights, strict=True)),
            "pool": found.pool,
            "temperature": found.temperature,
            "relative_cost": cost(population, found),
            "held_out_loss": found.held_out_loss,
            "fitted_loss": found.fitted_loss,
            "pseudo_tokens": found.pseudo_tokens,
            "test_loss": asdict(found.test),
        }

    def tier(found: TierFit) -> dict[str, JsonValue]:
        return {
            "budget": len(found.mixture.members),
            **mixture(found.mixture),
            "difference_to": {
                "best_single": asdict(found.mixture.to_best_single),
                "uniform": asdict(found.to_uniform),
                "reference": asdict(found.to_reference),
                "tier_below": None if found.to_tier_below is None else asdict(found.to_tier_below),
            },
            "unrestricted": mixture(found.unrestricted),
            "price_of_nesting": asdict(found.price_of_nesting),
            "fitted_to_reference": found.fitted_to_reference,
            "linear": mixture(found.linear),
            "pools": [
                {
                    "pool": tried.pooled.pool,
                    "temperature": tried.pooled.temperature,
                    "weights": {
                        population.members[m].name: w
                        for m, w in zip(tried.pooled.members, tried.pooled.weights, strict=True)
                    },
                    "held_out_loss": tried.held_out_loss,
                    "gap": tried.gap,
                }
                for tried in found.pools
            ],
        }

    member_names = [member.name for member in population.members]
    written: dict[str, JsonValue] = {
        "population": population.name,
        "prior_version": population.prior_version,
        "fitted_at": manifest.now().isoformat(),
        "text": {"source": text.source, "tokens": dict(text.num_tokens), "documents": dict(text.num_documents)},
        "tiers": {found.name: tier(found) for found in fit.tiers},
        "path": [mixture(found) for found in fit.path],
        "num_useful": fit.num_useful,
        "singles": {name: asdict(single) for name, single in zip(member_names, fit.singles, strict=True)},
        "uniform": asdict(fit.uniform),
        "all_members": {
            "weights": dict(zip(member_names, map(float, fit.everyone.weights_M), strict=True)),
            "fitted_loss": fit.everyone.loss,
            "gap": fit.everyone.gap,
            "test_loss": asdict(fit.everyone_test),
        },
        "reference": {
            "weights": dict(zip(member_names, map(float, fit.reference_M), strict=True)),
            "test_loss": [asdict(interval) for interval in fit.reference],
        },
        "following_weights": {"power": fit.following.power, "difference": asdict(fit.following.difference)},
        "correlation": [[round(float(value), 6) for value in row] for row in fit.portrait.correlation_MM],
        "documents_won": dict(zip(member_names, map(int, fit.portrait.documents_won_M), strict=True)),
        "warnings": list(fit.warnings),
    }
    write_text(directory / named.directory / FIT_JSON, json.dumps(written, indent=2) + "\n")
