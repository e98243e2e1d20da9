"""From likelihoods to tiers: which members and weights each budget gets, and what held-out text says about them.

Arrays in, a `PriorFit` out; no file and no manifest. Members are chosen and weights fitted on the fitness and the selection part,
each judging what the other has fitted; then every set's weights are refitted on both parts together, which is the most text that
may be used, and everything is reported on the test part, which has played no role before.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from chorus.population.errors import ChorusError
from chorus.population.manifest import Pool
from chorus.prior.bootstrap import FEW_DOCUMENTS, Bootstrap, Interval
from chorus.prior.pools import TEST, LinearSet, Pooled, PoolFit, Source, fit_pools, pooled_losses
from chorus.prior.portrait import Portrait, portray
from chorus.prior.quadratic import FloatArray
from chorus.prior.reference import reference_weights, top_by_weight
from chorus.prior.selection import Choice, Limits, best_set, best_within, cross_folds, path_within
from chorus.prior.sequential import fit_power, sequential_losses
from chorus.prior.shrinkage import choose_shrinkage
from chorus.prior.weights import Fit, Probabilities, check_probabilities, mixture_losses, solve

# M members, N tokens, K members of a tier
DEFAULT_BUDGETS = {"economy": 1, "standard": 2, "premium": 4}
MAX_TIER = "max"
MAX_MEMBERS = 32  # of the largest tier
USEFUL_NATS = 5e-4  # held-out gain below which further members are not worth their forward passes
POOL_NATS = 1e-4  # held-out gain below which the linear pool at temperature 1 stays


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """P[m, n] of all members on the three parts of the held-out text, one after the other."""

    probabilities_MN: Probabilities = field(repr=False)
    num_fitness: int
    num_selection: int
    fitted_offsets: NDArray[np.int64] = field(repr=False)
    """Where the documents of the fitness and selection part begin among their scored tokens; from 0."""
    test_offsets: NDArray[np.int64] = field(repr=False)
    """(D + 1), from 0: where the documents of the test part begin among its scored tokens."""

    def __post_init__(self) -> None:
        expected = self.num_fitness + self.num_selection + int(self.test_offsets[-1])
        if self.probabilities_MN.shape[1] != expected:
            raise ValueError(f"{self.probabilities_MN.shape[1]} tokens of likelihoods for {expected} scored tokens")
        if int(self.fitted_offsets[-1]) != self.num_fitness + self.num_selection:
            raise ValueError(
                f"the documents end at token {self.fitted_offsets[-1]} of {self.num_fitness + self.num_selection}"
            )

    @property
    def fitted(self) -> Probabilities:
        """The tokens that fit and choose: a view."""
        return self.probabilities_MN[:, : self.num_fitness + self.num_selection]

    @property
    def test(self) -> Probabilities:
        """The tokens that only report: a view."""
        return self.probabilities_MN[:, self.num_fitness + self.num_selection :]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A set of members with weights, and its loss on the test part."""

    members: tuple[int, ...]
    """By falling weight."""
    weights: tuple[float, ...]
    held_out_loss: float
    """As the choice saw it: fitted on one part, counted on the other."""
    fitted_loss: float
    """Of the linear pool, on the text that its weights were fitted on."""
    pseudo_tokens: float
    """Strength with which the weights were drawn to uniform; 0 without shrinkage."""
    test: Interval
    to_best_single: Interval
    """Test loss minus that of the single member that is best on the test part, picked with hindsight: below zero it is better."""
    losses_N: FloatArray = field(repr=False, compare=False)
    """Of every test token."""
    pool: Pool = "linear"
    temperature: float = 1.0

    def running(self) -> Self:
        """The same mixture without members of weight zero: an engine does not run them, so they cost nothing."""
        pairs = [pair for pair in zip(self.members, self.weights, strict=True) if pair[1] > 0]
        members, weights = zip(*pairs, strict=True)
        return replace(self, members=members, weights=weights)


