"""Chooses the members of every budget, by loss on text that their weights were not fitted on. Arrays in, members out.

A `Fold` fits a set's weights on some tokens and computes its loss on others. `cross_folds` uses the fitness and the selection
split in both roles, so all held-out tokens serve both purposes, and none scores weights that were fitted on it. `same_tokens`
fits and scores on the same tokens. `nested_path` grows one set member by member; `best_set` searches sets of one size without
that restriction.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from chorus.population.errors import ChorusError
from chorus.prior.quadratic import FloatArray
from chorus.prior.weights import Probabilities, check_probabilities, mixture_losses, solve

# M members of the population, N tokens, S members of a set
EXACT_SETS = 1_000  # search exhaustively up to this number of sets; covers every size for up to 12 members
_SEARCH_GAP = 1e-6  # nats; gap to which weights are fitted during the search
_SHORTLIST = 8  # top-ranked candidates for an addition that get a full refit
_SWAP_SHORTLIST = 4  # the same for an exchange
_SAMPLE_TOKENS = 16_384  # tokens on which candidates are ranked
_CANDIDATE_WEIGHTS = (0.03, 0.1, 0.25, 0.5)  # weights at which a candidate is ranked
_MAX_EXCHANGE_SIZE = (
    16  # members of a set on the path; for larger sets, exchanges take minutes and gain less than 1e-4 nats
)
_MIN_GAIN = 1e-7  # nats; smaller gains may be rounding


@dataclass(frozen=True, kw_only=True)
class Fold:
    """The tokens on which weights are fitted, and the tokens on which the resulting loss is computed."""

    fit: slice
    score: slice


def cross_folds(num_fitness: int, num_selection: int) -> tuple[Fold, Fold]:
    """Fit on the first `num_fitness` tokens and score on the next `num_selection`, and the other way round."""
    fitness, selection = slice(0, num_fitness), slice(num_fitness, num_fitness + num_selection)
    return Fold(fit=fitness, score=selection), Fold(fit=selection, score=fitness)


def same_tokens(num_tokens: int) -> tuple[Fold]:
    """Fit and score on the same tokens."""
    return (Fold(fit=slice(0, num_tokens), score=slice(0, num_tokens)),)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A set of members with its loss and weights."""

    members: tuple[int, ...]
    """In the order in which they were added."""
    loss: float
    """On the folds' `score` tokens, with weights fitted on their `fit` tokens; nats per token."""
    weights_FS: tuple[FloatArray, ...] = field(repr=False)
    """For each fold, weights in the order of `members`."""


def nested_path(probabilities_MN: Probabilities, folds: tuple[Fold, ...], max_members: int) -> list[Choice]:
    """Nested sets of 1, 2, ... `max_members` members, with all weights refitted for every set.

    The path starts at the best single member and grows in blocks, to 2, 4, 8, ... members: the sizes of tiers are thus searched
    best. A block is added greedily. Its members (not those of smaller sets) are then exchanged while that lowers the loss, and
    appended to the path in greedy order.

    Raises:
        ChorusError: the matrix cannot be fitted; see `weights.fit_weights`.
    """
    check_probabilities(probabilities_MN)
    evaluator = SetEvaluator(probabilities_MN, folds)
    return _grow(evaluator, [evaluator.best_single()], max_members)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Cost limits of sets. A set costs the sum of its members' costs. All amounts are in the same, arbitrary unit."""

    costs_M: FloatArray
    """Cost of each member, above 0."""
    tiers: tuple[float, ...] = ()
    """Limit of each tier, in rising order."""
    cap: float = math.inf
    """Limit of every set."""

    def cost(self, members: tuple[int, ...]) -> float:
        """Cost of a set."""
        return float(self.costs_M[list(members)].sum())

    def fits(self, members: tuple[int, ...], limit: float) -> bool:
        """Whether a set costs at most `limit`, up to rounding."""
        return self.cost(members) <= limit * (1 + 1e-9)


