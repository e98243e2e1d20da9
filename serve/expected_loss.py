"""The loss of mixtures of every size, from those of a few."""

from collections.abc import Mapping


def expected_loss(num_members: int, losses: Mapping[int, float]) -> float:
    """Loss of a mixture of `num_members`, in nats, from the losses of tiers by their number of members.

    Linear between the nearest two sizes; outside of all sizes, that of the nearest.
    """
    below = max((size for size in losses if size <= num_members), default=min(losses))
    above = min((size for size in losses if size >= num_members), default=max(losses))
    if below == above:
        return losses[below]
    part = (num_members - below) / (above - below)
    return losses[below] + part * (losses[above] - losses[below])
