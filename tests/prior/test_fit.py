import itertools

import numpy as np
import pytest

from chorus.population.errors import ChorusError
from chorus.prior.choosing import tier_sizes, useful_members
from chorus.prior.fit import fit_prior
from chorus.prior.frontier import knee
from chorus.prior.held_out import HeldOut
from chorus.prior.reference import top_by_weight
from chorus.prior.selection import Limits
from chorus.prior.weights import mixture_losses
from tests.prior.matrices import some_likelihoods, trained_snapshots


def some_held_out(num_members=8, *, duplicates=0, seed=0, noise=0.8):
    p_MN = some_likelihoods(num_members, 3_000, duplicates=duplicates, seed=seed, noise=noise)
    return HeldOut(
        probabilities_MN=p_MN,
        num_fitness=1_000,
        num_selection=800,
        fitted_offsets=np.arange(0, 1_801, 50),
        test_offsets=np.arange(0, 1_201, 60),
    )


def test_a_tier_is_left_out_where_max_needs_no_more():
    held_out = some_held_out(3)

    assert [tier.name for tier in fit_prior(held_out).tiers] == ["economy", "standard", "max"]
    assert tier_sizes(None, 4, 4) == {"economy": 1, "standard": 2, "max": 4}
    assert tier_sizes(None, 9, 6) == {"economy": 1, "standard": 2, "premium": 4, "max": 6}
    assert tier_sizes(None, 2, 2) == {"economy": 1, "max": 2}
    assert tier_sizes(None, 1, 1) == {"economy": 1}


def test_budgets_that_were_asked_for_are_kept():
    assert tier_sizes({"big": 5, "small": 2}, 9, 4) == {"small": 2, "big": 5}
    assert tier_sizes({"small": 2}, 9, 4) == {"small": 2, "max": 4}


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({"big": 9}, "population has 8"),
        ({"none": 0}, "budget of 0"),
        ({"max": 3}, "takes no budget"),
        ({"a": 2, "b": 2}, "repeat a size"),
        ({}, "are empty"),
    ],
)
def test_refuses_budgets_that_cannot_be_met(budgets, message):
    with pytest.raises(ChorusError, match=message):
        fit_prior(some_held_out(), budgets=budgets)


def test_useful_members_end_where_the_gain_does():
    assert useful_members([3.0, 2.9, 2.8501, 2.85, 2.8499]) == 3
    assert useful_members([3.0, 2.9, 2.8, 2.7]) == 4
    assert useful_members([3.0, 3.1, 3.2]) == 2
    assert useful_members([3.0]) == 1


def test_duplicates_are_not_useful():
    fit = fit_prior(some_held_out(8, duplicates=4))

    assert fit.num_useful == 4
    assert {min(m, {7: 0, 6: 1, 5: 2, 4: 3}.get(m, m)) for m in fit.tiers[-1].mixture.members} == {0, 1, 2, 3}


def test_every_difference_is_that_of_the_two_losses():
    fit = fit_prior(some_held_out())
    best = min(single.nats for single in fit.singles)

    for below, tier in itertools.pairwise(fit.tiers):
        assert tier.to_tier_below.nats == pytest.approx(tier.mixture.test.nats - below.mixture.test.nats)
    for tier in fit.tiers:
        nats = tier.mixture.test.nats
        assert tier.mixture.to_best_single.nats == pytest.approx(nats - best)
        assert tier.to_uniform.nats == pytest.approx(nats - fit.uniform.nats)
        assert tier.to_reference.nats == pytest.approx(nats - fit.reference[len(tier.mixture.members) - 1].nats)
        assert tier.price_of_nesting.nats == pytest.approx(nats - tier.unrestricted.test.nats)


def test_warns_where_a_tier_is_not_better_than_the_one_below():
    p_MN = some_likelihoods(2, 3_000, noise=0.1)
    p_MN[1] = p_MN[0] * 0.2  # worse at every token
    held_out = HeldOut(
        probabilities_MN=p_MN,
        num_fitness=1_000,
        num_selection=800,
        fitted_offsets=np.arange(0, 1_801, 50),
        test_offsets=np.arange(0, 1_201, 60),
    )

    fit = fit_prior(held_out)

    assert any("max is not better than economy" in warning for warning in fit.warnings)
    assert (fit.tiers[-1].mixture.members, fit.tiers[-1].mixture.weights) == ((0,), (1.0,))
    assert "max runs 1 of 2 members: the others have weight 0 on this text" in fit.warnings
    assert not any("better" in warning for warning in fit_prior(some_held_out(4)).warnings)


