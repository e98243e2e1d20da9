import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from chorus.prior.pools import FITNESS, SELECTION, TEST, Block, LinearSet, Pooled, fit_pools, log_pool, pooled_losses
from chorus.prior.weights import fit_weights

MEMBERS, VOCABULARY = 4, 13
LENGTHS = (150, 110, 90)


class Arrays:
    """Distributions in memory, given out in uneven blocks."""

    def __init__(self, seed=0, *, dtype=torch.float64, sharpness=1.0):
        generator = np.random.default_rng(seed)
        total = sum(LENGTHS)
        shared = generator.normal(size=(total, VOCABULARY))
        logits = shared + generator.normal(0, 0.9, size=(MEMBERS, total, VOCABULARY))
        self.log_p = torch.log_softmax(torch.tensor(logits * sharpness, dtype=dtype), -1)
        truth = torch.softmax(torch.tensor(shared * 1.5), -1).numpy()
        self.targets = torch.tensor([generator.choice(VOCABULARY, p=row) for row in truth])
        self.asked = 0

    def num_tokens(self, part):
        return LENGTHS[part]

    def span(self, part):
        return slice(sum(LENGTHS[:part]), sum(LENGTHS[: part + 1]))

    def blocks(self, part, members):
        self.asked += part == FITNESS
        log_p, targets = self.log_p[:, self.span(part)], self.targets[self.span(part)]
        for positions in np.split(np.random.default_rng(1).permutation(LENGTHS[part]), [7, 60]):
            chosen = torch.tensor(positions)
            yield Block(
                positions_B=positions,
                targets_B=targets[chosen],
                log_p_KBV=log_p[list(members)][:, chosen],
            )

    def likelihoods(self, members, *parts):
        spans = np.concatenate([np.arange(sum(LENGTHS))[self.span(part)] for part in parts])
        log_p = self.log_p[list(members)][:, spans]
        return log_p.gather(2, self.targets[spans][None, :, None].expand(len(members), -1, 1))[..., 0].exp().numpy()

    def linear_set(self, members):
        parts = ((FITNESS,), (SELECTION,), (FITNESS, SELECTION))
        weights = tuple(fit_weights(self.likelihoods(members, *part).astype(np.float64)).weights_M for part in parts)
        return LinearSet(members=members, weights_on=weights)


def slow_losses(source, part, mixture):
    """Token by token, entry by entry, in float64."""
    losses = []
    span = source.span(part)
    for n in range(span.start, span.stop):
        p_KV = np.exp(source.log_p[list(mixture.members), n].double().numpy())
        if mixture.pool == "linear":
            pooled_V = sum(w * p_V for w, p_V in zip(mixture.weights, p_KV, strict=True))
        else:
            pooled_V = np.prod([p_V**w for w, p_V in zip(mixture.weights, p_KV, strict=True)], axis=0)
        sharp_V = pooled_V ** (1 / mixture.temperature)
        losses.append(-np.log(sharp_V[source.targets[n]] / sharp_V.sum()))
    return np.array(losses)


def best_by_scipy(source, parts, features_of):
    """Sequential least squares over x >= 0 on the slow objective."""
    spans = np.concatenate([np.arange(sum(LENGTHS))[source.span(part)] for part in parts])
    features_FNV = features_of(source.log_p[:, spans].numpy())
    targets_N = source.targets[spans].numpy()

    def loss(x):
        scores_NV = np.einsum("f,fnv->nv", x, features_FNV)
        log_z = np.logaddexp.reduce(scores_NV, axis=1)
        return (log_z - scores_NV[np.arange(len(targets_N)), targets_N]).mean()

    start = np.ones(len(features_FNV)) / len(features_FNV)
    found = minimize(
        loss, start, bounds=[(0, 8)] * len(start), method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}
    )
    return found.fun, found.x


