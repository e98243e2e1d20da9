import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.population.errors import ChorusError
from chorus.prior.reference import reference_weights, top_by_weight
from chorus.prior.selection import (
    Limits,
    _full_sets,
    best_set,
    best_set_within,
    cross_folds,
    nested_path,
    nested_path_within,
    same_tokens,
)
from chorus.prior.weights import fit_weights, mixture_losses
from tests.prior.matrices import some_likelihoods, trained_snapshots

NUM_TOKENS = 1_200


def judged(p_MN, members, folds):
    """The slow way: fit and count every fold from scratch."""
    losses = [
        mixture_losses(p_MN[list(members), fold.score], fit_weights(p_MN[list(members), fold.fit]).weights_M)
        for fold in folds
    ]
    return float(np.concatenate(losses).mean())


@pytest.mark.parametrize("folds", [same_tokens(NUM_TOKENS), cross_folds(700, 500)])
@pytest.mark.parametrize("num_members", [1, 2, 3, 5, 7])
def test_exact_search_agrees_with_brute_force(num_members, folds):
    p_MN = some_likelihoods(7, NUM_TOKENS, duplicates=2)
    by_hand = min(judged(p_MN, s, folds) for s in itertools.combinations(range(7), num_members))

    found = best_set(p_MN, folds, num_members)

    assert found.loss == pytest.approx(by_hand, abs=3e-6)
    assert judged(p_MN, found.members, folds) == pytest.approx(by_hand, abs=3e-6)


@pytest.mark.parametrize(("num_members", "seed"), [(12, 0), (9, 1)])
def test_exchange_comes_within_a_ten_thousandth_of_exact_search(num_members, seed):
    p_MN = some_likelihoods(num_members, 200, duplicates=3, seed=seed)
    folds = same_tokens(200)

    for size in (2, 3, 6, num_members - 1):
        exact, exchanged = best_set(p_MN, folds, size), best_set(p_MN, folds, size, exact_sets=0)
        assert exchanged.loss <= exact.loss + 1e-4, size


def test_the_path_is_nested_and_starts_at_the_best_single_member():
    p_MN = some_likelihoods(9, NUM_TOKENS, duplicates=3)
    folds = cross_folds(600, 600)

    path = nested_path(p_MN, folds, 20)

    assert [len(choice.members) for choice in path] == list(range(1, 10))
    for smaller, larger in itertools.pairwise(path):
        assert set(smaller.members) < set(larger.members)
    assert path[0].members == (int(np.argmin(-np.log(p_MN).mean(axis=1))),)
    for choice in path:
        assert choice.loss == pytest.approx(judged(p_MN, choice.members, folds), abs=3e-6)


def test_a_near_duplicate_is_left_for_last():
    p_MN = some_likelihoods(6, NUM_TOKENS, duplicates=2)  # members 4 and 5 copy 1 and 0

    order = nested_path(p_MN, same_tokens(NUM_TOKENS), 6)[-1].members

    assert {{5: 0, 4: 1}.get(member, member) for member in order[:4]} == {0, 1, 2, 3}


def trained(num_tokens=1_000):
    """Real snapshots: neighbours in a trajectory are near-duplicates."""
    return trained_snapshots()[0]["fitness"][:, :num_tokens]


@pytest.mark.parametrize(
    "p_MN",
    [
        some_likelihoods(16, 600),
        some_likelihoods(16, 600, duplicates=6, seed=1),
        some_likelihoods(16, 600, duplicates=6, seed=2),
        trained(),
    ],
    ids=["random", "near-duplicates", "other near-duplicates", "trained"],
)
def test_at_every_budget_no_worse_than_the_reference_on_the_fitted_data(p_MN):
    """Free sets at every budget, by construction; nested ones at most: they hold smaller sets, and that has its price."""
    num_members, num_tokens = p_MN.shape
    reference_M = reference_weights(p_MN)
    path = nested_path(p_MN, same_tokens(num_tokens), num_members)

    better = nested_better = 0
    sizes = [size for size in (1, 2, 3, 4, 6, 9, 12, 16) if size <= num_members]
    for size in sizes:
        top_M = top_by_weight(reference_M, size)
        theirs = float(mixture_losses(p_MN, top_M).mean())
        start = tuple(int(idx) for idx in np.flatnonzero(top_M))
        free = best_set(p_MN, same_tokens(num_tokens), size, starts=(path[size - 1].members, start), exact_sets=0)
        assert free.loss <= theirs + 1e-6, size
        assert free.loss <= path[size - 1].loss + 1e-6, size
        better += free.loss < theirs - 1e-5
        nested_better += path[size - 1].loss < theirs - 1e-5
    assert better > len(sizes) / 2
    assert nested_better > len(sizes) / 2