@dataclass(frozen=True, kw_only=True)
class TierFit:
    """A tier's mixture beside its alternatives. Differences are the tier's test loss minus the other's: below zero it is better."""

    name: str
    mixture: Mixture
    to_uniform: Interval
    """All members with equal weights."""
    to_reference: Interval
    """As many members by the reference's rule: top K of one softmax fit on the same text, renormalised."""
    to_tier_below: Interval | None
    unrestricted: Mixture
    """The best set of this size, or within this tier's limit of cost, that need not contain the tier below."""
    price_of_nesting: Interval
    """Test loss of the nested set minus that of the unrestricted one, both pooled linearly at temperature 1."""
    linear: Mixture
    """The same members, pooled linearly at temperature 1: what `mixture` is where no other pool is better."""
    pools: tuple[PoolFit, ...]
    """The other pools that were tried."""
    fitted_to_reference: float
    """Loss on the fitted text, linear pool, minus that of the reference's rule there. Members are chosen by held-out losses and
    contain the tier below, so this may be above zero."""


@dataclass(frozen=True, kw_only=True)
class Following:
    """What the dearest tier would gain if its weights followed the text; see `prior.sequential`. Not served yet."""

    power: float
    """The best on the fitness and selection part."""
    difference: Interval
    """Test loss with following weights minus that with fixed ones: below zero, following is better."""


@dataclass(frozen=True, kw_only=True)
class PriorFit:
    """All that a fit found. Members are numbered as the rows of the matrix."""

    tiers: tuple[TierFit, ...]
    path: tuple[Mixture, ...]
    """Nested sets of 1, 2, ... members; each tier is one of them."""
    num_useful: int
    """Members beyond which the held-out loss gains less than `USEFUL_NATS`."""
    singles: tuple[Interval, ...]
    """Every member alone, on the test part."""
    uniform: Interval
    everyone: Fit = field(repr=False)
    """Weights of all members, to the optimum, with its certificate."""
    everyone_test: Interval
    reference_M: FloatArray = field(repr=False)
    reference: tuple[Interval, ...]
    """The reference's rule at the budgets of `path`, on the test part."""
    portrait: Portrait = field(repr=False)
    following: Following
    warnings: tuple[str, ...]