def test_shrinkage_draws_weights_to_uniform_where_text_is_little():
    generator = np.random.default_rng(0)
    held_out = HeldOut(
        probabilities_MN=np.exp(-generator.gamma(2.0, 1.0, size=(8, 2_000))),
        num_fitness=100,
        num_selection=100,
        fitted_offsets=np.arange(0, 201, 10),
        test_offsets=np.arange(0, 1_801, 50),
    )

    plain, shrunk = (
        fit_prior(held_out, budgets={"all": 8}, shrink=shrink).tiers[0].mixture for shrink in (False, True)
    )

    assert plain.pseudo_tokens == 0 < shrunk.pseudo_tokens
    assert np.ptp(shrunk.weights) < np.ptp(plain.weights) / 2
    assert shrunk.test.nats < plain.test.nats


def snapshots_held_out():
    p, offsets = trained_snapshots()
    num_fitness = p["fitness"].shape[1]
    return HeldOut(
        probabilities_MN=np.concatenate(list(p.values()), axis=1),
        num_fitness=num_fitness,
        num_selection=p["selection"].shape[1],
        fitted_offsets=np.concatenate([offsets["fitness"], num_fitness + offsets["selection"][1:]]),
        test_offsets=offsets["test"],
    )


def test_on_trained_snapshots_tiers_hold_up_against_the_reference_on_text_that_nothing_was_fitted_on():
    held_out = snapshots_held_out()

    fit = fit_prior(held_out)

    for tier in fit.tiers:
        assert tier.to_reference.low <= 0, tier.name  # no worse within the interval
        theirs = mixture_losses(held_out.fitted, top_by_weight(fit.reference_M, len(tier.mixture.members))).mean()
        weights_M = np.zeros(10)
        weights_M[list(tier.mixture.members)] = tier.mixture.weights
        ours = mixture_losses(held_out.fitted, weights_M).mean()
        assert tier.mixture.fitted_loss == pytest.approx(ours)
        assert tier.fitted_to_reference == pytest.approx(ours - theirs)
    assert fit.tiers[-1].mixture.to_best_single.high < 0
    assert fit.all_members.loss <= mixture_losses(held_out.fitted, fit.reference_M).mean()


def test_tiers_that_are_limited_in_cost_keep_to_it_and_are_nested():
    held_out = some_held_out()
    limits = Limits(costs_M=np.array([1.0, 3.0, 0.5, 2.0, 1.0, 0.5, 3.0, 1.0]), tiers=(0.7, 2.6), cap=5.0)

    fit = fit_prior(held_out, limited=("small", "big"), limits=limits)

    assert [tier.name for tier in fit.tiers][:2] == ["small", "big"]
    for tier, limit in zip(fit.tiers, (0.7, 2.6, 5.0), strict=False):
        assert limits.cost(tier.mixture.members) <= limit
    for below, tier in itertools.pairwise(fit.tiers):
        assert set(below.mixture.members) < set(tier.mixture.members)
    with pytest.raises(ChorusError, match="the same 1 members"):
        fit_prior(held_out, limited=("a", "b"), limits=Limits(costs_M=np.ones(8), tiers=(1.0, 1.5)))
    with pytest.raises(ChorusError, match=r"only \d on the nested path fit under the cap"):
        fit_prior(held_out, budgets={"a": 4}, limits=Limits(costs_M=np.ones(8), cap=3.0))


def test_the_knee_is_where_the_curve_bends():
    assert knee([1, 2, 3, 4, 5], [5.0, 3.0, 2.8, 2.7, 2.6]) == 1
    assert knee([1, 2, 3], [3.0, 2.0, 1.0]) is None
    assert knee([1, 2], [3.0, 2.0]) is None
    assert knee([1, 2, 3], [3.0, 3.1, 3.2]) is None
