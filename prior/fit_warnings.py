"""Warnings about a fit: members of weight 0, too few documents, and tiers that are not better than what costs less."""

import itertools

from chorus.prior.bootstrap import FEW_DOCUMENTS
from chorus.prior.evaluation import TierFit


def find_warnings(tiers: list[TierFit], sizes: dict[str, int], num_documents: int) -> list[str]:
    """Warnings about these tiers.

    Args:
        tiers: from the smallest.
        sizes: the number of members chosen for each tier, by name.
        num_documents: of the test split.
    """
    warnings = []
    for tier in tiers:
        if (running := len(tier.mixture.members)) < sizes[tier.name]:
            warnings.append(
                f"{tier.name} runs {running} of {sizes[tier.name]} members: the others have weight 0 on this text"
            )
    if num_documents < FEW_DOCUMENTS:
        warnings.append(
            f"the test split has only {num_documents} documents: intervals from fewer than {FEW_DOCUMENTS} are too narrow"
        )
    compared = [(tier, below.name, tier.to_tier_below) for below, tier in itertools.pairwise(tiers)]
    compared += [
        (tier, "the best single member", tier.mixture.to_best_single) for tier in tiers if len(tier.mixture.members) > 1
    ]
    for tier, other, difference in compared:
        assert difference is not None
        if difference.high >= 0:
            verdict = (
                "is worse than"
                if difference.low > 0
                else "is not better than"
                if difference.nats >= 0
                else "may not be better than"
            )
            warnings.append(
                f"{tier.name} {verdict} {other} on the test split: {difference.nats:+.4f} nats "
                f"[{difference.low:+.4f}, {difference.high:+.4f}]"
            )
    return warnings
