import numpy as np
import pytest

from chorus.population.errors import ChorusError
from chorus.prior.shift import WeightedTier, evaluate_shift
from chorus.prior.weights import fit_weights, mixture_losses
from tests.prior.matrices import some_likelihoods

OFFSETS = np.arange(0, 2_001, 50)


def two_kinds_of_text():
    """Members 0 to 2 are good at the first kind, 3 to 5 at the second."""
    home, away = some_likelihoods(6, 2_000, seed=0), some_likelihoods(6, 2_000, seed=1)
    home[3:] *= 0.3
    away[:3] *= 0.3
    return home, away


def fitted(p_MN, members):
    return tuple(float(w) for w in fit_weights(p_MN[list(members)]).weights_M)


def test_shows_what_fitting_again_would_gain_on_other_text():
    home, away = two_kinds_of_text()
    tiers = [WeightedTier(name="standard", members=(0, 1), weights=fitted(home, (0, 1)))]

    at_home, elsewhere = (evaluate_shift(p, OFFSETS, tiers)[0] for p in (home, away))

    assert elsewhere.loss.nats > at_home.loss.nats + 0.5
    assert elsewhere.new_members.high < -0.5  # it takes the members that are good there
    assert elsewhere.to_best_single.low > 0.5
    assert abs(at_home.new_weights.nats) < 0.01


def test_weights_fitted_elsewhere_are_found_again():
    home, away = two_kinds_of_text()
    everyone = tuple(range(6))

    shift = evaluate_shift(away, OFFSETS, [WeightedTier(name="max", members=everyone, weights=fitted(home, everyone))])[
        0
    ]

    assert shift.new_weights.high < 0
    optimum = fit_weights(away).loss
    assert (
        optimum - 1e-6 <= shift.loss.nats + shift.new_weights.nats < optimum + 0.02
    )  # counted on text it was not fitted on


def test_the_loss_is_that_of_the_weights_given():
    home, _ = two_kinds_of_text()
    weights = (0.2, 0.5, 0.3)

    shift = evaluate_shift(home, OFFSETS, [WeightedTier(name="x", members=(4, 0, 2), weights=weights)])[0]

    assert shift.loss.nats == pytest.approx(mixture_losses(home[[4, 0, 2]], np.array(weights)).mean())


def test_refuses_a_single_document():
    home, _ = two_kinds_of_text()

    with pytest.raises(ChorusError, match="at least 2"):
        evaluate_shift(home, np.array([0, 0, 2_000]), [WeightedTier(name="x", members=(0,), weights=(1.0,))])
