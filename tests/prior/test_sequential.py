import itertools

import numpy as np
import pytest

from chorus.prior.sequential import fit_power, sequential_losses
from chorus.prior.weights import mixture_losses
from tests.prior.matrices import some_likelihoods

OFFSETS = np.array([0, 40, 40, 41, 100])


def slowly(p_MN, weights_M, offsets, power):
    """Token by token."""
    losses = []
    for start, stop in itertools.pairwise(offsets):
        w_M = weights_M.copy()
        for n in range(start, stop):
            losses.append(-np.log(w_M @ p_MN[:, n]))
            w_M = w_M * p_MN[:, n] ** power
            w_M /= w_M.sum()
    return np.array(losses)


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_equals_updating_token_by_token(power):
    p_MN, weights_M = some_likelihoods(4, 100), np.array([0.4, 0.0, 0.35, 0.25])

    found_N = sequential_losses(p_MN, weights_M, OFFSETS, power)

    np.testing.assert_allclose(found_N, slowly(p_MN.astype(float), weights_M, OFFSETS, power), rtol=1e-9)


def test_power_zero_is_the_prior_itself():
    p_MN, weights_M = some_likelihoods(4, 100), np.array([0.4, 0.0, 0.35, 0.25])

    np.testing.assert_allclose(sequential_losses(p_MN, weights_M, OFFSETS, 0.0), mixture_losses(p_MN, weights_M))


def test_power_one_is_bayes_over_whole_documents():
    """The chain rule: the losses of a document sum to that of the mixture of the members' whole-document probabilities."""
    p_MN, weights_M = some_likelihoods(3, 41).astype(float), np.array([0.5, 0.2, 0.3])

    total = sequential_losses(p_MN, weights_M, np.array([0, 41]), 1.0).sum()

    assert total == pytest.approx(-np.log(weights_M @ np.prod(p_MN, axis=1)))


def test_documents_with_one_author_each_prefer_a_power_and_gain():
    p_MN = some_likelihoods(4, 2_000)
    offsets = np.arange(0, 2_001, 50)
    author_N = np.repeat(np.arange(40) % 4, 50)
    p_MN[author_N, np.arange(2_000)] = np.minimum(p_MN[author_N, np.arange(2_000)] * 3, 0.9)
    uniform_M = np.full(4, 0.25)

    fit = fit_power(p_MN, uniform_M, offsets)

    assert fit.power > 0.1
    assert fit.losses_N.mean() < mixture_losses(p_MN, uniform_M).mean() - 0.2


def test_unrelated_tokens_prefer_no_power_and_lose_little():
    p_MN = some_likelihoods(4, 4_000, noise=1.5)
    uniform_M = np.full(4, 0.25)

    fit = fit_power(p_MN, uniform_M, np.arange(0, 4_001, 200))

    assert fit.power <= 0.02
    assert fit.losses_N.mean() < mixture_losses(p_MN, uniform_M).mean() + 0.01
