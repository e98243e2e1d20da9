"""Fits pools that need whole distributions: log pools and temperatures, with the exact normaliser over the vocabulary.

    log pool:     log p ~ sum_m x_m log p_m,         x >= 0        weights w = x / sum(x), temperature T = 1 / sum(x)
    linear pool:  log p ~ b log sum_m w_m p_m,       b >= 0        temperature T = 1 / b; the weights w stay those fitted at T = 1

Both minimise the mean over tokens of A(x) - x . f(target). The features f of a vocabulary entry are the members' log-probabilities,
or that of the linear mixture alone; A(x) = log sum_v exp(x . f(v)). This is convex in x, so in weights and temperature together.
The gradient is the features' mean under the pool minus their value at the target; the Hessian is their covariance. A temperature
for each member of a log pool would add nothing: it only rescales x_m.

Distributions are streamed: each pass over the text serves all sets, pools and folds, and only one block of tokens is held.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chorus.population.manifest import Pool
from chorus.prior.quadratic import FloatArray, minimise_quadratic

# K members of a set, F features, B tokens of a block, V vocabulary, N tokens of a split
DEFAULT_GAP = 1e-5
MAX_SHARPNESS = 8.0  # bound on sum(x) = 1 / T: temperatures are at least 1/8
_MIN_SHARPNESS = 1e-3
_MAX_PASSES = 20
_ROUNDING = 1e-7  # nats; error of a loss summed in float32
_MIN_LOG_P = -1e4  # stands for log(0): a weight of 0 times -inf would be NaN
FITNESS, SELECTION, TEST = range(3)


@dataclass(frozen=True, kw_only=True)
class Block:
    """The members' distributions for a batch of tokens."""

    positions_B: NDArray[np.int64]
    """Indices of the tokens among the scored tokens of their split."""
    targets_B: Tensor
    """Vocabulary index of the true token."""
    log_p_KBV: Tensor
    """Normalised log-probabilities of the requested members, in the order of the request."""


class Source(Protocol):
    """Streams distributions over the splits of a text; `part` is FITNESS, SELECTION or TEST."""

    def blocks(self, part: int, members: tuple[int, ...]) -> Iterator[Block]:
        """All scored tokens of a split, once each."""
        ...

    def num_tokens(self, part: int) -> int:
        """Number of scored tokens in a split."""
        ...


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """A pool of a set of members, as in a tier of the manifest."""

    members: tuple[int, ...]
    weights: tuple[float, ...]
    pool: Pool
    temperature: float


@dataclass(frozen=True, kw_only=True)
class LinearSet:
    """A set of members with the weights of its linear pool at temperature 1, fitted on each split and on both."""

    members: tuple[int, ...]
    weights_on: tuple[FloatArray, FloatArray, FloatArray] = field(repr=False)
    """Fitted on fitness, on selection, and on both."""


@dataclass(frozen=True, kw_only=True)
class PoolFit:
    """A pool of a set, fitted on fitness and selection together."""

    pooled: Pooled
    held_out_loss: float
    """Fitted on one split and evaluated on the other, both ways; nats per token."""
    gap: float
    """Upper bound on the excess over the optimum on the fitted text, nats per token."""


def fit_pools(
    source: Source, sets: Sequence[LinearSet], *, pools: Sequence[Pool] = ("linear", "log"), gap: float = DEFAULT_GAP
) -> list[list[PoolFit]]:
    """Fit each of `pools` with its temperature, for every set. A single member is fitted once, since its two pools are the same.

    Every problem takes Newton steps with x >= 0, shortened if they do not lower the loss, until its certificate (see
    `Problem.step`) is at most `gap`. Each round of steps is one pass over the fitness and selection splits.
    """
    trials = [
        _Trial(linear_set, pool)
        for linear_set in sets
        for pool in pools
        if len(linear_set.members) > 1 or pool == pools[0]
    ]
    members = tuple(sorted({member for trial in trials for member in trial.members}))
    for _ in range(_MAX_PASSES):
        if all(problem.gap <= gap or problem.is_stalled for trial in trials for problem in trial.problems):
            break
        for part in (FITNESS, SELECTION):
            for block in source.blocks(part, members):
                for trial in trials:
                    trial.add(part, block, members, gap)
        for trial in trials:
            for problem in trial.problems:
                problem.step(gap)
    for trial in trials:
        for problem in trial.problems:
            problem.finish()
    for part in (FITNESS, SELECTION):
        for block in source.blocks(part, members):
            for trial in trials:
                trial.add_held_out(part, block, members)
    num_tokens = source.num_tokens(FITNESS) + source.num_tokens(SELECTION)
    return [[trial.result(num_tokens) for trial in trials if trial.linear_set is s] for s in sets]


