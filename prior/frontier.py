"""Finds the knee of a loss-against-cost curve."""

from collections.abc import Sequence


def knee(costs: Sequence[float], losses: Sequence[float]) -> int | None:
    """Index of the point farthest below the straight line from the first to the last, both axes scaled to [0, 1].

    The rule of Satopaa et al. (Finding a Kneedle in a Haystack, 2011) for a curve without noise. `costs` must rise. None with
    fewer than three points or if the loss does not fall.
    """
    if len(costs) < 3 or losses[-1] >= losses[0]:
        return None
    width, height = costs[-1] - costs[0], losses[0] - losses[-1]
    if width <= 0:
        return None
    gains = [(losses[0] - y) / height - (x - costs[0]) / width for x, y in zip(costs, losses, strict=True)]
    best = max(range(len(gains)), key=gains.__getitem__)
    return best if gains[best] > 0 else None
