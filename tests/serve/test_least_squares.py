"""Learning as it goes: against a solver that sees everything at once."""

import numpy as np
import pytest
from scipy.optimize import nnls

from chorus.serve.least_squares import LeastSquares


@pytest.mark.parametrize("seed", range(5))
def test_weights_are_those_of_a_solver_that_sees_every_observation(seed: int) -> None:
    draw = np.random.default_rng(seed)
    true_F = np.array([0.0, 2.0, 0.0, 0.5]) if seed % 2 else np.array([1.0, 0.3, 2.0, 0.0])
    features_NF = draw.uniform(0, 3, size=(400, 4))
    targets_N = features_NF @ true_F + draw.normal(0, 0.3, size=400)
    model = LeastSquares((1.0, 2.0, 0.5, 1.0), forgetting=0.99)
    for features, target in zip(features_NF.tolist(), targets_N.tolist(), strict=True):
        model.observe(tuple(features), target)
    decay_N = 0.99 ** (np.arange(400)[::-1] / 2)
    expected_F, _ = nnls(features_NF * decay_N[:, None], targets_N * decay_N)
    asked = (1.0, 2.0, 0.5, 1.5)
    assert model.predict(asked) == pytest.approx(np.array(asked) @ expected_F, rel=2e-3)
    assert min(model.weights) >= 0


@pytest.mark.parametrize("seed", range(20))
def test_each_step_is_the_exact_minimum_also_where_features_never_vary(seed: int) -> None:
    draw = np.random.default_rng(seed)
    num, ridge = int(draw.integers(1, 5)), 1e-4
    scales_F = draw.choice([0.5, 1.0, 16.0], size=num)
    model = LeastSquares(tuple(scales_F), forgetting=0.9)
    gram_FF, moment_F = np.zeros((num, num)), np.zeros(num)
    true_F, features_F = draw.normal(0, 1, size=num), draw.uniform(0, 3, size=num)
    for _ in range(7):  # fewer than it takes until targets are clipped
        if seed % 2:
            features_F = draw.uniform(0, 3, size=num)
        target = float(features_F @ true_F)
        gram_FF = 0.9 * gram_FF + np.outer(features_F, features_F)
        moment_F = 0.9 * moment_F + target * features_F
        root_FF = np.linalg.cholesky(gram_FF + ridge * np.eye(num)).T
        target_F = np.linalg.solve(root_FF.T, moment_F + ridge * np.array(model.weights))
        model.observe(tuple(features_F * scales_F), target)
        expected_F, _ = nnls(root_FF, target_F)
        assert model.weights == pytest.approx(expected_F, rel=1e-6, abs=1e-9)


def test_a_state_of_another_form_changes_nothing() -> None:
    model = LeastSquares((1.0, 4.0), forgetting=0.95)
    model.observe((1.0, 2.0), 0.1)
    before = model.state()
    for broken in ({"gram": [[1.0, 2.0]]}, {"weights": [1.0]}, {"moment": ["a", "b"]}, {"miss": None}):
        with pytest.raises((TypeError, ValueError)):
            model.restore({**before, "count": 9, **broken})
        assert model.state() == before
    model.observe((1.0, 2.0), 0.1)


def test_what_was_learned_goes_to_another_model() -> None:
    first, second = LeastSquares((1.0, 4.0), forgetting=0.95), LeastSquares((1.0, 4.0), forgetting=0.95)
    for idx in range(20):
        first.observe((1.0, float(idx % 5)), 0.1 + 0.02 * (idx % 5))
    second.restore(first.state())
    for model in (first, second):
        model.observe((1.0, 9.0), 0.3)
    assert second.predict((1.0, 3.0)) == first.predict((1.0, 3.0)) == pytest.approx(0.16, rel=0.05)
