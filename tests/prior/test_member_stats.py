import numpy as np

from chorus.prior.bootstrap import Bootstrap
from chorus.prior.member_stats import compute_member_stats, loss_correlation
from chorus.prior.weights import mixture_losses
from tests.prior.matrices import some_likelihoods


def test_correlation_is_that_of_losses_and_sees_near_duplicates():
    p_MN = some_likelihoods(5, 10_000, duplicates=1)

    correlation_MM = loss_correlation(p_MN)

    np.testing.assert_allclose(correlation_MM, np.corrcoef(-np.log(p_MN.astype(np.float64))), atol=1e-9)
    assert correlation_MM[0, 4] > 0.99 > correlation_MM[0, 1]


def test_documents_go_to_the_member_that_is_best_on_them():
    p_MN = np.full((3, 60), 0.2, dtype=np.float32)
    p_MN[0, :20] = 0.5
    p_MN[1, 20:50] = 0.3
    p_MN[1, 50:] = 0.25
    offsets = np.arange(0, 61, 10)
    even_N = mixture_losses(p_MN, np.full(3, 1 / 3))

    stats = compute_member_stats(p_MN, Bootstrap(offsets), [even_N])

    assert stats.documents_won_M.tolist() == [2, 4, 0]
    assert stats.tier_wins == (4,)  # better than member 0, best overall, wherever that one is not alone ahead
    assert stats.num_documents == 6
