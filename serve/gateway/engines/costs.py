"""An engine's step costs, read from its metrics.

The gateway's own model (`latency`) is fitted to whole answers. It predicts answers like the last ones well, but cannot tell which
part of the time belongs to a member, a row or a prompt, as these come and go together. The engine measures its members one by one.
"""

from prometheus_client.parser import text_string_to_metric_families

from chorus.population.wire import STEP_COST_METRIC, StepCosts


def read_costs(metrics: bytes) -> StepCosts | None:
    """The costs in an engine's metrics, in Prometheus' text format; None until the engine has learned them.

    Raises:
        ValueError: this is not that format.
    """
    prefix = STEP_COST_METRIC.encode()
    lines = b"\n".join(line for line in metrics.splitlines() if line.startswith(prefix))  # of hundreds, these alone
    families = text_string_to_metric_families(lines.decode() + "\n")
    parts = {sample.labels.get("part", ""): sample.value for family in families for sample in family.samples}
    try:
        return StepCosts(**parts)
    except TypeError:
        return None
