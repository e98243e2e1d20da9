"""What a step of an engine costs, as the engine itself has learned it and shows in its metrics.

The gateway's own model (`latency`) sees whole answers: it knows well how long those like the last ones take, but not which part of
that belongs to a member, a row or a prompt, as these come and go together. For what would be if everybody had other numbers of
members, the engine is asked, which measures its members one by one.
"""

import re
from dataclasses import dataclass

_GAUGE = re.compile(rb'^chorus_engine_step_cost_seconds\{[^}]*part="(\w+)"[^}]*\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Seconds."""

    step: float
    """Of a step at all."""
    request: float
    """For each request in it."""
    member: float
    """For each different member that runs."""
    row: float
    """For each token row of each member."""
    context: float
    """For each cached token that each member reads."""


def read_costs(metrics: bytes) -> StepCosts | None:
    """The costs in an engine's metrics, in Prometheus' text format; None if it does not know them yet."""
    found = {name.decode(): float(value) for name, value in _GAUGE.findall(metrics)}
    try:
        return StepCosts(**found)
    except TypeError:
        return None