def test_the_reference_reaches_the_optimum_with_all_members_and_keeps_the_largest():
    p_MN = some_likelihoods(5, 2_000)
    weights_M = reference_weights(p_MN)

    assert mixture_losses(p_MN, weights_M).mean() == pytest.approx(fit_weights(p_MN).loss, abs=2e-3)
    top_M = top_by_weight(np.array([0.1, 0.4, 0.2, 0.3]), 2)
    np.testing.assert_allclose(top_M, [0, 4 / 7, 0, 3 / 7])


@given(st.integers(0, 1_000), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=15)
def test_permuting_members_permutes_the_choice(seed, random):
    p_MN = some_likelihoods(6, 400, seed=seed)
    order = list(range(6))
    random.shuffle(order)

    path, permuted = (nested_path(p, cross_folds(200, 200), 4) for p in (p_MN, p_MN[order]))

    for choice, other in zip(path, permuted, strict=True):
        assert other.loss == pytest.approx(choice.loss, abs=5e-6)


def uneven_costs(num_members, seed=0):
    return np.random.default_rng(seed).uniform(0.3, 2.0, size=num_members)


@pytest.mark.parametrize(("seed", "limit"), [(0, 1.0), (0, 3.0), (1, 4.5), (2, 100.0)])
def test_the_best_set_within_a_cost_agrees_with_brute_force(seed, limit):
    p_MN = some_likelihoods(7, 400, duplicates=2, seed=seed)
    limits = Limits(costs_M=uneven_costs(7, seed))
    every = (s for size in range(1, 8) for s in itertools.combinations(range(7), size))
    by_hand = min(judged(p_MN, s, same_tokens(400)) for s in every if limits.costs_M[list(s)].sum() <= limit)

    found = best_set_within(p_MN, same_tokens(400), limits, limit)

    assert limits.cost(found.members) <= limit
    assert found.loss == pytest.approx(by_hand, abs=3e-6)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_greedy_with_exchange_comes_close_to_the_best_set_within_a_cost(seed):
    p_MN = some_likelihoods(9, 300, duplicates=3, seed=seed)
    limits = Limits(costs_M=uneven_costs(9, seed))

    for limit in (1.5, 3.0, 6.0):
        exact = best_set_within(p_MN, same_tokens(300), limits, limit)
        greedy = best_set_within(p_MN, same_tokens(300), limits, limit, exact_sets=0)
        assert limits.cost(greedy.members) <= limit
        assert greedy.loss <= exact.loss + 2e-3, limit


def test_full_sets_are_exactly_those_without_room():
    limits = Limits(costs_M=np.array([1.0, 0.5, 2.0, 0.7, 1.3]))
    for limit, keep in ((2.0, ()), (3.3, (1,)), (9.0, ()), (0.4, ())):
        every = (set(s) for size in range(1, 6) for s in itertools.combinations(range(5), size))
        within = [s for s in every if s >= set(keep) and limits.fits(tuple(s), limit)]
        by_hand = [s for s in within if not any(s < other for other in within)]
        found = [set(s) for s in _full_sets(limits, limit, keep)]
        assert sorted(map(sorted, found)) == sorted(map(sorted, by_hand))


def test_many_members_that_all_fit_are_one_full_set():
    limits = Limits(costs_M=np.ones(200))

    assert [len(s) for s in _full_sets(limits, 200.0, ())] == [200]
    assert len(list(itertools.islice(_full_sets(limits, 100.0, ()), 50))) == 50


def test_a_path_within_costs_is_nested_and_keeps_every_limit():
    p_MN = some_likelihoods(8, 600, duplicates=2)
    limits = Limits(costs_M=uneven_costs(8), tiers=(1.2, 3.0), cap=6.0)

    path, sizes = nested_path_within(p_MN, cross_folds(300, 300), limits, 8)

    for smaller, larger in itertools.pairwise(path):
        assert set(smaller.members) < set(larger.members)
    for size, limit in zip(sizes, limits.tiers, strict=True):
        assert limits.cost(path[size - 1].members) <= limit
    assert limits.cost(path[-1].members) <= 6.0
    assert len(path) > sizes[-1]
    cheap = Limits(costs_M=np.array([1.0, 5.0, 1.0, 5.0, 1.0, 5.0, 1.0, 5.0]), cap=4.0)
    assert set(nested_path_within(p_MN, same_tokens(600), cheap, 8)[0][-1].members) <= {0, 2, 4, 6}


def test_a_useless_member_costs_nothing_because_it_is_left_out():
    p_MN = some_likelihoods(3, 400)
    p_MN[2] = p_MN[0] * 0.5
    limits = Limits(costs_M=np.ones(3))

    assert sorted(best_set_within(p_MN, same_tokens(400), limits, 3.0).members) == [0, 1]


def test_refuses_a_cost_that_no_member_fits():
    with pytest.raises(ChorusError, match="cheapest costs"):
        best_set_within(some_likelihoods(3, 50), same_tokens(50), Limits(costs_M=np.ones(3)), 0.5)