@pytest.mark.parametrize("pool", ["linear", "log"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_losses_are_those_of_the_slow_reference(pool, temperature):
    source = Arrays()
    mixture = Pooled(members=(2, 0, 3), weights=(0.5, 0.2, 0.3), pool=pool, temperature=temperature)

    (found_N,) = pooled_losses(source, TEST, [mixture])

    np.testing.assert_allclose(found_N, slow_losses(source, TEST, mixture), rtol=1e-9)


@pytest.mark.parametrize(("seed", "sharpness"), [(0, 1.0), (1, 3.0), (2, 0.3)])
def test_the_log_pool_reaches_the_optimum_of_a_general_solver(seed, sharpness):
    source, members = Arrays(seed, sharpness=sharpness), (0, 1, 3)

    ((fit,),) = fit_pools(source, [source.linear_set(members)], pools=("log",), gap=1e-8)

    best, x = best_by_scipy(source, (FITNESS, SELECTION), lambda log_p: log_p[list(members)])
    slow = np.concatenate([slow_losses(source, part, fit.pooled) for part in (FITNESS, SELECTION)]).mean()
    assert slow == pytest.approx(best, abs=1e-7)
    assert fit.gap <= 1e-8
    assert fit.pooled.temperature == pytest.approx(1 / x.sum(), rel=1e-2)
    assert sum(fit.pooled.weights) == pytest.approx(1)
    assert min(fit.pooled.weights) >= 0


def test_the_temperature_of_a_linear_pool_is_the_best_for_its_weights():
    source, members = Arrays(3, sharpness=2.0), (0, 2)
    linear_set = source.linear_set(members)

    ((fit,),) = fit_pools(source, [linear_set], pools=("linear",), gap=1e-9)

    weights = linear_set.weights_on[2]
    best, x = best_by_scipy(
        source,
        (FITNESS, SELECTION),
        lambda log_p: np.log(np.tensordot(weights, np.exp(log_p[list(members)]), axes=1))[None],
    )
    slow = np.concatenate([slow_losses(source, part, fit.pooled) for part in (FITNESS, SELECTION)]).mean()
    assert slow == pytest.approx(best, abs=1e-8)
    assert fit.pooled.temperature == pytest.approx(1 / x[0], rel=1e-4)
    assert fit.pooled.temperature > 1.2  # the members were made too sure of themselves
    assert fit.pooled.weights == pytest.approx(weights)


def test_held_out_losses_are_fitted_on_one_part_and_counted_on_the_other():
    source, members = Arrays(4), (1, 2)

    ((_, fit),) = fit_pools(source, [source.linear_set(members)], gap=1e-9)

    total = 0.0
    for fitted, counted in ((FITNESS, SELECTION), (SELECTION, FITNESS)):
        _, x = best_by_scipy(source, (fitted,), lambda log_p: log_p[list(members)])
        mixture = Pooled(members=members, weights=tuple(x / x.sum()), pool="log", temperature=1 / x.sum())
        total += slow_losses(source, counted, mixture).sum()
    assert fit.held_out_loss == pytest.approx(total / sum(LENGTHS[:2]), abs=1e-6)


def test_the_certificate_bounds_the_excess_after_every_pass(monkeypatch):
    source, members = Arrays(5, sharpness=3.0), (0, 1, 2, 3)
    best, _ = best_by_scipy(source, (FITNESS, SELECTION), lambda log_p: log_p[list(members)])
    excesses = []
    for passes in (1, 2, 3, 5):
        monkeypatch.setattr("chorus.prior.pools._MAX_PASSES", passes)
        ((fit,),) = fit_pools(source, [source.linear_set(members)], pools=("log",), gap=1e-9)
        slow = np.concatenate([slow_losses(source, part, fit.pooled) for part in (FITNESS, SELECTION)]).mean()
        assert -1e-8 <= slow - best <= fit.gap + 1e-8
        excesses.append(slow - best)
    assert excesses[0] > 1e-3  # the start is no optimum
    assert excesses == sorted(excesses, reverse=True)


def test_few_passes_serve_all_sets_pools_and_folds():
    source = Arrays(6, dtype=torch.float32)
    sets = [source.linear_set(members) for members in ((0,), (0, 2), (0, 1, 2, 3))]

    found = fit_pools(source, sets)

    assert [[fit.pooled.pool for fit in fits] for fits in found] == [["linear"], ["linear", "log"], ["linear", "log"]]
    assert source.asked <= 9
    assert all(fit.gap <= 1e-5 for fits in found for fit in fits)


def test_a_member_that_gives_zero_somewhere_yields_no_nan():
    source = Arrays(7)
    source.log_p[1, :, 3:] = -torch.inf  # even for most true tokens

    ((linear, log),) = fit_pools(source, [source.linear_set((0, 1))])

    for fit in (linear, log):
        assert np.isfinite(fit.held_out_loss)
        assert np.isfinite(pooled_losses(source, TEST, [fit.pooled])[0]).all()
    assert log.pooled.weights[1] < 1e-3
    assert torch.isfinite(log_pool(source.log_p[:2, :5], (0.5, 0.5), "linear", 1.0)).all()


def test_useless_members_are_flattened():
    """Distributions that say nothing about the text: the best the pool can do is to say little."""
    source = Arrays(8, sharpness=4.0)
    source.targets = torch.tensor(np.random.default_rng(0).integers(VOCABULARY, size=sum(LENGTHS)))

    ((linear, log),) = fit_pools(source, [source.linear_set((0, 1))])

    for fit in (linear, log):
        assert fit.pooled.temperature > 10
        (losses_N,) = pooled_losses(source, TEST, [fit.pooled])
        assert losses_N.mean() == pytest.approx(np.log(VOCABULARY), abs=0.05)
