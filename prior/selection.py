"""Which members, for every budget: sets chosen by their loss on text that their weights were not fitted on.

A set is judged by `Fold`s: its weights are fitted on one part of the tokens and its loss is counted on another. With
`cross_folds` the fitness and the selection split each play both parts, so that all held-out tokens serve both purposes and none
judges weights that it has fitted; with `same_tokens` there is one part that plays both.

`nested_path` grows one set member by member; `best_set` searches without that bond, by exchange of members, or exhaustively
where few sets exist. Arrays in, members out.
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
EXACT_SETS = 1_000  # search all sets of a size where there are at most so many; covers every size of up to 12 members
_SEARCH_GAP = 1e-6  # nats to which weights are fitted while sets are compared
_SHORTLIST = 8  # members that are tried by a full refit, of those whose addition promises most
_SWAP_SHORTLIST = 4
_SAMPLE_TOKENS = 16_384  # tokens on which the promise is computed
_SHARES = (0.03, 0.1, 0.25, 0.5)  # of the mixture that a newcomer is tried with
_EXCHANGED_UP_TO = 16  # members of a set on the path; beyond, exchanges cost minutes and gain less than 1e-4 nats
_MIN_GAIN = 1e-7  # nats below which an exchange is rounding, not progress


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Tokens on which weights are fitted, and tokens on which the resulting loss is counted."""

    fit: slice
    score: slice


def cross_folds(num_fitness: int, num_selection: int) -> tuple[Fold, Fold]:
    """Fitted on the first `num_fitness` tokens and judged on the next `num_selection`, and the other way round."""
    fitness, selection = slice(0, num_fitness), slice(num_fitness, num_fitness + num_selection)
    return Fold(fit=fitness, score=selection), Fold(fit=selection, score=fitness)


def same_tokens(num_tokens: int) -> tuple[Fold]:
    """Fitted and judged on the same tokens."""
    return (Fold(fit=slice(0, num_tokens), score=slice(0, num_tokens)),)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A set of members and what it is worth."""

    members: tuple[int, ...]
    """In the order in which they joined."""
    loss: float
    """On the tokens that judge, with weights from the tokens that fit; nats per token."""
    weights_FS: tuple[FloatArray, ...] = field(repr=False)
    """For each fold, weights in the order of `members`."""


def nested_path(probabilities_MN: Probabilities, folds: tuple[Fold, ...], max_members: int) -> list[Choice]:
    """Sets of 1, 2, ... `max_members` members, each containing the one before; all weights are refitted for every set.

    The first is the best single member. From there the path grows in blocks, to 2, 4, 8, ... members: a block is added greedily,
    then its members (not those before, which smaller sets hold) are exchanged while that lowers the loss, and they join the path
    in greedy order. So the sizes that tiers have are those that are searched best.

    Raises:
        ChorusError: the matrix cannot be fitted; see `weights.fit_weights`.
    """
    check_probabilities(probabilities_MN)
    judge = Judge(probabilities_MN, folds)
    return _grow(judge, [judge.best_single()], max_members)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What sets may cost. A set costs the sum of its members' costs; every amount is in one unit, whichever."""

    costs_M: FloatArray
    """Positive."""
    tiers: tuple[float, ...] = ()
    """What each tier may cost, rising."""
    cap: float = math.inf
    """What no set may exceed."""

    def cost(self, members: tuple[int, ...]) -> float:
        """Of a set."""
        return float(self.costs_M[list(members)].sum())

    def fits(self, members: tuple[int, ...], limit: float) -> bool:
        """Whether a set costs at most `limit`, rounding apart."""
        return self.cost(members) <= limit * (1 + 1e-9)


def path_within(
    probabilities_MN: Probabilities, folds: tuple[Fold, ...], limits: Limits, max_members: int
) -> tuple[list[Choice], list[int]]:
    """A nested path whose sets keep to limits of cost, and for each tier the number of members that it has on this path.

    Each tier is the best set within its limit that contains the tier below; its members join in greedy order. After the dearest
    tier the path grows as `nested_path` does, up to `max_members` and the cap.

    Raises:
        ChorusError: the matrix cannot be fitted, or no member fits a limit.
    """
    check_probabilities(probabilities_MN)
    path: list[Choice] = []
    sizes = []
    for limit in limits.tiers:
        keep = path[-1].members if path else ()
        best = best_within(probabilities_MN, folds, limits, limit, keep=keep)
        judge = Judge(probabilities_MN, folds)
        _join(judge, path, best)
        sizes.append(len(path))
    judge = Judge(probabilities_MN, folds, fits=lambda members: limits.fits(members, limits.cap))
    path = path or [judge.best_single()]
    return _grow(judge, path, max_members), sizes


