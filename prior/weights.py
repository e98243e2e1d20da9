"""Fits the weights of a mixture: a convex problem on the simplex, solved until a certificate bounds the excess loss.

    minimise  L(w) = -mean_n log q_n,   q_n = sum_m w_m P[m, n],   w >= 0, sum_m w_m = 1

P[m, n] is the probability that member m gave to the true token n. L is convex, and at any w inside the simplex

    gap(w) = max_m mean_n P[m, n] / q_n - 1  >=  L(w) - min L

(Jensen: L(w) - L(v) <= log sum_m v_m mean_n P[m, n] / q_n <= log(1 + gap) for every v). The solver stops when the gap is small
enough, not after a number of steps.

Method: sequential quadratic programming on a working set, as in mixsqp (Kim, Carbonetto, Stephens and Anitescu, A fast algorithm
for maximum likelihood estimation of mixture proportions using sequential quadratic programming, arXiv 1806.01412). EM steps
(w_m <- w_m mean_n P[m, n] / q_n, which never raise L) get close; Newton steps with w >= 0 converge. EM alone needs thousands of
passes if members are nearly alike.

Arrays in, weights out. P may be float32 and memory-mapped: it is read in blocks of columns that fit the processor's cache, and
sums are float64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chorus.population.errors import ChorusError
from chorus.prior.quadratic import FloatArray, minimise_quadratic

# M members, N tokens, A members of the working set
Probabilities = NDArray[np.float32] | NDArray[np.float64]

DEFAULT_GAP = 1e-7
_BLOCK_ELEMENTS = 1 << 18  # 2 MB in float64: stays in cache between the conversion and the products
# OpenBLAS runs matrix products with more multiplications than this on several threads. On a busy machine these wait for each
# other: 50 ms instead of 0.4 (measured, 2 cores). So small products are kept below it.
_ONE_THREAD_PRODUCT = 1 << 18
_EM_STEPS = 4  # over all members, to choose the initial working set
_WORKING_SET = 48  # most members that the working set starts with, or gains in a step
_MAX_STEPS = 1_000


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Weights with a certificate of optimality."""

    weights_M: FloatArray
    """On the simplex."""
    loss: float
    """-mean_n log q_n at these weights, nats per token; infinite if some token has probability 0 under all members."""
    gap: float
    """Upper bound on the excess over the optimal loss, nats per token."""
    num_steps: int


def fit_weights(
    probabilities_MN: Probabilities,
    *,
    gap: float = DEFAULT_GAP,
    start_M: FloatArray | None = None,
    pseudo_tokens: float = 0.0,
    max_steps: int = _MAX_STEPS,
) -> Fit:
    """Weights that minimise the mixture's loss on these tokens, within `gap` nats of the optimum.

    Args:
        probabilities_MN: non-negative; every column has an entry above zero. Never written to, never copied as a whole.
        gap: stop at a certificate of at most this, nats per token.
        start_M: weights to start from, not necessarily normalised. The optimum does not depend on them.
        pseudo_tokens: strength of a Dirichlet prior centred on uniform weights. It acts like this many additional tokens, equally
            many per member, to which that member gives probability 1 and all others 0. `loss` is the loss on the data alone; `gap`
            bounds the excess of the penalised objective.
        max_steps: most steps to take; afterwards, `gap` is the certificate reached.

    Raises:
        ChorusError: the matrix is empty, or has NaN, infinite or negative entries, or a column of zeros.
    """
    check_probabilities(probabilities_MN)
    return solve(probabilities_MN, gap=gap, start_M=start_M, pseudo_tokens=pseudo_tokens, max_steps=max_steps)


def mixture_losses(probabilities_MN: Probabilities, weights_M: FloatArray) -> FloatArray:
    """-log sum_m w_m P[m, n] of every token, nats; infinite where the mixture has probability 0."""
    support = np.flatnonzero(weights_M)
    losses_N = np.empty(probabilities_MN.shape[1])
    for start, stop in _ranges(len(support), probabilities_MN.shape[1]):
        mixed = weights_M[support] @ probabilities_MN[support, start:stop].astype(np.float64)
        with np.errstate(divide="ignore"):
            losses_N[start:stop] = -np.log(mixed)
    return losses_N