def nested_path_within(
    probabilities_MN: Probabilities, folds: tuple[Fold, ...], limits: Limits, max_members: int
) -> tuple[list[Choice], list[int]]:
    """A nested path within cost limits, and the number of members of each tier on it.

    Each tier is the best set within its limit that contains the tier below; its members are appended in greedy order. After the
    most expensive tier, the path grows as in `nested_path`, up to `max_members` and the cap.

    Raises:
        ChorusError: the matrix cannot be fitted, or no member fits a limit.
    """
    check_probabilities(probabilities_MN)
    path: list[Choice] = []
    sizes = []
    for limit in limits.tiers:
        keep = path[-1].members if path else ()
        best = best_set_within(probabilities_MN, folds, limits, limit, keep=keep)
        _append_block(SetEvaluator(probabilities_MN, folds), path, best)
        sizes.append(len(path))
    evaluator = SetEvaluator(probabilities_MN, folds, fits=lambda members: limits.fits(members, limits.cap))
    path = path or [evaluator.best_single()]
    return _grow(evaluator, path, max_members), sizes


def best_set_within(
    probabilities_MN: Probabilities,
    folds: tuple[Fold, ...],
    limits: Limits,
    limit: float,
    *,
    keep: tuple[int, ...] = (),
    exact_sets: int = EXACT_SETS,
) -> Choice:
    """The best set that costs at most `limit` and contains `keep`.

    If at most `exact_sets` sets leave no room for another member, all of them are tried. Otherwise two greedy sets, one by gain and
    one by gain per cost, are improved by exchange. Members that do not lower the loss are then removed: they would only add cost.

    Raises:
        ChorusError: no member fits.
    """
    all_members = range(len(probabilities_MN))
    evaluator = SetEvaluator(probabilities_MN, folds, fits=lambda members: limits.fits(members, limit))
    if not any(limits.fits((*keep, member), limit) for member in all_members if member not in keep):
        if keep:
            return evaluator.evaluate(keep)
        raise ChorusError(
            f"no member fits a limit of {limit:g}: the cheapest costs {float(limits.costs_M.min()):g}. Allow at least that."
        )
    full = list(itertools.islice(_full_sets(limits, limit, keep), exact_sets + 1))
    if len(full) <= exact_sets:
        best = min((evaluator.evaluate(members) for members in full), key=_loss)
    else:
        improved = []
        for per_cost in (None, limits.costs_M):
            choice = evaluator.evaluate(keep) if keep else evaluator.best_single(per_cost)
            while (larger := evaluator.best_addition(choice, _SHORTLIST, per_cost)) is not None:
                choice = larger
            improved.append(_exchange_and_fill(evaluator, choice, keep))
        best = min(improved, key=_loss)
    return evaluator.prune(best, keep=keep)


