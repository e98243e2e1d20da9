import numpy as np
import pytest

from chorus.population.errors import ChorusError
from chorus.prior.bootstrap import Bootstrap


def test_the_estimate_is_the_mean_over_tokens_and_lies_in_its_interval():
    losses_N = np.random.default_rng(0).gamma(2, 1, size=1_000)
    offsets = np.array([0, 10, 400, 700, 1_000])

    interval = Bootstrap(offsets).loss(losses_N)

    assert interval.nats == pytest.approx(losses_N.mean())
    assert interval.low < interval.nats < interval.high


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    covered, paired = 0, 0
    for trial in range(300):
        lengths = generator.integers(20, 200, size=40)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        document_N = np.repeat(generator.normal(0, 0.5, size=40), lengths)  # what the tokens of a document share
        losses_N = 3 + document_N + generator.normal(0, 1, size=offsets[-1])
        bootstrap = Bootstrap(offsets, num_draws=500, seed=trial)
        interval = bootstrap.loss(losses_N)
        covered += interval.low <= 3 <= interval.high
        other_N = losses_N - 0.02 + generator.normal(0, 0.1, size=offsets[-1])
        paired += bootstrap.difference(losses_N, other_N).excludes_zero

    assert 0.90 <= covered / 300 <= 0.98
    assert paired / 300 > 0.95  # 0.02 nats are seen through noise of 0.5 per document, because draws are paired


def test_ignoring_documents_would_cover_far_too_rarely():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        document_N = np.repeat(generator.normal(0, 0.5, size=20), 40)
        losses_N = 3 + document_N + generator.normal(0, 1, size=800)
        interval = Bootstrap(np.arange(801), num_draws=200, seed=trial).loss(losses_N)
        covered += interval.low <= 3 <= interval.high

    assert covered / 100 < 0.6


def test_equal_methods_differ_by_exactly_nothing():
    losses_N = np.random.default_rng(0).gamma(2, 1, size=300)

    difference = Bootstrap(np.array([0, 100, 300])).difference(losses_N, losses_N)

    assert (difference.nats, difference.low, difference.high) == (0, 0, 0)
    assert not difference.excludes_zero


def test_documents_without_scored_tokens_play_no_part():
    losses_N = np.random.default_rng(0).gamma(2, 1, size=300)
    plain, padded = Bootstrap(np.array([0, 100, 300])), Bootstrap(np.array([0, 0, 100, 100, 300, 300]))

    assert padded.loss(losses_N) == plain.loss(losses_N)
    np.testing.assert_allclose(padded.by_document(losses_N), [losses_N[:100].mean(), losses_N[100:].mean()])


def test_the_same_seed_gives_the_same_interval():
    losses_N = np.random.default_rng(0).gamma(2, 1, size=300)
    offsets = np.arange(0, 301, 10)

    assert Bootstrap(offsets).loss(losses_N) == Bootstrap(offsets).loss(losses_N)
    assert Bootstrap(offsets, seed=1).loss(losses_N) != Bootstrap(offsets).loss(losses_N)


@pytest.mark.parametrize("offsets", [[0, 5], [0, 0, 5, 5], [0, 0]])
def test_refuses_fewer_than_two_documents(offsets):
    with pytest.raises(ChorusError, match="at least 2"):
        Bootstrap(np.array(offsets))