def check_probabilities(probabilities_MN: Probabilities) -> None:
    """Raise ChorusError for a matrix that no mixture can be fitted to; see `fit_weights`."""
    if probabilities_MN.ndim != 2 or 0 in probabilities_MN.shape:
        raise ChorusError(
            f"likelihoods of shape {probabilities_MN.shape} cannot be fitted: at least one member and one token are needed."
        )
    for start, stop in _ranges(*probabilities_MN.shape):
        block = probabilities_MN[:, start:stop]
        low, largest = float(block.min()), block.max(axis=0)
        if not (low >= 0 and np.isfinite(largest).all()):  # a NaN fails both
            raise ChorusError(
                f"likelihoods of tokens {start} to {stop - 1} contain negative, infinite or undefined values; expected "
                "probabilities. Damaged weights of a member cause such values: check the population with "
                "`chorus population show DIR --verify`."
            )
        if not largest.all():
            token = start + int((largest == 0).argmax())
            raise ChorusError(
                f"every member gives probability 0 to token {token} of the held-out text, so no mixture has a finite loss. "
                "Remove that token, or add a member that can produce it."
            )


def solve(
    probabilities_MN: Probabilities,
    *,
    gap: float = DEFAULT_GAP,
    start_M: FloatArray | None = None,
    pseudo_tokens: float = 0.0,
    max_steps: int = _MAX_STEPS,
) -> Fit:
    """`fit_weights` for a matrix that was already checked. A column of zeros gives an infinite loss and gap."""
    problem = Problem(probabilities_MN, pseudo_tokens)
    weights_M = _starting_point(problem, start_M)
    if weights_M is None:
        uniform_M = np.full(problem.num_members, 1 / problem.num_members)
        return Fit(weights_M=uniform_M, loss=math.inf, gap=math.inf, num_steps=0)
    steps = 0
    objective, gradient_M = problem.gradient(weights_M)
    while (reached := float(gradient_M.max()) - 1) > gap and steps < max_steps:
        weights_M = problem.newton_step(weights_M, objective, gradient_M)
        objective, gradient_M = problem.gradient(weights_M)
        steps += 1
    return Fit(weights_M=weights_M, loss=problem.loss(weights_M), gap=max(reached, 0.0), num_steps=steps)


def _starting_point(problem: "Problem", start_M: FloatArray | None) -> FloatArray | None:
    """Weights with a finite objective, sparse if there are many members; None if no weights have one."""
    uniform_M = np.full(problem.num_members, 1 / problem.num_members)
    if start_M is not None and start_M.sum() > 0:
        given_M: FloatArray = start_M / start_M.sum()
        if math.isfinite(problem.objective(given_M)):
            return given_M
    if not math.isfinite(problem.objective(uniform_M)):
        return None
    if problem.num_members <= _WORKING_SET or problem.pseudo_tokens:
        return uniform_M
    weights_M = uniform_M
    for _ in range(_EM_STEPS):
        weights_M = weights_M * problem.gradient(weights_M)[1]
    sparse_M = np.where(weights_M >= np.partition(weights_M, -_WORKING_SET)[-_WORKING_SET], weights_M, 0.0)
    sparse_M /= sparse_M.sum()
    return sparse_M if math.isfinite(problem.objective(sparse_M)) else np.asarray(weights_M / weights_M.sum())