def fit_prior(
    held_out: HeldOut,
    *,
    budgets: dict[str, int] | None = None,
    limited: tuple[str, ...] = (),
    limits: Limits | None = None,
    max_members: int = MAX_MEMBERS,
    shrink: bool = False,
    source: Source | None = None,
    pools: Sequence[Pool] = (),
) -> PriorFit:
    """Tiers for `budgets` (name: members) and a tier `max` of all members that are useful; see `tier_sizes`.

    Args:
        held_out: the likelihoods.
        budgets: members of each tier; tiers of this module's choice without any.
        limited: instead, names of tiers that are limited in cost, in the order of `limits.tiers`.
        limits: what tiers may cost, and what no set may exceed.
        max_members: of the largest tier.
        shrink: draw the weights of every set to uniform as far as cross-validation over documents says.
        source: distributions of the three parts of the text, where `pools` are wanted.
        pools: pools to fit with a temperature for every tier. The best by held-out loss, the linear pool at temperature 1 among
            them, is the tier's.

    Raises:
        ChorusError: a budget is below 1 or above the population, or a limit too low; the likelihoods cannot be fitted; the test
            part has fewer than two documents.
    """
    check_probabilities(held_out.probabilities_MN)
    num_members = len(held_out.probabilities_MN)
    check_budgets(budgets, num_members)
    bootstrap = Bootstrap(held_out.test_offsets)
    folds = cross_folds(held_out.num_fitness, held_out.num_selection)

    max_members = max(max_members, *(budgets or {"": 1}).values())
    if limits is None:
        limits = Limits(costs_M=np.ones(num_members))
    choices, limited_sizes = path_within(held_out.fitted, folds, limits, max_members)
    num_useful = max(useful_members([choice.loss for choice in choices]), *limited_sizes, 1)
    sizes = tier_sizes(_distinct(limited, limited_sizes) if limited else budgets, len(choices), num_useful)
    if (largest := max(sizes.values())) > len(choices):
        raise ChorusError(
            f"a tier asks for {largest} members; within the most that any tier may cost fit {len(choices)} on this path."
        )
    everyone = solve(held_out.fitted)
    reference_M = reference_weights(held_out.fitted)
    scored = _Scorer(held_out, bootstrap, shrink=shrink)
    path = tuple(scored.mixture(choice) for choice in choices)
    tried = _try_pools(held_out, [choices[size - 1] for size in sizes.values()], path, source, pools)
    tiers: list[TierFit] = []
    for (name, size), pool_fits in zip(sizes.items(), tried, strict=True):
        top = tuple(int(idx) for idx in np.argsort(-reference_M, kind="stable")[:size])
        if name in limited:
            free = best_within(held_out.fitted, folds, limits, limits.tiers[limited.index(name)])
        else:
            free = best_set(held_out.fitted, folds, size, starts=(choices[size - 1].members, top))
        mixture = scored.pooled(path[size - 1], pool_fits, source).running()
        tiers.append(
            scored.tier(
                name,
                mixture,
                path[size - 1],
                pool_fits,
                scored.mixture(free),
                reference_M,
                tiers[-1].mixture if tiers else None,
            )
        )
    return PriorFit(
        tiers=tuple(tiers),
        path=path,
        num_useful=num_useful,
        singles=tuple(bootstrap.loss(losses_N) for losses_N in scored.singles),
        uniform=bootstrap.loss(scored.uniform_N),
        everyone=everyone,
        everyone_test=bootstrap.loss(mixture_losses(held_out.test, everyone.weights_M)),
        reference_M=reference_M,
        reference=tuple(bootstrap.loss(scored.reference(reference_M, k + 1)) for k in range(len(path))),
        portrait=portray(held_out.test, bootstrap, [tier.mixture.losses_N for tier in tiers]),
        following=scored.following(tiers[-1].linear),
        warnings=tuple(_warnings(tiers, sizes, bootstrap)),
    )


def check_budgets(budgets: dict[str, int] | None, num_members: int) -> None:
    """Refuse budgets that the population cannot meet."""
    for name, size in (budgets or {}).items():
        if not 1 <= size <= num_members:
            raise ChorusError(
                f"tier {name!r} asks for {size} members; the population has {num_members}: give a budget from 1 to {num_members}."
            )
        if name == MAX_TIER:
            raise ChorusError(
                f"the tier {MAX_TIER!r} is made of all useful members and takes no budget; give another name."
            )
    if budgets is not None and (not budgets or len(set(budgets.values())) < len(budgets)):
        raise ChorusError(
            f"budgets {budgets} are none or name one size twice: give each tier its own number of members."
        )


def _distinct(names: tuple[str, ...], sizes: list[int]) -> dict[str, int]:
    """Members of tiers that are limited in cost; a limit that buys nothing over the one below is no tier."""
    for (below, fewer), (name, size) in itertools.pairwise(zip(names, sizes, strict=True)):
        if size == fewer:
            raise ChorusError(
                f"tier {name!r} would hold the same {size} members as {below!r}: no further member that fits its limit lowers the "
                "held-out loss. Raise its limit, or leave it out."
            )
    return dict(zip(names, sizes, strict=True))


