"""Evaluates chosen sets: weights refitted on all fitted text, losses on the test split, and differences to the alternatives."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from chorus.population.manifest import Pool
from chorus.prior.bootstrap import Bootstrap, Interval
from chorus.prior.held_out import HeldOut
from chorus.prior.pools import TEST, Pooled, PoolFit, Source, pooled_losses
from chorus.prior.quadratic import FloatArray
from chorus.prior.reference import top_by_weight
from chorus.prior.selection import Choice
from chorus.prior.sequential import fit_power, sequential_losses
from chorus.prior.shrinkage import choose_shrinkage
from chorus.prior.weights import mixture_losses, solve

# M members, N tokens, K members of a tier
POOL_NATS = 1e-4  # another pool must gain more held-out loss than this to replace the linear pool at temperature 1


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


class Evaluator:
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
        *,
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
