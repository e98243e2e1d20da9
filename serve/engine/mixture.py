"""What answers one request: which members, with what weights, pooled how. Resolved from the manifest's tiers, without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from chorus.population.errors import ChorusError
from chorus.population.live import LiveManifest
from chorus.population.manifest import Decoding, Pool, Population, Tier

TIER_ARGUMENT = "chorus_tier"
"""Key of a request's `vllm_xargs` that names its tier."""
MEMBER_ARGUMENT = "chorus_member"
"""Key of a request's `vllm_xargs` that names one member, to be asked alone: for fitting a prior through an engine."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The members that run for a request. Members of weight zero are left out: they would cost and change nothing."""

    tier: str
    members: tuple[int, ...]
    """Indices into the population's members, ascending."""
    weights: tuple[float, ...]
    """In the order of `members`; positive, on the simplex."""
    pool: Pool
    temperature: float
    """Divides the pooled log-probabilities, before whatever temperature the request samples with."""
    decoding: Decoding = "auto"
    """Of requests that leave it open."""

    @classmethod
    def from_tier(cls, tier: Tier, population: Population) -> Self:
        """The mixture that a tier of `population` describes."""
        index = {member.name: idx for idx, member in enumerate(population.members)}
        pairs = sorted(
            (index[name], weight) for name, weight in zip(tier.members, tier.weights, strict=True) if weight > 0
        )
        total = sum(weight for _, weight in pairs)
        return cls(
            tier=tier.name,
            members=tuple(idx for idx, _ in pairs),
            weights=tuple(weight / total for _, weight in pairs),
            pool=tier.pool,
            temperature=tier.temperature,
            decoding=tier.decoding,
        )


class Prior:
    """The mixtures that requests can ask for, by tier, as the manifest has them now.

    A prior fitted again while the engine runs answers the requests that come after it; those that run finish on the one before.
    """

    def __init__(self, directory: Path) -> None:
        self._manifest = LiveManifest(directory)
        self._population: Population | None = None
        self._mixtures: dict[str, Mixture] = {}
        self._refresh()

    @property
    def version(self) -> int:
        """Counts the fits; 0 while the tiers are uniform defaults."""
        return self._refresh().prior_version

    @property
    def tiers(self) -> tuple[str, ...]:
        """Names of the tiers, from the cheapest to the dearest."""
        self._refresh()
        return tuple(self._mixtures)

    def mixture(self, tier: object) -> Mixture:
        """The mixture of a tier; of the dearest tier without a name.

        Raises:
            ChorusError: there is no such tier.
        """
        self._refresh()
        if tier is None:
            return list(self._mixtures.values())[-1]
        if not isinstance(tier, str) or tier not in self._mixtures:
            raise ChorusError(f"no tier {tier!r}; this population has {', '.join(self._mixtures)}")
        return self._mixtures[tier]

    def single_member(self, member: object) -> Mixture:
        """The mixture of one member by its name.

        Raises:
            ChorusError: there is no such member.
        """
        names = [each.name for each in self._refresh().members]
        if not isinstance(member, str) or member not in names:
            raise ChorusError(f"no member {member!r}; this population has {', '.join(names)}")
        return Mixture(tier=member, members=(names.index(member),), weights=(1.0,), pool="linear", temperature=1.0)

    def resolve(self, arguments: Mapping[str, object]) -> Mixture:
        """The mixture that a request's `vllm_xargs` ask for: a tier, one member, or the dearest tier.

        Raises:
            ChorusError: there is no such tier or member, or both are named.
        """
        if MEMBER_ARGUMENT not in arguments:
            return self.mixture(arguments.get(TIER_ARGUMENT))
        if TIER_ARGUMENT in arguments:
            raise ChorusError(f"{TIER_ARGUMENT} and {MEMBER_ARGUMENT} exclude each other; name one")
        return self.single_member(arguments[MEMBER_ARGUMENT])

    def _refresh(self) -> Population:
        population = self._manifest.current()
        if population is not self._population:
            self._population = population
            tiers = population.tiers or population.with_uniform_tiers().tiers
            self._mixtures = {tier.name: Mixture.from_tier(tier, population) for tier in tiers}
        return population