def pooled_losses(source: Source, part: int, mixtures: Sequence[Pooled]) -> list[FloatArray]:
    """-log p of every token of a split (N) under each mixture, in nats."""
    members = tuple(sorted({member for mixture in mixtures for member in mixture.members}))
    losses = [np.full(source.num_tokens(part), np.nan) for _ in mixtures]
    for block in source.blocks(part, members):
        for losses_N, mixture in zip(losses, mixtures, strict=True):
            log_p_KBV = block.log_p_KBV[[members.index(member) for member in mixture.members]]
            log_p_BV = log_pool(log_p_KBV, mixture.weights, mixture.pool, mixture.temperature)
            chosen_B = log_p_BV.gather(1, block.targets_B[:, None])[:, 0]
            losses_N[block.positions_B] = -chosen_B.double().cpu().numpy()
    return losses


def log_pool(log_p_KBV: Tensor, weights: Sequence[float], pool: Pool, temperature: float) -> Tensor:
    """Log-probabilities (B, V) of a mixture: the definition of a tier's distribution."""
    log_p_KBV = log_p_KBV.clamp(min=_MIN_LOG_P)
    weights_K11 = log_p_KBV.new_tensor(weights)[:, None, None]
    pooled_BV = _linear(log_p_KBV, weights_K11) if pool == "linear" else (weights_K11 * log_p_KBV).sum(0)
    return torch.log_softmax(pooled_BV / temperature, dim=-1)


def _linear(log_p_KBV: Tensor, weights_K11: Tensor) -> Tensor:
    return torch.logsumexp(log_p_KBV + weights_K11.log(), dim=0).clamp(min=_MIN_LOG_P)


class Problem:
    """One convex problem with F unknowns: `add` the tokens of a pass at `x_F`, then `step` to the next `x_F`."""

    def __init__(self, start_F: FloatArray) -> None:
        self.x_F = start_F.copy()
        self.gap = np.inf
        self.is_stalled = False
        self._best_F = start_F.copy()
        self._best_loss = np.inf
        self._direction_F = np.zeros_like(start_F)
        self._step_size = 1.0
        self._clear()

    def add(self, features_FBV: Tensor, target_FB: Tensor) -> None:
        """Add the loss, gradient and Hessian of some tokens at `x_F`."""
        log_z_B, p_BV = self._pool(features_FBV)
        x_F1 = features_FBV.new_tensor(self.x_F)[:, None]
        mean_FB = torch.einsum("bv,fbv->fb", p_BV, features_FBV)
        rooted_FE = (features_FBV * p_BV.sqrt()).flatten(1)
        second_FF = rooted_FE @ rooted_FE.T - mean_FB @ mean_FB.T
        self._loss += float((log_z_B - (x_F1 * target_FB).sum(0)).double().sum())
        self._gradient_F += (mean_FB - target_FB).double().sum(1).cpu().numpy()
        self._hessian_FF += second_FF.double().cpu().numpy()
        self._num_tokens += target_FB.shape[1]

    def loss_of(self, features_FBV: Tensor, target_FB: Tensor) -> float:
        """Summed loss of some tokens at `x_F`."""
        x_F1 = features_FBV.new_tensor(self.x_F)[:, None]
        return float((self._pool(features_FBV)[0] - (x_F1 * target_FB).sum(0)).double().sum())

    def step(self, gap: float) -> None:
        """Accept or reject the point evaluated in this pass, and choose the next.

        Uses the Frank-Wolfe certificate: for a convex loss L over {x >= 0, sum(x) <= S}, L(x) - min L is at most
        grad . x - min(0, S min_f grad_f).
        """
        if self.gap <= gap or self.is_stalled or not self._num_tokens:
            return
        loss, gradient_F = self._loss / self._num_tokens, self._gradient_F / self._num_tokens
        hessian_FF = self._hessian_FF / self._num_tokens
        self._clear()
        if loss > self._best_loss + _ROUNDING:
            self._step_size /= 4
            self.is_stalled = self._step_size < 1e-3
            self.x_F = self._best_F if self.is_stalled else self._best_F + self._step_size * self._direction_F
            return
        certificate = float(gradient_F @ self.x_F - min(0.0, MAX_SHARPNESS * float(gradient_F.min())))
        if loss > self._best_loss - _ROUNDING and certificate >= self.gap:
            self.is_stalled, self.x_F = True, self._best_F
            return
        self._best_loss, self._best_F, self.gap = loss, self.x_F.copy(), certificate
        if self.gap <= gap:
            return
        hessian_FF[np.diag_indices_from(hessian_FF)] += 1e-9 * float(np.trace(hessian_FF)) / len(hessian_FF) + 1e-12
        target_F = minimise_quadratic(hessian_FF, hessian_FF @ self.x_F - gradient_F, self.x_F)
        target_F *= min(1.0, MAX_SHARPNESS / max(float(target_F.sum()), MAX_SHARPNESS))
        self._direction_F, self._step_size = target_F - self.x_F, 1.0
        self.x_F = target_F

    def finish(self) -> None:
        """Return to the best point evaluated, in case the passes ended before convergence."""
        self.x_F = self._best_F

    def _pool(self, features_FBV: Tensor) -> tuple[Tensor, Tensor]:
        score_BV = torch.einsum("f,fbv->bv", features_FBV.new_tensor(self.x_F), features_FBV)
        log_z_B = torch.logsumexp(score_BV, dim=-1)
        return log_z_B, (score_BV - log_z_B[:, None]).exp_()

    def _clear(self) -> None:
        size = len(self.x_F)
        self._loss, self._num_tokens = 0.0, 0
        self._gradient_F, self._hessian_FF = np.zeros(size), np.zeros((size, size))


