"""Fits tiers from likelihoods: the members and weights of each budget, and their losses. Arrays in, a `PriorFit` out.

Sets of members are chosen by cross-fitting: weights are fitted on the fitness split and evaluated on the selection split, and the
other way round. Each chosen set's weights are then refitted on both splits together, to use all the text that may be used. All
reported losses come from the test split, which plays no other part. Files and the manifest are left to `prior.run`.
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
from chorus.prior.member_stats import MemberStats, compute_member_stats
from chorus.prior.pools import TEST, LinearSet, Pooled, PoolFit, Source, fit_pools, pooled_losses
from chorus.prior.quadratic import FloatArray
from chorus.prior.reference import reference_weights, top_by_weight
from chorus.prior.selection import Choice, Limits, best_set, best_within, cross_folds, path_within
from chorus.prior.sequential import fit_power, sequential_losses
from chorus.prior.shrinkage import choose_shrinkage
from chorus.prior.weights import Fit, Probabilities, check_probabilities, mixture_losses, solve

# M members, N tokens, K members of a tier
DEFAULT_BUDGETS = {"economy": 1, "standard": 2, "premium": 4}
MAX_TIER = "max"
MAX_MEMBERS = 32  # in the largest tier
USEFUL_NATS = 5e-4  # further members that gain less held-out loss are not worth their forward passes
POOL_NATS = 1e-4  # another pool must gain more held-out loss than this to replace the linear pool at temperature 1


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """P[m, n] of all members on the three concatenated held-out splits: fitness, selection, test."""

    probabilities_MN: Probabilities = field(repr=False)
    num_fitness: int
    num_selection: int
    fitted_offsets: NDArray[np.int64] = field(repr=False)
    """(D + 1), from 0: where the documents of the fitness and selection splits begin, counted in their scored tokens."""
    test_offsets: NDArray[np.int64] = field(repr=False)
    """(D + 1), from 0: where the documents of the test split begin, counted in its scored tokens."""

    def __post_init__(self) -> None:
        expected = self.num_fitness + self.num_selection + int(self.test_offsets[-1])
        if self.probabilities_MN.shape[1] != expected:
            raise ValueError(f"got likelihoods of {self.probabilities_MN.shape[1]} tokens for {expected} scored tokens")
        if int(self.fitted_offsets[-1]) != self.num_fitness + self.num_selection:
            raise ValueError(
                f"the documents end at token {self.fitted_offsets[-1]} of {self.num_fitness + self.num_selection}"
            )

    @property
    def fitted(self) -> Probabilities:
        """Likelihoods on the fitness and selection splits: a view."""
        return self.probabilities_MN[:, : self.num_fitness + self.num_selection]

    @property
    def test(self) -> Probabilities:
        """Likelihoods on the test split: a view."""
        return self.probabilities_MN[:, self.num_fitness + self.num_selection :]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A set of members with weights, and its losses."""

    members: tuple[int, ...]
    """In descending order of weight."""
    weights: tuple[float, ...]
    held_out_loss: float
    """Cross-fitted loss by which the set was chosen: weights from one split, loss on the other."""
    fitted_loss: float
    """Loss of the linear pool on the text that its weights were fitted on."""
    pseudo_tokens: float
    """Strength of the shrinkage towards uniform weights; 0 without shrinkage."""
    test: Interval
    to_best_single: Interval
    """Test loss minus that of the single member that is best on the test split (picked with hindsight); negative is better."""
    losses_N: FloatArray = field(repr=False, compare=False)
    """Loss of every test token."""
    pool: Pool = "linear"
    temperature: float = 1.0

    def running(self) -> Self:
        """The same mixture without members of weight 0: an engine does not run them, so they cost nothing."""
        pairs = [pair for pair in zip(self.members, self.weights, strict=True) if pair[1] > 0]
        members, weights = zip(*pairs, strict=True)
        return replace(self, members=members, weights=weights)