def _try_pools(
    held_out: HeldOut, choices: list[Choice], path: tuple[Mixture, ...], source: Source | None, pools: Sequence[Pool]
) -> list[list[PoolFit]]:
    """Every pool that is wanted, for every chosen set."""
    if not pools:
        return [[] for _ in choices]
    if source is None:
        raise ValueError("pools are fitted on distributions: give their source")
    sets = []
    for choice in choices:
        mixture = path[len(choice.members) - 1]
        of_member = dict(zip(mixture.members, mixture.weights, strict=True))
        both_K = np.array([of_member[member] for member in choice.members])
        fitness_K, selection_K = choice.weights_FS
        sets.append(LinearSet(members=choice.members, weights_on=(fitness_K, selection_K, both_K)))
    return fit_pools(source, sets, pools=pools)


def tier_sizes(budgets: dict[str, int] | None, num_members: int, num_useful: int) -> dict[str, int]:
    """Members of every tier, from the cheapest to the dearest.

    Budgets that were asked for are all kept, and `max` joins them where it is larger. Without a wish there are the
    `DEFAULT_BUDGETS` below `max`: a dearer tier of the same members would be the same tier under another name.
    """
    if budgets is not None:
        sizes = dict(sorted(budgets.items(), key=lambda item: item[1]))
        return sizes if max(sizes.values()) >= num_useful else {**sizes, MAX_TIER: num_useful}
    if num_members == 1:
        return {"economy": 1}
    return {name: size for name, size in DEFAULT_BUDGETS.items() if size < num_useful} | {MAX_TIER: num_useful}


def useful_members(losses: list[float]) -> int:
    """The fewest members whose held-out loss is within `USEFUL_NATS` of the path's lowest; at least two where there are two.

    Two, because a population served as one model at every budget would be none; where the second does not help, a warning says so.
    """
    within = [loss <= min(losses) + USEFUL_NATS for loss in losses]
    return max(within.index(True) + 1, min(2, len(losses)))


