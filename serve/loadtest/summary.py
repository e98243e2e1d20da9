"""Summary of a load test: requests served and in time, quality, and latency."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from chorus.serve.expected_loss import expected_loss
from chorus.serve.loadtest.load import Sent

_PERCENTILES = (50, 90, 95, 99)


def summarise(sent: Sequence[Sent], cards: dict[str, dict[str, Any]], duration_s: float) -> dict[str, Any]:
    """Figures of a run. `cards` are the `population` objects of the tiers' model cards, by tier.

    attainment: the fraction of admitted requests (not answered with 429) that were answered in full within their budget.
    goodput: requests and tokens per second of those. quality-weighted goodput: the same tokens, each weighted by
    exp(best loss - loss of its mixture), which is the ratio of perplexities on the test split.
    """
    admitted = [each for each in sent if each.status != 429]
    in_time = [each for each in sent if each.is_in_time]
    losses = {card["budget"]: card["test_loss"]["nats"] for card in cards.values() if card.get("test_loss")}
    mixed = [(members, tokens) for each in in_time for members, tokens in _mixed(each, cards)]
    num_tokens = sum(tokens for _, tokens in mixed)
    figures: dict[str, Any] = {
        "sent": len(sent),
        "admitted": len(admitted),
        "served": sum(each.is_served for each in sent),
        "in_time": len(in_time),
        "refused_429": len(sent) - len(admitted),
        "without_retry_after": sum(each.status == 429 and each.retry_after_s is None for each in sent),
        "failed_5xx": sum(each.status >= 500 for each in sent),
        "broken": sum(each.error is not None for each in sent),
        "attainment": _ratio(len(in_time), len(admitted)),
        "requests_in_time_per_s": len(in_time) / duration_s,
        "goodput_tokens_per_s": num_tokens / duration_s,
        "mean_members": _ratio(sum(members * tokens for members, tokens in mixed), num_tokens),
        "tiers_served": dict(Counter(each.tier_served for each in sent if each.tier_served)),
        "first_token_ms": _percentiles([1000 * each.first_s for each in sent if each.first_s is not None]),
        "total_ms": _percentiles([1000 * each.total_s for each in sent if each.is_served]),
        "token_ms": _percentiles(
            [
                1000 * (each.total_s - each.first_s) / (each.tokens - 1)
                for each in sent
                if each.is_served and each.first_s is not None and each.tokens > 1
            ]
        ),
    }
    if losses and num_tokens:
        best = min(losses.values())
        weighed = [(tokens, expected_loss(members, losses)) for members, tokens in mixed]
        figures["expected_loss_nats"] = sum(tokens * loss for tokens, loss in weighed) / num_tokens
        figures["quality_weighted_tokens_per_s"] = (
            sum(tokens * math.exp(best - loss) for tokens, loss in weighed) / duration_s
        )
    return figures


def _mixed(sent: Sent, cards: dict[str, dict[str, Any]]) -> list[tuple[int, int]]:
    if sent.members_per_token:
        return sent.members_per_token
    if sent.tier_served not in cards:
        return []
    return [(cards[sent.tier_served]["budget"], sent.tokens)]


def _percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{percent}": round(cuts[percent - 1], 2) for percent in _PERCENTILES}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
