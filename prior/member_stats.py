"""Statistics of members on the test split: correlation of their losses, and on how many documents members and tiers win."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chorus.prior.bootstrap import Bootstrap
from chorus.prior.quadratic import FloatArray
from chorus.prior.weights import Probabilities, mixture_losses

# M members, N tokens, D documents
_BLOCK_TOKENS = 4_096


@dataclass(frozen=True, kw_only=True)
class MemberStats:
    """Member statistics on the test split."""

    correlation_MM: FloatArray
    """Correlation of the members' token losses. Near 1, two members err on the same tokens and mixing them gains little."""
    documents_won_M: NDArray[np.int64]
    """On how many documents each member has the lowest loss of all members."""
    tier_wins: tuple[int, ...]
    """On how many documents each tier has a lower loss than the best single member overall."""
    num_documents: int


def compute_member_stats(
    probabilities_MN: Probabilities, bootstrap: Bootstrap, tier_losses: Sequence[FloatArray]
) -> MemberStats:
    """Statistics from likelihoods; `tier_losses` holds each tier's losses (N) on the same tokens."""
    one = np.ones(1)
    by_document_MD = np.stack([bootstrap.by_document(mixture_losses(row[None], one)) for row in probabilities_MN])
    means_M = np.array([mixture_losses(row[None], one).mean() for row in probabilities_MN])
    best_D = by_document_MD[int(means_M.argmin())]
    return MemberStats(
        correlation_MM=loss_correlation(probabilities_MN),
        documents_won_M=np.bincount(by_document_MD.argmin(axis=0), minlength=len(probabilities_MN)),
        tier_wins=tuple(int((bootstrap.by_document(losses_N) < best_D).sum()) for losses_N in tier_losses),
        num_documents=bootstrap.num_documents,
    )


def loss_correlation(probabilities_MN: Probabilities) -> FloatArray:
    """Pearson correlation of -log P[m, :] between members; 1 on the diagonal. Zero probabilities count as the smallest float32."""
    num_members, num_tokens = probabilities_MN.shape
    sum_M, products_MM = np.zeros(num_members), np.zeros((num_members, num_members))
    for start in range(0, num_tokens, _BLOCK_TOKENS):
        block_MB = probabilities_MN[:, start : start + _BLOCK_TOKENS].astype(np.float64)
        losses_MB = -np.log(np.maximum(block_MB, np.finfo(np.float32).tiny))
        sum_M += losses_MB.sum(axis=1)
        products_MM += losses_MB @ losses_MB.T
    mean_M = sum_M / num_tokens
    covariance_MM = products_MM / num_tokens - np.outer(mean_M, mean_M)
    deviation_M = np.sqrt(np.maximum(np.diag(covariance_MM), np.finfo(np.float64).tiny))
    correlation_MM = np.clip(covariance_MM / np.outer(deviation_M, deviation_M), -1, 1)
    np.fill_diagonal(correlation_MM, 1.0)
    return np.asarray(correlation_MM)