class _Trial:
    """One pool of one set: a problem on each of the two splits, and one on both."""

    def __init__(self, linear_set: LinearSet, pool: Pool) -> None:
        self.linear_set = linear_set
        self.members = linear_set.members
        self._pool = pool
        self._held_out_loss = 0.0
        starts = (
            [np.ones(1)] * 3 if pool == "linear" else [np.asarray(w, dtype=np.float64) for w in linear_set.weights_on]
        )
        self.problems = [Problem(start_F) for start_F in starts]

    def add(self, part: int, block: Block, members: tuple[int, ...], gap: float) -> None:
        """Add a block to the unfinished problems that are fitted on its split."""
        for idx in (part, 2):
            problem = self.problems[idx]
            if problem.gap > gap and not problem.is_stalled:
                problem.add(*self._features(idx, block, members))

    def add_held_out(self, part: int, block: Block, members: tuple[int, ...]) -> None:
        """Add the loss of a block under the pool fitted on the other split."""
        other = SELECTION if part == FITNESS else FITNESS
        self._held_out_loss += self.problems[other].loss_of(*self._features(other, block, members))

    def result(self, num_tokens: int) -> PoolFit:
        """The pool fitted on both splits. If x is 0 (a uniform distribution), it keeps its weights at a high temperature."""
        x_F = self.problems[2].x_F
        sharpness = max(float(x_F.sum()), _MIN_SHARPNESS)
        weights_K = self.linear_set.weights_on[2]
        if self._pool == "log" and x_F.sum() > 0:
            weights_K = x_F / x_F.sum()
        pooled = Pooled(
            members=self.members,
            weights=tuple(float(w) for w in weights_K),
            pool=self._pool,
            temperature=1 / sharpness,
        )
        return PoolFit(pooled=pooled, held_out_loss=self._held_out_loss / num_tokens, gap=self.problems[2].gap)

    def _features(self, idx: int, block: Block, members: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        rows = [members.index(member) for member in self.members]
        log_p_KBV = block.log_p_KBV[rows].clamp(min=_MIN_LOG_P)
        if self._pool == "linear":
            weights_K11 = log_p_KBV.new_tensor(self.linear_set.weights_on[idx])[:, None, None]
            log_p_KBV = _linear(log_p_KBV, weights_K11)[None]
        targets = block.targets_B[None, :, None].expand(len(log_p_KBV), -1, 1)
        return log_p_KBV, log_p_KBV.gather(2, targets)[..., 0]