def best_within(
    probabilities_MN: Probabilities,
    folds: tuple[Fold, ...],
    limits: Limits,
    limit: float,
    *,
    keep: tuple[int, ...] = (),
    exact_sets: int = EXACT_SETS,
) -> Choice:
    """The best set that costs at most `limit` and contains `keep`.

    All sets that leave no room for another member are tried where there are at most `exact_sets`; else two greedy sets, one by gain
    and one by gain per cost, are improved by exchange. Then members leave without which the loss is no higher: they would cost and
    change nothing.

    Raises:
        ChorusError: no member fits.
    """
    everyone = range(len(probabilities_MN))
    judge = Judge(probabilities_MN, folds, fits=lambda members: limits.fits(members, limit))
    if not any(limits.fits((*keep, member), limit) for member in everyone if member not in keep):
        if keep:
            return judge.judge(keep)
        raise ChorusError(
            f"no member fits a limit of {limit:g}: the cheapest costs {float(limits.costs_M.min()):g}. Allow that much."
        )
    full = list(itertools.islice(_full_sets(limits, limit, keep), exact_sets + 1))
    if len(full) <= exact_sets:
        best = min((judge.judge(members) for members in full), key=_loss)
    else:
        found = []
        for per_cost in (None, limits.costs_M):
            choice = judge.judge(keep) if keep else judge.best_single(per_cost)
            while (larger := judge.best_addition(choice, _SHORTLIST, per_cost)) is not None:
                choice = larger
            found.append(_exchange_and_fill(judge, choice, keep))
        best = min(found, key=_loss)
    return judge.without_idlers(best, keep=keep)