@dataclass(frozen=True, kw_only=True)
class TierFit:
    """A tier's mixture and its alternatives. Differences are the tier's test loss minus the alternative's; negative is better."""

    name: str
    mixture: Mixture
    to_uniform: Interval
    """To all members with equal weights."""
    to_reference: Interval
    """To the reference's rule with as many members: the top K of one softmax fit on the same text, renormalised."""
    to_tier_below: Interval | None
    unrestricted: Mixture
    """The best set of this size, or within this tier's cost limit, that need not contain the tier below."""
    price_of_nesting: Interval
    """Test loss of the nested set minus that of the unrestricted one, both pooled linearly at temperature 1."""
    linear: Mixture
    """The same members pooled linearly at temperature 1; equals `mixture` unless another pool is better."""
    pools: tuple[PoolFit, ...]
    """The other pools that were tried."""
    fitted_to_reference: float
    """Loss of the linear pool on the fitted text minus that of the reference's rule. It can be positive: members are chosen by
    held-out loss and include those of the tier below."""


@dataclass(frozen=True, kw_only=True)
class SequentialGain:
    """What the most expensive tier would gain from weights that adapt to each document; see `prior.sequential`. Not served."""

    power: float
    """The best power on the fitness and selection splits."""
    difference: Interval
    """Test loss with adaptive weights minus that with fixed weights; negative means adapting is better."""


