import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.optimize import minimize

from chorus.population.errors import ChorusError
from chorus.prior.quadratic import minimise_quadratic
from chorus.prior.weights import Fit, fit_weights, mixture_losses
from tests.prior.matrices import some_likelihoods, trained_snapshots

# Probabilities of a few members on a few tokens; zeros allowed, but no column of them.
matrices = npst.arrays(
    np.float64, npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=7), elements=st.floats(0, 1)
).map(lambda p: np.where(p.max(axis=0) < 1e-6, 0.5, p))


def optimum_by_scipy(probabilities_MN):
    """The general convex solver: sequential least squares on the simplex, from uniform weights."""
    p_MN = probabilities_MN.astype(np.float64)
    num_members, num_tokens = p_MN.shape
    found = minimize(
        lambda w: -np.log(w @ p_MN).mean(),
        np.full(num_members, 1 / num_members),
        jac=lambda w: -(p_MN @ (1 / (w @ p_MN))) / num_tokens,
        bounds=[(0, 1)] * num_members,
        constraints=[{"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(num_members)}],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 2_000},
    )
    return found.fun


@pytest.mark.parametrize(("num_members", "duplicates"), [(1, 0), (2, 1), (6, 0), (12, 4), (30, 10), (70, 20)])
def test_reaches_the_optimum_of_a_general_convex_solver(num_members, duplicates):
    p_MN = some_likelihoods(num_members, 3_000, duplicates=duplicates)

    fit = fit_weights(p_MN)

    assert fit.loss == pytest.approx(optimum_by_scipy(p_MN), abs=1e-6)
    assert fit.gap <= 1e-7


def test_reaches_the_optimum_on_trained_snapshots():
    for p_MN in trained_snapshots()[0].values():
        assert fit_weights(p_MN).loss == pytest.approx(optimum_by_scipy(p_MN), abs=1e-6)


def test_the_gap_bounds_the_distance_to_the_optimum_at_every_step():
    p_MN = some_likelihoods(60, 2_000, duplicates=10)
    optimum = fit_weights(p_MN, gap=1e-12).loss

    stopped = [fit_weights(p_MN, gap=1e-12, max_steps=steps) for steps in range(5)]

    for fit in stopped:
        assert optimum - 1e-12 <= fit.loss <= optimum + fit.gap + 1e-12
    losses = [fit.loss for fit in stopped]
    assert losses == sorted(losses, reverse=True)
    assert stopped[0].gap > 1e-3  # the starting point is no optimum, so the bound was not met trivially


def test_a_start_far_off_reaches_the_same_optimum():
    p_MN = some_likelihoods(10, 2_000)
    corner_M = np.eye(10)[3]

    assert fit_weights(p_MN, start_M=corner_M).loss == pytest.approx(fit_weights(p_MN).loss, abs=2e-7)


def test_many_members_are_fitted_on_a_small_working_set():
    p_MN = some_likelihoods(300, 4_000, duplicates=150, noise=0.3)

    fit = fit_weights(p_MN)

    gradient_M = (p_MN.astype(np.float64) / (fit.weights_M @ p_MN.astype(np.float64))).mean(axis=1)
    assert gradient_M.max() - 1 <= 1.01e-7  # the certificate, computed by hand over all 300


@given(matrices)
@settings(deadline=None)
def test_weights_lie_on_the_simplex(p_MN):
    fit = fit_weights(p_MN)

    assert fit.weights_M.min() >= 0
    assert math.fsum(fit.weights_M) == pytest.approx(1, abs=1e-12)
    assert math.isfinite(fit.loss)
    assert fit.gap <= 1e-7


@given(matrices, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_permuting_members_permutes_the_mixture(p_MN, random):
    order = list(range(len(p_MN)))
    random.shuffle(order)

    fit, permuted = fit_weights(p_MN, gap=1e-10), fit_weights(p_MN[order], gap=1e-10)

    assert permuted.loss == pytest.approx(fit.loss, abs=1e-8)
    # The optimal weights may be many, the optimal mixture of each token is one.
    np.testing.assert_allclose(permuted.weights_M @ p_MN[order], fit.weights_M @ p_MN, rtol=1e-3)


def test_permuting_members_permutes_the_weights_where_the_optimum_is_unique():
    p_MN = some_likelihoods(9, 4_000)
    order = np.random.default_rng(0).permutation(9)

    np.testing.assert_allclose(fit_weights(p_MN[order]).weights_M, fit_weights(p_MN).weights_M[order], atol=1e-4)


@given(matrices, st.data())
@settings(deadline=None)
def test_a_duplicated_member_changes_no_loss(p_MN, data):
    copied = data.draw(st.integers(0, len(p_MN) - 1))

    assert fit_weights(np.vstack([p_MN, p_MN[copied]])).loss == pytest.approx(fit_weights(p_MN).loss, abs=3e-7)


def test_a_member_that_gives_zero_somewhere_yields_no_nan():
    p_MN = some_likelihoods(5, 1_000)
    p_MN[0, ::7] = 0
    p_MN[1] = 0
    p_MN[2:, 5] = 0
    p_MN[0, 5] = 0.3  # one token that only member 0 can explain

    fit = fit_weights(p_MN)

    assert fit.weights_M[1] == 0
    assert fit.weights_M[0] > 0
    assert fit.loss == pytest.approx(optimum_by_scipy(p_MN), abs=1e-6)


def test_pseudo_tokens_draw_the_weights_to_uniform():
    p_MN = some_likelihoods(8, 1_000)
    distance = [np.abs(fit_weights(p_MN, pseudo_tokens=c).weights_M - 1 / 8).sum() for c in (0, 100, 1e4, 1e8)]

    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 1e-4


def test_pseudo_tokens_maximise_the_posterior():
    p_MN, strength = some_likelihoods(6, 500).astype(np.float64), 60.0

    def penalised(weights_M):
        return -np.log(weights_M @ p_MN).sum() - strength / 6 * np.log(weights_M).sum()

    fit = fit_weights(p_MN, pseudo_tokens=strength, gap=1e-9)

    generator = np.random.default_rng(1)
    for _ in range(200):
        other_M = np.maximum(fit.weights_M + generator.normal(0, 0.01, 6), 1e-9)
        assert penalised(fit.weights_M) <= penalised(other_M / other_M.sum()) + 1e-6


def test_losses_are_those_of_the_mixture():
    p_MN, weights_M = some_likelihoods(4, 100_000), np.array([0.5, 0, 0.2, 0.3])

    np.testing.assert_allclose(
        mixture_losses(p_MN, weights_M), -np.log(weights_M @ p_MN.astype(np.float64)), rtol=1e-11
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p[:, :0], "at least one member and one token"),
        (lambda p: p[0], "at least one member and one token"),
        (lambda p: np.where(np.arange(50) == 7, 0, p), "probability 0 to token 7"),
        (lambda p: np.where(p == p[1, 3], np.nan, p), "undefined"),
        (lambda p: np.where(p == p[1, 3], -p, p), "negative"),
        (lambda p: np.where(p == p[1, 3], np.inf, p), "infinite"),
    ],
)
def test_refuses_what_cannot_be_fitted(spoil, message):
    with pytest.raises(ChorusError, match=message):
        fit_weights(spoil(some_likelihoods(3, 50)))


def test_an_unfinished_fit_says_so():
    fit = fit_weights(some_likelihoods(20, 500), gap=0.0, max_steps=1)

    assert isinstance(fit, Fit)
    assert fit.num_steps == 1
    assert fit.gap > 0


@given(st.integers(1, 8), st.integers(0, 10_000))
@settings(deadline=None)
def test_the_quadratic_step_meets_its_optimality_conditions(size, seed):
    generator = np.random.default_rng(seed)
    factor = generator.normal(size=(size, size))
    hessian, linear = factor @ factor.T + 1e-3 * np.eye(size), generator.normal(size=size)

    y = minimise_quadratic(hessian, linear, np.maximum(generator.normal(size=size), 0))

    slope = hessian @ y - linear
    assert y.min() >= 0
    assert slope.min() >= -1e-8
    assert abs(slope @ y) <= 1e-7