def _full_sets(limits: Limits, limit: float, keep: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every set that contains `keep`, costs at most `limit` and has room for no other member."""
    others = sorted((m for m in range(len(limits.costs_M)) if m not in keep), key=lambda m: -limits.costs_M[m])

    def extend(members: tuple[int, ...], position: int, skipped: int | None) -> Iterator[tuple[int, ...]]:
        # The member skipped last is the cheapest of those. If it fits even beside all that may still come, no such set is full;
        # if not, some set is. So every branch that is entered yields one.
        if skipped is not None and limits.fits((*members, *others[position:], skipped), limit):
            return
        if position == len(others):
            yield members
            return
        if limits.fits((*members, others[position]), limit):
            yield from extend((*members, others[position]), position + 1, skipped)
        yield from extend(members, position + 1, others[position])

    return (members for members in extend(keep, 0, None) if members)


def _exchange_and_fill(judge: "Judge", choice: Choice, keep: tuple[int, ...]) -> Choice:
    """Exchange members; where a cheaper one has come in, there may be room for another."""
    while True:
        exchanged = judge.exchange(choice, keep=keep)
        filled = judge.best_addition(exchanged, _SHORTLIST)
        if filled is None or filled.loss > exchanged.loss - _MIN_GAIN:
            return exchanged
        choice = filled


def _grow(judge: "Judge", path: list[Choice], max_members: int) -> list[Choice]:
    """Continue a path in blocks, to twice its members again and again, while there is room."""
    max_members = min(max_members, judge.num_members)
    while len(path) < max_members:
        base = path[-1]
        block = base
        while len(block.members) < min(2 * len(base.members), max_members):
            larger = judge.best_addition(block, _SHORTLIST)
            if larger is None:
                break
            block = larger
        if block is base:
            break
        if len(block.members) <= _EXCHANGED_UP_TO:
            block = judge.exchange(block, keep=base.members)
        _join(judge, path, block)
    return path


def _join(judge: "Judge", path: list[Choice], block: Choice) -> None:
    """Let the members of `block` that are not on the path yet join it one by one, the best first."""
    remaining = set(block.members) - set(path[-1].members if path else ())
    while remaining:
        before = path[-1].members if path else ()
        path.append(min((judge.judge((*before, m), start=block) for m in sorted(remaining)), key=_loss))
        remaining -= set(path[-1].members)


def best_set(
    probabilities_MN: Probabilities,
    folds: tuple[Fold, ...],
    num_members: int,
    *,
    starts: tuple[tuple[int, ...], ...] = (),
    exact_sets: int = EXACT_SETS,
) -> Choice:
    """The best set of `num_members`, bound to no other set.

    All sets are tried where there are at most `exact_sets`; else the greedy set and each of `starts` (of that size) are improved by
    exchanging one member at a time until no exchange that promises a gain keeps it.
    """
    check_probabilities(probabilities_MN)
    judge = Judge(probabilities_MN, folds)
    if math.comb(len(probabilities_MN), num_members) <= exact_sets:
        every = itertools.combinations(range(len(probabilities_MN)), num_members)
        return min((judge.judge(members) for members in every), key=_loss)
    greedy = judge.best_single()
    while len(greedy.members) < num_members:
        larger = judge.best_addition(greedy, _SHORTLIST)
        assert larger is not None, "without limits there is always room"
        greedy = larger
    improved = [judge.exchange(choice) for choice in (greedy, *(judge.judge(members) for members in starts))]
    return min(improved, key=_loss)


class Judge:
    """Judges sets on one matrix, each at most once. Only sets that `fits` allows are looked for."""

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
        self._known: dict[frozenset[int], Choice] = {}
        num_tokens = probabilities_MN.shape[1]
        self._sample = slice(0, num_tokens, -(-num_tokens // _SAMPLE_TOKENS))

    def judge(self, members: tuple[int, ...], start: Choice | None = None) -> Choice:
        """The set's weights on every fold, and its loss. `start` is a set whose weights are near."""
        key = frozenset(members)
        if key not in self._known:
            sum_loss, num_scored, weights_FS = 0.0, 0, []
            rows_SN = self._probabilities_MN[list(members)]
            for idx, fold in enumerate(self._folds):
                near_S = None if start is None else _carried_over(members, start.members, start.weights_FS[idx])
                weights_S = solve(rows_SN[:, fold.fit], gap=_SEARCH_GAP, start_M=near_S).weights_M
                losses_N = mixture_losses(rows_SN[:, fold.score], weights_S)
                sum_loss += float(losses_N.sum())
                num_scored += len(losses_N)
                weights_FS.append(weights_S)
            self._known[key] = Choice(members=members, loss=sum_loss / num_scored, weights_FS=tuple(weights_FS))
        return self._known[key]

    def best_single(self, per_cost_M: FloatArray | None = None) -> Choice:
        """The member with the lowest loss; with costs, with the most likelihood for its cost.

        Raises:
            ChorusError: no member fits.
        """
        singles = [self.judge((idx,)) for idx in range(self.num_members) if self._fits((idx,))]
        if not singles:
            raise ChorusError("no member fits the limit: the cheapest costs more. Allow more.")
        if per_cost_M is None:
            return min(singles, key=_loss)
        costs_M = per_cost_M
        return min(singles, key=lambda choice: choice.loss + math.log(costs_M[choice.members[0]]))

    def best_addition(self, choice: Choice, shortlist: int, per_cost_M: FloatArray | None = None) -> Choice | None:
        """`choice` with one more member, the best by a full refit among those whose addition promises most; None without room.

        With costs, the best is the one that gains most for its cost.
        """
        tried = [self.judge((*choice.members, idx), start=choice) for idx in self._promising(choice)[:shortlist]]
        if not tried or per_cost_M is None:
            return min(tried, key=_loss, default=None)
        costs_M = per_cost_M

        def gain(larger: Choice) -> float:
            (newcomer,) = set(larger.members) - set(choice.members)
            return (larger.loss - choice.loss) / float(costs_M[newcomer])

        return min(tried, key=gain)

    def without_idlers(self, choice: Choice, *, keep: tuple[int, ...] = ()) -> Choice:
        """`choice` after those members, none of `keep`, have left without whom its loss is no higher."""
        while len(choice.members) > 1 and (leaving := [m for m in choice.members if m not in keep]):
            rests = (self.judge(tuple(m for m in choice.members if m != member), start=choice) for member in leaving)
            best = min(rests, key=_loss)
            if best.loss > choice.loss + _MIN_GAIN:
                break
            choice = best
        return choice

    def exchange(self, choice: Choice, *, keep: tuple[int, ...] = ()) -> Choice:
        """`choice` after the exchanges of one member, none of `keep`, that lower its loss, best first, until none does."""
        while len(choice.members) > 1:
            best = choice
            for leaving in (member for member in choice.members if member not in keep):
                rest = self.judge(tuple(m for m in choice.members if m != leaving), start=choice)
                found = self.best_addition(rest, _SWAP_SHORTLIST)
                best = best if found is None else min(best, found, key=_loss)
            if best.loss > choice.loss - _MIN_GAIN:
                break
            choice = best
        return choice

    def _promising(self, choice: Choice) -> list[int]:
        """Members outside the set, by the loss of the mixture with a share of each, the best of a few shares, lowest first.

        The other weights stay in proportion, and the tokens are a sample: a bound from above, good for ranking.
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
                idx: min(-float(np.log((1 - a) * mixed_N + a * sample_MN[idx]).sum()) for a in _SHARES)
                for idx in outside
            }
        return sorted(outside, key=losses.__getitem__)


def _loss(choice: Choice) -> float:
    return choice.loss


def _carried_over(members: tuple[int, ...], known: tuple[int, ...], weights_S: FloatArray) -> FloatArray:
    """Weights for `members` from those of a similar set; newcomers start with a tenth of the mixture between them."""
    by_member = dict(zip(known, weights_S, strict=True))
    newcomers = sum(member not in by_member for member in members)
    return np.array([by_member.get(member, 0.1 / max(newcomers, 1)) for member in members])