class Problem:
    """The objective -(sum_n log q_n + c/M sum_m log w_m) / (N + c), its gradient and Newton steps; c = `pseudo_tokens`."""

    def __init__(self, probabilities_MN: Probabilities, pseudo_tokens: float) -> None:
        self.probabilities_MN = probabilities_MN
        self.num_members, self.num_tokens = probabilities_MN.shape
        self.pseudo_tokens = pseudo_tokens
        self.total = self.num_tokens + pseudo_tokens
        self.pseudo_each = pseudo_tokens / self.num_members

    def loss(self, weights_M: FloatArray) -> float:
        return float(mixture_losses(self.probabilities_MN, weights_M).mean())

    def objective(self, weights_M: FloatArray) -> float:
        sum_loss = float(mixture_losses(self.probabilities_MN, weights_M).sum())
        if self.pseudo_each:
            with np.errstate(divide="ignore"):
                sum_loss -= self.pseudo_each * float(np.log(weights_M).sum())
        return float(sum_loss / self.total)

    def gradient(self, weights_M: FloatArray) -> tuple[float, FloatArray]:
        """The objective and, for each member, its negative derivative: mean_n P[m, n] / q_n. The maximum minus 1 is the gap."""
        sum_loss, sum_M = 0.0, np.zeros(self.num_members)
        for block_MB in self._blocks():
            mixed_B = weights_M @ block_MB
            sum_loss -= float(np.log(mixed_B).sum())
            sum_M += block_MB @ (1 / mixed_B)
        if self.pseudo_each:
            sum_loss -= self.pseudo_each * float(np.log(weights_M).sum())
            sum_M += self.pseudo_each / weights_M
        return sum_loss / self.total, sum_M / self.total

    def newton_step(self, weights_M: FloatArray, objective: float, gradient_M: FloatArray) -> FloatArray:
        """A step that lowers the objective: towards the minimiser of the quadratic model, with a line search; else an EM step.

        It models objective + sum_m w_m over w >= 0, whose minimiser lies on the simplex (mixsqp, proposition 1).
        """
        joining = (weights_M == 0) & (gradient_M > 1)
        if joining.sum() > _WORKING_SET:
            joining &= gradient_M >= np.partition(gradient_M[joining], -_WORKING_SET)[-_WORKING_SET]
        working = np.flatnonzero((weights_M > 0) | joining)
        hessian_AA = self._hessian(weights_M, working)
        # Near-duplicate members make the Hessian singular. The ridge picks one of many equivalent steps; the line search checks it.
        hessian_AA[np.diag_indices_from(hessian_AA)] += 1e-9 * float(np.trace(hessian_AA)) / len(working)
        current_A = weights_M[working]
        linear_A = hessian_AA @ current_A - (1 - gradient_M[working])
        direction_A = minimise_quadratic(hessian_AA, linear_A, current_A) - current_A
        step_size = 1.0
        while step_size > 1e-4:
            trial_M = np.zeros_like(weights_M)
            trial_M[working] = np.maximum(current_A + step_size * direction_A, 0.0)
            if (total := float(trial_M.sum())) > 0:
                trial_M /= total
                if self.objective(trial_M) < objective:
                    return trial_M
            step_size /= 2
        em_M = weights_M * gradient_M
        return np.asarray(em_M / em_M.sum())

    def _hessian(self, weights_M: FloatArray, working: NDArray[np.intp]) -> FloatArray:
        hessian_AA = np.zeros((len(working), len(working)))
        support = weights_M[working] > 0
        size = len(working)
        width = max(64, _ONE_THREAD_PRODUCT // size**2)
        rows = max(1, _ONE_THREAD_PRODUCT // (size * width))
        for start, stop in _ranges(size, self.num_tokens, width):
            block_AB = self.probabilities_MN[working, start:stop].astype(np.float64)
            block_AB /= weights_M[working][support] @ block_AB[support]
            for first in range(0, size, rows):
                hessian_AA[first : first + rows] += block_AB[first : first + rows] @ block_AB.T
        if self.pseudo_each:
            hessian_AA[np.diag_indices_from(hessian_AA)] += self.pseudo_each / weights_M[working] ** 2
        return np.asarray(hessian_AA / self.total)

    def _blocks(self) -> Iterator[FloatArray]:
        for start, stop in _ranges(self.num_members, self.num_tokens):
            yield self.probabilities_MN[:, start:stop].astype(np.float64)


def _ranges(num_rows: int, num_columns: int, width: int | None = None) -> Iterator[tuple[int, int]]:
    width = width or max(64, _BLOCK_ELEMENTS // max(num_rows, 1))
    for start in range(0, num_columns, width):
        yield start, min(start + width, num_columns)