@dataclass(frozen=True, kw_only=True)
class PriorFit:
    """All results of a fit. Members are indices of rows of the likelihood matrix."""

    tiers: tuple[TierFit, ...]
    path: tuple[Mixture, ...]
    """Nested sets of 1, 2, ... members. Every tier is one of these sets."""
    num_useful: int
    """Number of members after which the held-out loss falls by at most `USEFUL_NATS` more."""
    singles: tuple[Interval, ...]
    """Test loss of every member alone."""
    uniform: Interval
    all_members: Fit = field(repr=False)
    """Optimal weights of all members, with their certificate."""
    all_members_test: Interval
    reference_M: FloatArray = field(repr=False)
    reference: tuple[Interval, ...]
    """Test loss of the reference's rule, for each size in `path`."""
    member_stats: MemberStats = field(repr=False)
    sequential: SequentialGain
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
    """Fit a tier for each budget and a tier `max` of all useful members; see `tier_sizes`.

    Args:
        held_out: the likelihoods.
        budgets: number of members of each tier, by name; None: default tiers.
        limited: instead of `budgets`, names of tiers with a cost limit, in the order of `limits.tiers`.
        limits: costs of the members, cost limits of the tiers, and a cap for all sets.
        max_members: most members in a tier; a larger number in `budgets` raises it.
        shrink: shrink the weights of every set towards uniform, with a strength from cross-validation over documents.
        source: distributions on the three splits; required with `pools`.
        pools: pools to fit with a temperature for every tier. A tier gets the best of these and the linear pool at temperature 1
            by held-out loss.

    Raises:
        ChorusError: a budget is below 1 or above the population's size; a limit is too low; the likelihoods cannot be fitted; the
            test split has fewer than two documents.
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
            f"a tier has a budget of {largest} members, but only {len(choices)} on the nested path fit under the cap for all tiers."
        )
    all_members = solve(held_out.fitted)
    reference_M = reference_weights(held_out.fitted)
    scorer = _Scorer(held_out, bootstrap, shrink=shrink)
    path = tuple(scorer.mixture(choice) for choice in choices)
    pool_fits_of_tiers = _fit_pools(held_out, [choices[size - 1] for size in sizes.values()], path, source, pools)
    tiers: list[TierFit] = []
    for (name, size), pool_fits in zip(sizes.items(), pool_fits_of_tiers, strict=True):
        top = tuple(int(idx) for idx in np.argsort(-reference_M, kind="stable")[:size])
        if name in limited:
            free = best_within(held_out.fitted, folds, limits, limits.tiers[limited.index(name)])
        else:
            free = best_set(held_out.fitted, folds, size, starts=(choices[size - 1].members, top))
        mixture = scorer.pooled(path[size - 1], pool_fits, source).running()
        tiers.append(
            scorer.tier(
                name,
                mixture,
                path[size - 1],
                pool_fits,
                scorer.mixture(free),
                reference_M,
                tiers[-1].mixture if tiers else None,
            )
        )
    return PriorFit(
        tiers=tuple(tiers),
        path=path,
        num_useful=num_useful,
        singles=tuple(bootstrap.loss(losses_N) for losses_N in scorer.singles),
        uniform=bootstrap.loss(scorer.uniform_N),
        all_members=all_members,
        all_members_test=bootstrap.loss(mixture_losses(held_out.test, all_members.weights_M)),
        reference_M=reference_M,
        reference=tuple(bootstrap.loss(scorer.reference(reference_M, k + 1)) for k in range(len(path))),
        member_stats=compute_member_stats(held_out.test, bootstrap, [tier.mixture.losses_N for tier in tiers]),
        sequential=scorer.sequential_gain(tiers[-1].linear),
        warnings=tuple(_warnings(tiers, sizes, bootstrap)),
    )


def check_budgets(budgets: dict[str, int] | None, num_members: int) -> None:
    """Raise ChorusError for budgets that the population cannot meet."""
    for name, size in (budgets or {}).items():
        if not 1 <= size <= num_members:
            raise ChorusError(
                f"tier {name!r} has a budget of {size} members; the population has {num_members}. Give 1 to {num_members}."
            )
        if name == MAX_TIER:
            raise ChorusError(
                f"the tier {MAX_TIER!r} takes no budget: it holds all useful members. Choose another name."
            )
    if budgets is not None and (not budgets or len(set(budgets.values())) < len(budgets)):
        raise ChorusError(
            f"budgets {budgets} are empty or repeat a size: give each tier a different number of members."
        )


def _distinct(names: tuple[str, ...], sizes: list[int]) -> dict[str, int]:
    """Sizes of tiers with a cost limit, by name. Raises ChorusError if a tier has the same members as the one below."""
    for (below, fewer), (name, size) in itertools.pairwise(zip(names, sizes, strict=True)):
        if size == fewer:
            raise ChorusError(
                f"tier {name!r} would have the same {size} members as {below!r}: no other member that fits its limit lowers the "
                "held-out loss. Raise its limit, or leave it out."
            )
    return dict(zip(names, sizes, strict=True))


def _fit_pools(
    held_out: HeldOut, choices: list[Choice], path: tuple[Mixture, ...], source: Source | None, pools: Sequence[Pool]
) -> list[list[PoolFit]]:
    """Fits of all `pools`, for every chosen set."""
    if not pools:
        return [[] for _ in choices]
    if source is None:
        raise ValueError("fitting pools needs `source`, a source of distributions")
    sets = []
    for choice in choices:
        mixture = path[len(choice.members) - 1]
        weight_of = dict(zip(mixture.members, mixture.weights, strict=True))
        both_K = np.array([weight_of[member] for member in choice.members])
        fitness_K, selection_K = choice.weights_FS
        sets.append(LinearSet(members=choice.members, weights_on=(fitness_K, selection_K, both_K)))
    return fit_pools(source, sets, pools=pools)


def tier_sizes(budgets: dict[str, int] | None, num_members: int, num_useful: int) -> dict[str, int]:
    """Number of members of every tier, by name, from the smallest.

    With `budgets`: all of them, and `max` if it is larger. Without: those of `DEFAULT_BUDGETS` that are smaller than `max`, since a
    larger tier would be `max` under another name; and `max`.
    """
    if budgets is not None:
        sizes = dict(sorted(budgets.items(), key=lambda item: item[1]))
        return sizes if max(sizes.values()) >= num_useful else {**sizes, MAX_TIER: num_useful}
    if num_members == 1:
        return {"economy": 1}
    return {name: size for name, size in DEFAULT_BUDGETS.items() if size < num_useful} | {MAX_TIER: num_useful}


def useful_members(losses: list[float]) -> int:
    """The fewest members whose held-out loss is within `USEFUL_NATS` of the path's lowest, but at least two of several.

    With one, every budget would serve the same single model. If the second member does not help, the fit has a warning.
    """
    within = [loss <= min(losses) + USEFUL_NATS for loss in losses]
    return max(within.index(True) + 1, min(2, len(losses)))


class _Scorer:
    """Evaluates mixtures on the test split. Keeps per-token losses that several comparisons use."""

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
        """Test losses (N) of each member alone."""
        return (mixture_losses(self._held_out.test, weights_M) for weights_M in self._identity_MM)

    def mixture(self, choice: Choice) -> Mixture:
        """The chosen set with weights refitted on the fitness and selection splits together."""
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
        """`linear`, or the best of `pool_fits` if its held-out loss is lower by more than `POOL_NATS`."""
        best = min(pool_fits, key=lambda pool_fit: pool_fit.held_out_loss, default=None)
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
        """The tier with its differences to the alternatives."""
        size = len(mixture.members)
        reference_fitted_N = mixture_losses(self._held_out.fitted, top_by_weight(reference_M, size))

        def difference_to(other_N: FloatArray) -> Interval:
            return self._bootstrap.difference(mixture.losses_N, other_N)

        return TierFit(
            name=name,
            mixture=mixture,
            to_uniform=difference_to(self.uniform_N),
            to_reference=difference_to(self.reference(reference_M, size)),
            to_tier_below=None if below is None else difference_to(below.losses_N),
            unrestricted=free,
            price_of_nesting=self._bootstrap.difference(linear.losses_N, free.losses_N),
            linear=linear,
            pools=tuple(pool_fits),
            fitted_to_reference=linear.fitted_loss - float(reference_fitted_N.mean()),
        )

    def reference(self, reference_M: FloatArray, num_members: int) -> FloatArray:
        """Test losses (N) of the reference's rule."""
        return mixture_losses(self._held_out.test, top_by_weight(reference_M, num_members))

    def sequential_gain(self, mixture: Mixture) -> SequentialGain:
        """The gain from adaptive weights, with the power fitted on the fitness and selection splits."""
        rows, weights_K = list(mixture.members), np.asarray(mixture.weights)
        power = fit_power(self._held_out.fitted[rows], weights_K, self._held_out.fitted_offsets).power
        losses_N = sequential_losses(self._held_out.test[rows], weights_K, self._held_out.test_offsets, power)
        return SequentialGain(power=power, difference=self._bootstrap.difference(losses_N, mixture.losses_N))


