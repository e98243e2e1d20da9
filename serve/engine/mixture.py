"""The mixture that answers a request: its members, their weights and the pool, resolved from the manifest's tiers. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from chorus.population.errors import ChorusError
from chorus.population.live import LiveManifest
from chorus.population.manifest import Decoding, Pool, Population, Tier
from chorus.population.wire import MEMBER_ARGUMENT, TIER_ARGUMENT


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The members that run for a request. Excludes members of weight zero, which would add cost without effect."""

    tier: str
    members: tuple[int, ...]
    """Indices into the population's members, ascending."""
    weights: tuple[float, ...]
    """In the order of `members`; positive, on the simplex."""
    pool: Pool
    temperature: float
    """Divides the pooled log-probabilities, in addition to the request's own temperature."""
    decoding: Decoding = "auto"
    """Decoding of requests that do not choose one."""

    @classmethod
    def from_tier(cls, tier: Tier, population: Population) -> Self:
        """The mixture of a tier of `population`."""
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
    """The mixtures of all tiers, following changes of the manifest.

    If the prior is refitted while the engine runs, new requests use the new one, and running requests keep theirs.
    """

    def __init__(self, directory: Path) -> None:
        self._manifest = LiveManifest(directory)
        self._population: Population | None = None
        self._mixtures: dict[str, Mixture] = {}
        self._refresh()

    @property
    def version(self) -> int:
        """Number of fits so far; 0 while tiers are uniform defaults."""
        return self._refresh().prior_version

    @property
    def tiers(self) -> tuple[str, ...]:
        """Names of the tiers, from cheapest to most expensive."""
        self._refresh()
        return tuple(self._mixtures)

    def mixture(self, tier: object) -> Mixture:
        """The mixture of a tier; that of the most expensive tier if `tier` is None.

        Raises:
            ChorusError: the tier does not exist.
        """
        self._refresh()
        if tier is None:
            return list(self._mixtures.values())[-1]
        if not isinstance(tier, str) or tier not in self._mixtures:
            raise ChorusError(f"unknown tier {tier!r}; this population has {', '.join(self._mixtures)}")
        return self._mixtures[tier]

    def single_member(self, member: object) -> Mixture:
        """The mixture of only the member with this name.

        Raises:
            ChorusError: the member does not exist.
        """
        names = [each.name for each in self._refresh().members]
        if not isinstance(member, str) or member not in names:
            raise ChorusError(f"unknown member {member!r}; this population has {', '.join(names)}")
        return Mixture(tier=member, members=(names.index(member),), weights=(1.0,), pool="linear", temperature=1.0)

    def resolve(self, arguments: Mapping[str, object]) -> Mixture:
        """The mixture that a request's `vllm_xargs` name: a tier or a member, by default the most expensive tier.

        Raises:
            ChorusError: the tier or member does not exist, or both are named.
        """
        if MEMBER_ARGUMENT not in arguments:
            return self.mixture(arguments.get(TIER_ARGUMENT))
        if TIER_ARGUMENT in arguments:
            raise ChorusError(f"{TIER_ARGUMENT} and {MEMBER_ARGUMENT} are mutually exclusive; pass only one")
        return self.single_member(arguments[MEMBER_ARGUMENT])

    def _refresh(self) -> Population:
        population = self._manifest.current()
        if population is not self._population:
            self._population = population
            tiers = population.tiers or population.with_uniform_tiers().tiers
            self._mixtures = {tier.name: Mixture.from_tier(tier, population) for tier in tiers}
        return population