def _full_sets(limits: Limits, limit: float, keep: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every set that contains `keep`, costs at most `limit` and has no room for another member."""
    others = sorted((m for m in range(len(limits.costs_M)) if m not in keep), key=lambda m: -limits.costs_M[m])

    def extend(members: tuple[int, ...], position: int, skipped: int | None) -> Iterator[tuple[int, ...]]:
        # The last skipped member is the cheapest skipped one. If it fits even with all remaining members, no set of this branch
        # is full; otherwise at least one is. So every branch that is entered yields a set.
        if skipped is not None and limits.fits((*members, *others[position:], skipped), limit):
            return
        if position == len(others):
            yield members
            return
        if limits.fits((*members, others[position]), limit):
            yield from extend((*members, others[position]), position + 1, skipped)
        yield from extend(members, position + 1, others[position])

    return (members for members in extend(keep, 0, None) if members)


def _exchange_and_fill(evaluator: "SetEvaluator", choice: Choice, keep: tuple[int, ...]) -> Choice:
    """Alternate exchanges and additions: an exchange for a cheaper member can make room for another."""
    while True:
        exchanged = evaluator.exchange(choice, keep=keep)
        filled = evaluator.best_addition(exchanged, _SHORTLIST)
        if filled is None or filled.loss > exchanged.loss - _MIN_GAIN:
            return exchanged
        choice = filled


def _grow(evaluator: "SetEvaluator", path: list[Choice], max_members: int) -> list[Choice]:
    """Extend a path in blocks, each doubling its size, while there is room."""
    max_members = min(max_members, evaluator.num_members)
    while len(path) < max_members:
        base = path[-1]
        block = base
        while len(block.members) < min(2 * len(base.members), max_members):
            larger = evaluator.best_addition(block, _SHORTLIST)
            if larger is None:
                break
            block = larger
        if block is base:
            break
        if len(block.members) <= _MAX_EXCHANGE_SIZE:
            block = evaluator.exchange(block, keep=base.members)
        _append_block(evaluator, path, block)
    return path


def _append_block(evaluator: "SetEvaluator", path: list[Choice], block: Choice) -> None:
    """Append the members of `block` that are not on the path yet, one by one in greedy order."""
    remaining = set(block.members) - set(path[-1].members if path else ())
    while remaining:
        before = path[-1].members if path else ()
        path.append(min((evaluator.evaluate((*before, m), start=block) for m in sorted(remaining)), key=_loss))
        remaining -= set(path[-1].members)


def best_set(
    probabilities_MN: Probabilities,
    folds: tuple[Fold, ...],
    num_members: int,
    *,
    starts: tuple[tuple[int, ...], ...] = (),
    exact_sets: int = EXACT_SETS,
) -> Choice:
    """The best set of `num_members`, without a nesting constraint.

    If there are at most `exact_sets` sets of this size, all are tried. Otherwise the greedy set and each of `starts` (sets of this
    size) are improved by exchanging one member at a time, until no shortlisted exchange lowers the loss.
    """
    check_probabilities(probabilities_MN)
    evaluator = SetEvaluator(probabilities_MN, folds)
    if math.comb(len(probabilities_MN), num_members) <= exact_sets:
        every = itertools.combinations(range(len(probabilities_MN)), num_members)
        return min((evaluator.evaluate(members) for members in every), key=_loss)
    greedy = evaluator.best_single()
    while len(greedy.members) < num_members:
        larger = evaluator.best_addition(greedy, _SHORTLIST)
        assert larger is not None, "without limits there is always room"
        greedy = larger
    improved = [evaluator.exchange(choice) for choice in (greedy, *(evaluator.evaluate(members) for members in starts))]
    return min(improved, key=_loss)


class SetEvaluator:
    """Evaluates sets on one matrix, each at most once. Searches only sets for which `fits` is true."""

    def __init__(
        self,
        probabilities_MN: Probabilities,
        folds: tuple[Fold, ...],
        *,
        fits: Callable[[tuple[int, ...]], bool] = lambda members: True,
    ) -> None:
        self._probabilities_MN = probabilities_MN
        self.num_members = len(probabilities_MN)
        self._fits = fits
        self._folds = folds
        self._cache: dict[frozenset[int], Choice] = {}
        num_tokens = probabilities_MN.shape[1]
        self._sample = slice(0, num_tokens, -(-num_tokens // _SAMPLE_TOKENS))

    def evaluate(self, members: tuple[int, ...], start: Choice | None = None) -> Choice:
        """Fit the set's weights on every fold and compute its loss. `start` is a similar set, for a warm start."""
        key = frozenset(members)
        if key not in self._cache:
            sum_loss, num_scored, weights_FS = 0.0, 0, []
            rows_SN = self._probabilities_MN[list(members)]
            for idx, fold in enumerate(self._folds):
                start_S = None if start is None else _warm_start(members, start.members, start.weights_FS[idx])
                weights_S = solve(rows_SN[:, fold.fit], gap=_SEARCH_GAP, start_M=start_S).weights_M
                losses_N = mixture_losses(rows_SN[:, fold.score], weights_S)
                sum_loss += float(losses_N.sum())
                num_scored += len(losses_N)
                weights_FS.append(weights_S)
            self._cache[key] = Choice(members=members, loss=sum_loss / num_scored, weights_FS=tuple(weights_FS))
        return self._cache[key]

    def best_single(self, per_cost_M: FloatArray | None = None) -> Choice:
        """The member with the lowest loss; with costs, the one with the most likelihood per cost.

        Raises:
            ChorusError: no member fits.
        """
        singles = [self.evaluate((idx,)) for idx in range(self.num_members) if self._fits((idx,))]
        if not singles:
            raise ChorusError("no member fits the limit: the cheapest costs more. Raise the limit.")
        if per_cost_M is None:
            return min(singles, key=_loss)
        costs_M = per_cost_M
        return min(singles, key=lambda choice: choice.loss + math.log(costs_M[choice.members[0]]))

    def best_addition(self, choice: Choice, shortlist: int, per_cost_M: FloatArray | None = None) -> Choice | None:
        """`choice` with one more member: the best, after a full refit, of the `shortlist` top-ranked candidates. None without room.

        With costs, the best is the one with the largest gain per cost.
        """
        extended = [
            self.evaluate((*choice.members, idx), start=choice) for idx in self._ranked_candidates(choice)[:shortlist]
        ]
        if not extended or per_cost_M is None:
            return min(extended, key=_loss, default=None)
        costs_M = per_cost_M

        def loss_change_per_cost(larger: Choice) -> float:
            (added,) = set(larger.members) - set(choice.members)
            return (larger.loss - choice.loss) / float(costs_M[added])

        return min(extended, key=loss_change_per_cost)

    def prune(self, choice: Choice, *, keep: tuple[int, ...] = ()) -> Choice:
        """`choice` without the members, except those of `keep`, whose removal does not raise its loss."""
        while len(choice.members) > 1 and (removable := [m for m in choice.members if m not in keep]):
            smaller = (
                self.evaluate(tuple(m for m in choice.members if m != removed), start=choice) for removed in removable
            )
            best = min(smaller, key=_loss)
            if best.loss > choice.loss + _MIN_GAIN:
                break
            choice = best
        return choice

    def exchange(self, choice: Choice, *, keep: tuple[int, ...] = ()) -> Choice:
        """`choice` after exchanging one member at a time (none of `keep`), best first, until no exchange lowers its loss."""
        while len(choice.members) > 1:
            best = choice
            for removed in (member for member in choice.members if member not in keep):
                rest = self.evaluate(tuple(m for m in choice.members if m != removed), start=choice)
                exchanged = self.best_addition(rest, _SWAP_SHORTLIST)
                best = best if exchanged is None else min(best, exchanged, key=_loss)
            if best.loss > choice.loss - _MIN_GAIN:
                break
            choice = best
        return choice

    def _ranked_candidates(self, choice: Choice) -> list[int]:
        """Members outside the set that fit, ranked by the loss of the mixture after adding each at the best of a few weights.

        The other weights are scaled, not refitted, so this is an upper bound on the loss; and it is computed on a sample of tokens.
        """
        sample_MN = self._probabilities_MN[:, self._sample]
        mixed_N = np.zeros(self._probabilities_MN.shape[1])
        rows_SN = self._probabilities_MN[list(choice.members)]
        for fold, weights_S in zip(self._folds, choice.weights_FS, strict=True):
            mixed_N[fold.score] = weights_S @ rows_SN[:, fold.score]
        mixed_N = mixed_N[self._sample]
        outside = [
            idx for idx in range(len(sample_MN)) if idx not in choice.members and self._fits((*choice.members, idx))
        ]
        with np.errstate(divide="ignore"):
            losses = {
                idx: min(-float(np.log((1 - a) * mixed_N + a * sample_MN[idx]).sum()) for a in _CANDIDATE_WEIGHTS)
                for idx in outside
            }
        return sorted(outside, key=losses.__getitem__)


def _loss(choice: Choice) -> float:
    return choice.loss


def _warm_start(members: tuple[int, ...], fitted: tuple[int, ...], weights_S: FloatArray) -> FloatArray:
    """Starting weights (not normalised) for `members` from those of a similar set. New members share a weight of 0.1."""
    by_member = dict(zip(fitted, weights_S, strict=True))
    num_new = sum(member not in by_member for member in members)
    return np.array([by_member.get(member, 0.1 / max(num_new, 1)) for member in members])
