import itertools

import numpy as np
import pytest

from chorus.population.errors import ChorusError
from chorus.prior.shrinkage import choose_shrinkage, document_folds
from chorus.prior.weights import fit_weights, mixture_losses
from tests.prior.matrices import some_likelihoods


def test_little_text_is_shrunk_and_much_text_is_not():
    """Exchangeable members: uniform weights are right, and whatever text says to the contrary is an accident."""
    generator = np.random.default_rng(0)
    p_MN = np.exp(-generator.gamma(2.0, 1.0, size=(12, 40_000)))
    little = choose_shrinkage(p_MN[:, :400], np.arange(0, 401, 20))

    assert little.pseudo_tokens > 100
    fresh = p_MN[:, 20_000:]
    plain, shrunk = (
        mixture_losses(fresh, fit_weights(p_MN[:, :400], pseudo_tokens=c).weights_M).mean()
        for c in (0.0, little.pseudo_tokens)
    )
    assert shrunk < plain - 0.002


def test_a_clear_favourite_is_not_shrunk_away():
    p_MN = some_likelihoods(6, 6_000, noise=0.5)
    p_MN[1:] *= 0.2

    found = choose_shrinkage(p_MN, np.arange(0, 6_001, 100))

    assert found.pseudo_tokens <= 30
    assert found.losses[1e5] > found.losses[0.0] + 0.1


def test_each_loss_is_that_of_weights_fitted_on_the_other_documents():
    p_MN, offsets = some_likelihoods(4, 300), np.array([0, 120, 130, 300])
    by_hand = []
    for start, stop in ((0, 120), (120, 130), (130, 300)):
        inside = (np.arange(300) < start) | (np.arange(300) >= stop)
        weights_M = fit_weights(p_MN[:, inside], pseudo_tokens=100 * inside.mean()).weights_M
        by_hand.append(mixture_losses(p_MN[:, start:stop], weights_M))

    found = choose_shrinkage(p_MN, offsets, strengths=(0.0, 100.0), num_folds=9)

    assert found.losses[100.0] == pytest.approx(np.concatenate(by_hand).mean(), abs=1e-6)


def test_folds_hold_whole_documents_of_like_total_length():
    offsets = np.array([0, 50, 60, 60, 100, 190, 200, 300])

    fold_N = document_folds(offsets, 3)

    for start, stop in itertools.pairwise(offsets):
        assert len(set(fold_N[start:stop])) <= 1
    assert np.bincount(fold_N).tolist() == [100, 100, 100]


def test_refuses_one_document():
    with pytest.raises(ChorusError, match="fewer than two"):
        choose_shrinkage(some_likelihoods(2, 10), np.array([0, 10]))
