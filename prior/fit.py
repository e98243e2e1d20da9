"""Fits tiers from likelihoods: the members and weights of each budget, and their losses. Arrays in, a `PriorFit` out.

Sets of members are chosen by cross-fitting: weights are fitted on the fitness split and evaluated on the selection split, and the
other way round. Each chosen set's weights are then refitted on both splits together, to use all the text that may be used. All
reported losses come from the test split, which plays no other part. Files and the manifest are left to `prior.run`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from chorus.population.manifest import Pool
from chorus.prior.bootstrap import Bootstrap, Interval
from chorus.prior.choosing import choose, choose_freely
from chorus.prior.evaluation import Evaluator, Mixture, SequentialGain, TierFit
from chorus.prior.fit_warnings import find_warnings
from chorus.prior.held_out import HeldOut
from chorus.prior.member_stats import MemberStats, compute_member_stats
from chorus.prior.pools import LinearSet, PoolFit, Source, fit_pools
from chorus.prior.quadratic import FloatArray
from chorus.prior.reference import reference_weights
from chorus.prior.selection import Choice, Limits
from chorus.prior.weights import Fit, check_probabilities, mixture_losses, solve

# M members, N tokens, K members of a tier
MAX_MEMBERS = 32  # in the largest tier


@dataclass(frozen=True, kw_only=True)
class PriorFit:
    """All results of a fit. Members are indices of rows of the likelihood matrix."""

    tiers: tuple[TierFit, ...]
    path: tuple[Mixture, ...]
    """Nested sets of 1, 2, ... members. Every tier is one of these sets."""
    num_useful: int
    """Number of members after which the held-out loss falls by at most `choosing.USEFUL_NATS` more."""
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
    """Fit a tier for each budget and a tier `max` of all useful members; see `choosing.tier_sizes`.

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
    bootstrap = Bootstrap(held_out.test_offsets)
    chosen = choose(held_out, budgets=budgets, limited=limited, limits=limits, max_members=max_members)
    reference_M = reference_weights(held_out.fitted)
    evaluator = Evaluator(held_out, bootstrap, shrink=shrink)
    path = tuple(evaluator.mixture(choice) for choice in chosen.path)
    tiers: list[TierFit] = []
    pool_fits_of_tiers = _fit_pools(chosen.tiers, path, source, pools)
    for (name, size), pool_fits in zip(chosen.sizes.items(), pool_fits_of_tiers, strict=True):
        nested, linear = chosen.path[size - 1], path[size - 1]
        top = tuple(int(idx) for idx in np.argsort(-reference_M, kind="stable")[:size])
        limit = limits.tiers[limited.index(name)] if limits is not None and name in limited else None
        free = choose_freely(held_out, nested, top, limits=limits, limit=limit)
        tiers.append(
            evaluator.tier(
                name,
                mixture=evaluator.pooled(linear, pool_fits, source).running(),
                linear=linear,
                pool_fits=pool_fits,
                free=evaluator.mixture(free),
                reference_M=reference_M,
                below=tiers[-1].mixture if tiers else None,
            )
        )
    all_members = solve(held_out.fitted)
    return PriorFit(
        tiers=tuple(tiers),
        path=path,
        num_useful=chosen.num_useful,
        singles=tuple(bootstrap.loss(losses_N) for losses_N in evaluator.singles),
        uniform=bootstrap.loss(evaluator.uniform_N),
        all_members=all_members,
        all_members_test=bootstrap.loss(mixture_losses(held_out.test, all_members.weights_M)),
        reference_M=reference_M,
        reference=tuple(bootstrap.loss(evaluator.reference(reference_M, k + 1)) for k in range(len(path))),
        member_stats=compute_member_stats(held_out.test, bootstrap, [tier.mixture.losses_N for tier in tiers]),
        sequential=evaluator.sequential_gain(tiers[-1].linear),
        warnings=tuple(find_warnings(tiers, chosen.sizes, bootstrap.num_documents)),
    )


def _fit_pools(
    choices: list[Choice], path: tuple[Mixture, ...], source: Source | None, pools: Sequence[Pool]
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