class _Scorer:
    """Puts mixtures on the test part; per-token losses that serve several comparisons are kept."""

    def __init__(self, held_out: HeldOut, bootstrap: Bootstrap, *, shrink: bool) -> None:
        self._shrink = shrink
        self._held_out = held_out
        self._bootstrap = bootstrap
        num_members = len(held_out.probabilities_MN)
        self._identity_MM = np.eye(num_members)
        self.uniform_N = mixture_losses(held_out.test, np.full(num_members, 1 / num_members))
        best = int(np.argmin([float(losses_N.mean()) for losses_N in self.singles]))
        self._best_single_N = mixture_losses(held_out.test, self._identity_MM[best])

    @property
    def singles(self) -> Iterator[FloatArray]:
        """Losses of every member alone."""
        return (mixture_losses(self._held_out.test, weights_M) for weights_M in self._identity_MM)

    def mixture(self, choice: Choice) -> Mixture:
        """The chosen set with its weights refitted on all tokens that may be fitted."""
        rows_KN = self._held_out.fitted[list(choice.members)]
        start_K = np.mean(choice.weights_FS, axis=0)
        pseudo_tokens = 0.0
        if self._shrink and len(start_K) > 1:
            pseudo_tokens = choose_shrinkage(rows_KN, self._held_out.fitted_offsets).pseudo_tokens
        weights_K = solve(rows_KN, start_M=start_K, pseudo_tokens=pseudo_tokens).weights_M
        order = np.argsort(-weights_K, kind="stable")
        members = tuple(choice.members[idx] for idx in order)
        weights = tuple(float(weights_K[idx]) for idx in order)
        losses_N = mixture_losses(self._held_out.test[list(members)], np.asarray(weights))
        return Mixture(
            members=members,
            weights=weights,
            held_out_loss=choice.loss,
            fitted_loss=float(mixture_losses(rows_KN, weights_K).mean()),
            pseudo_tokens=pseudo_tokens,
            test=self._bootstrap.loss(losses_N),
            to_best_single=self._bootstrap.difference(losses_N, self._best_single_N),
            losses_N=losses_N,
        )

    def pooled(self, linear: Mixture, pool_fits: list[PoolFit], source: Source | None) -> Mixture:
        """The best of the linear pool at temperature 1 and the pools that were tried, by held-out loss."""
        best = min(pool_fits, key=lambda found: found.held_out_loss, default=None)
        if best is None or source is None or best.held_out_loss > linear.held_out_loss - POOL_NATS:
            return linear
        order = np.argsort(-np.asarray(best.pooled.weights), kind="stable")
        pooled = Pooled(
            members=tuple(best.pooled.members[idx] for idx in order),
            weights=tuple(best.pooled.weights[idx] for idx in order),
            pool=best.pooled.pool,
            temperature=best.pooled.temperature,
        )
        (losses_N,) = pooled_losses(source, TEST, [pooled])
        return replace(
            linear,
            members=pooled.members,
            weights=pooled.weights,
            pool=pooled.pool,
            temperature=pooled.temperature,
            held_out_loss=best.held_out_loss,
            test=self._bootstrap.loss(losses_N),
            to_best_single=self._bootstrap.difference(losses_N, self._best_single_N),
            losses_N=losses_N,
        )

    def tier(
        self,
        name: str,
        mixture: Mixture,
        linear: Mixture,
        pool_fits: list[PoolFit],
        free: Mixture,
        reference_M: FloatArray,
        below: Mixture | None,
    ) -> TierFit:
        """The tier beside its alternatives."""
        size = len(mixture.members)
        theirs = mixture_losses(self._held_out.fitted, top_by_weight(reference_M, size))

        def against(other_N: FloatArray) -> Interval:
            return self._bootstrap.difference(mixture.losses_N, other_N)

        return TierFit(
            name=name,
            mixture=mixture,
            to_uniform=against(self.uniform_N),
            to_reference=against(self.reference(reference_M, size)),
            to_tier_below=None if below is None else against(below.losses_N),
            unrestricted=free,
            price_of_nesting=self._bootstrap.difference(linear.losses_N, free.losses_N),
            linear=linear,
            pools=tuple(pool_fits),
            fitted_to_reference=linear.fitted_loss - float(theirs.mean()),
        )

    def reference(self, reference_M: FloatArray, num_members: int) -> FloatArray:
        """Losses of the reference's rule."""
        return mixture_losses(self._held_out.test, top_by_weight(reference_M, num_members))

    def following(self, mixture: Mixture) -> Following:
        """The mixture with weights that follow the text, the power taken from the tokens that may be fitted."""
        rows, weights_K = list(mixture.members), np.asarray(mixture.weights)
        power = fit_power(self._held_out.fitted[rows], weights_K, self._held_out.fitted_offsets).power
        losses_N = sequential_losses(self._held_out.test[rows], weights_K, self._held_out.test_offsets, power)
        return Following(power=power, difference=self._bootstrap.difference(losses_N, mixture.losses_N))


def _warnings(tiers: list[TierFit], sizes: dict[str, int], bootstrap: Bootstrap) -> list[str]:
    found = []
    for tier in tiers:
        if (running := len(tier.mixture.members)) < sizes[tier.name]:
            found.append(
                f"{tier.name} runs {running} of {sizes[tier.name]} members: the others get weight 0 on this text"
            )
    if bootstrap.num_documents < FEW_DOCUMENTS:
        found.append(
            f"the test part has only {bootstrap.num_documents} documents: intervals from fewer than {FEW_DOCUMENTS} are too narrow"
        )
    compared = [(tier, below.name, tier.to_tier_below) for below, tier in itertools.pairwise(tiers)]
    compared += [
        (tier, "the best single member", tier.mixture.to_best_single) for tier in tiers if len(tier.mixture.members) > 1
    ]
    for tier, other, step in compared:
        assert step is not None
        if step.high >= 0:
            verdict = (
                "is worse than"
                if step.low > 0
                else "is not better than"
                if step.nats >= 0
                else "may not be better than"
            )
            found.append(
                f"{tier.name} {verdict} {other} on the test part: {step.nats:+.4f} nats [{step.low:+.4f}, {step.high:+.4f}]"
            )
    return found
