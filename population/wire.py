"""The words between gateway and engine: a request's extra arguments (`vllm_xargs`), and the step costs in an engine's metrics."""

from dataclasses import dataclass

RESERVED_PREFIX = "chorus_"
"""Of all keys below; clients may not set them."""
TIER_ARGUMENT = "chorus_tier"
"""The tier that answers."""
MEMBER_ARGUMENT = "chorus_member"
"""Instead of a tier: the single member that answers, to fit a prior or to show disagreement through an engine."""
DECODING_ARGUMENT = "chorus_decoding"
"""One of `manifest.DECODINGS`; by default the tier's."""
BUDGET_ARGUMENT = "chorus_time_budget_ms"
"""The time budget in milliseconds, from the request's arrival at the engine."""
FLOOR_ARGUMENT = "chorus_floor"
"""With a time budget: the tier whose members are never dropped; by default the cheapest."""
MAX_MEMBERS_ARGUMENT = "chorus_most_members"
"""With a time budget: the maximum number of members that the request begins with."""
EXPECTED_TOKENS_ARGUMENT = "chorus_expected_tokens"
"""With a time budget: how many tokens it will probably generate, if fewer than `max_tokens`."""
REPORT_ARGUMENT = "chorus_report_in_stop_reason"
"""Requests a report of what was computed, in the response's `kv_transfer_params`.

If the value is not empty, the `stop_reason` also carries the report: the value, then JSON that includes the real stop reason,
because vLLM's streams have no other field for it. Requests with a time budget always get a report in `kv_transfer_params`.
"""

STEP_COST_METRIC = "chorus_engine_step_cost_seconds"
"""Gauge of an engine, with a label `part` for each field of `StepCosts`."""


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Learned costs of an engine's steps, in seconds."""

    step: float
    """Of each step."""
    request: float
    """Of each request in it."""
    member: float
    """Of each different member that runs."""
    row: float
    """Of each token row of each member."""
    context: float
    """Of each cached token that each member reads."""