def _warnings(tiers: list[TierFit], sizes: dict[str, int], bootstrap: Bootstrap) -> list[str]:
    warnings = []
    for tier in tiers:
        if (running := len(tier.mixture.members)) < sizes[tier.name]:
            warnings.append(
                f"{tier.name} runs {running} of {sizes[tier.name]} members: the others have weight 0 on this text"
            )
    if bootstrap.num_documents < FEW_DOCUMENTS:
        warnings.append(
            f"the test split has only {bootstrap.num_documents} documents: intervals from fewer than {FEW_DOCUMENTS} are too narrow"
        )
    compared = [(tier, below.name, tier.to_tier_below) for below, tier in itertools.pairwise(tiers)]
    compared += [
        (tier, "the best single member", tier.mixture.to_best_single) for tier in tiers if len(tier.mixture.members) > 1
    ]
    for tier, other, difference in compared:
        assert difference is not None
        if difference.high >= 0:
            verdict = (
                "is worse than"
                if difference.low > 0
                else "is not better than"
                if difference.nats >= 0
                else "may not be better than"
            )
            warnings.append(
                f"{tier.name} {verdict} {other} on the test split: {difference.nats:+.4f} nats "
                f"[{difference.low:+.4f}, {difference.high:+.4f}]"
            )
    return warnings
