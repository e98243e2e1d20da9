"""The weighting rule of q0's benchmark code: the baseline for every fit."""

import numpy as np

from chorus.prior.quadratic import FloatArray
from chorus.prior.weights import Probabilities, Problem

_STEPS, _RATE = 300, 0.5
_BETAS, _EPSILON, _DECAY = (0.9, 0.999), 1e-8, 0.01  # PyTorch's defaults for AdamW


def reference_weights(probabilities_MN: Probabilities) -> FloatArray:
    """Softmax weights of all members: 300 full-batch AdamW steps at learning rate 0.5 on -mean_n log q_n, from uniform weights.

    Source: q0's code for the unlimited track of the NanoGPT Slowrun. The gradient with respect to logit m is
    w_m (1 - mean_n P[m, n] / q_n).
    """
    problem = Problem(probabilities_MN, pseudo_tokens=0.0)
    logits_M = np.zeros(problem.num_members)
    first_M, second_M = np.zeros_like(logits_M), np.zeros_like(logits_M)
    for step in range(1, _STEPS + 1):
        weights_M = _softmax(logits_M)
        slope_M = weights_M * (1 - problem.gradient(weights_M)[1])
        first_M = _BETAS[0] * first_M + (1 - _BETAS[0]) * slope_M
        second_M = _BETAS[1] * second_M + (1 - _BETAS[1]) * slope_M**2
        corrected_M = np.sqrt(second_M / (1 - _BETAS[1] ** step)) + _EPSILON
        logits_M = logits_M * (1 - _RATE * _DECAY) - _RATE * first_M / (1 - _BETAS[0] ** step) / corrected_M
    return _softmax(logits_M)


def top_by_weight(weights_M: FloatArray, num_members: int) -> FloatArray:
    """The `num_members` largest weights, renormalised, and zero elsewhere: how the reference meets a budget."""
    chosen = np.argsort(-weights_M, kind="stable")[:num_members]
    top_M = np.zeros_like(weights_M)
    top_M[chosen] = weights_M[chosen] / weights_M[chosen].sum()
    return top_M


def _softmax(logits_M: FloatArray) -> FloatArray:
    exponentials_M = np.exp(logits_M - logits_M.max())
    return np.asarray(exponentials_M / exponentials_M.sum(), dtype=np.float64)
