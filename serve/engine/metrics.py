"""Prometheus metrics in addition to vLLM's: rows and seconds of each member, mixing, drops, the prior's version.

The scheduler counts in the engine core process. Its totals reach the API server's `/metrics` inside vLLM's own statistics.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from vllm.v1.metrics.loggers import StatLoggerBase

from chorus.population import manifest
from chorus.population.checkpoint import ARCHITECTURE
from chorus.population.wire import STEP_COST_METRIC, StepCosts
from chorus.serve.engine.stopwatch import MIXING

DROP_REASONS = {
    "start": "the request asked to begin with fewer",
    "late": "the time budget is spent",
    "forecast": "the time budget would be missed",
}
"""Reasons for dropping members: the metric's label, and the text in the request's report."""

_SEND_INTERVAL_S = 0.25


class StepCounts:
    """Totals since the engine started, kept by the scheduler."""

    def __init__(self, num_members: int) -> None:
        self._num_members = num_members
        self._rows_by_set: Counter[tuple[int, ...]] = Counter()
        self._passes: Counter[int] = Counter()
        self._seconds = [0.0] * (num_members + 1)
        self._caught_up = 0
        self._drops: Counter[str] = Counter()
        self._num_steps = 0
        self._sent_at = 0.0

    def count_step(
        self,
        rows_by_set: Mapping[tuple[int, ...], int],
        seconds: Sequence[float],
        *,
        draft_passes: Mapping[int, int],
        caught_up: int,
    ) -> None:
        """Add a step.

        Args:
            rows_by_set: token rows by the set of members that ran them.
            seconds: seconds of each member, then of mixing.
            draft_passes: forward passes for drafting by member, in addition to one pass per member with any rows.
            caught_up: number of catch-up rows.
        """
        self._num_steps += 1
        self._rows_by_set.update(rows_by_set)
        self._passes.update({member for members in rows_by_set for member in members})
        self._passes.update(draft_passes)
        self._caught_up += caught_up
        self._seconds = [total + more for total, more in zip(self._seconds, seconds, strict=True)]

    def count_drop(self, reason: str) -> None:
        """Count a dropped member; `reason` is a key of `DROP_REASONS`."""
        self._drops[reason] += 1

    @property
    def mixing_s(self) -> float:
        """Seconds spent mixing."""
        return max(0.0, self._seconds[MIXING])

    def is_due(self, *, is_idle: bool) -> bool:
        """Whether this step should send the totals: a few times a second, and when the last request finishes."""
        now = time.monotonic()
        if not is_idle and now - self._sent_at < _SEND_INTERVAL_S:
            return False
        self._sent_at = now
        return True

    def totals(self, *, active_sets: int, prior_version: int, step_costs: StepCosts | None) -> dict[str, int]:
        """All metrics by `name` or `name/label`, as integers because the channel carries nothing else; times in µs or ps."""
        rows = [0] * self._num_members
        for members, count in self._rows_by_set.items():
            for member in members:
                rows[member] += count
        totals = {"steps": self._num_steps, "active_sets": active_sets, "prior_version": prior_version}
        totals |= {f"member_rows/{member}": count for member, count in enumerate(rows)}
        totals |= {f"member_passes/{member}": self._passes[member] for member in range(self._num_members)}
        totals["caught_up_rows"] = self._caught_up
        totals |= {f"member_us/{member}": round(self._seconds[member] * 1e6) for member in range(self._num_members)}
        totals["mixing_us"] = round(self.mixing_s * 1e6)
        if step_costs is not None:
            totals |= {f"step_cost_ps/{part}": round(seconds * 1e12) for part, seconds in asdict(step_costs).items()}
        return totals | {f"drops/{reason}": self._drops[reason] for reason in DROP_REASONS}


def attach(totals: dict[str, int], scheduler_stats: Any) -> None:
    """Put the totals into vLLM's statistics, which carry them to the API server.

    vLLM has no field for plugins. The one for waiting LoRA adapters holds a dictionary of integers and is unused, since
    populations refuse LoRA at start.
    """
    scheduler_stats.waiting_lora_adapters = totals


class PopulationStatLogger(StatLoggerBase):
    """Receives vLLM's statistics (group `vllm.stat_logger_plugins`). The API server creates one per engine."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._collector: PopulationCollector | None = None
        if ARCHITECTURE in vllm_config.model_config.architectures:
            population = manifest.load(Path(vllm_config.model_config.model))
            self._collector = PopulationCollector.of_engine(
                engine_index, [member.name for member in population.members]
            )

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        """Store the latest totals."""
        if self._collector is not None and scheduler_stats is not None and scheduler_stats.waiting_lora_adapters:
            self._collector.totals = dict(scheduler_stats.waiting_lora_adapters)
            scheduler_stats.waiting_lora_adapters = {}

    def log_engine_initialized(self) -> None:
        """Does nothing."""


class PopulationCollector(Collector):
    """Exports one engine's totals to Prometheus."""

    _registered: ClassVar[dict[int, "PopulationCollector"]] = {}

    def __init__(self, engine_index: int, member_names: Sequence[str]) -> None:
        self.totals: dict[str, int] = {}
        self._engine = str(engine_index)
        self._member_names = member_names

    @classmethod
    def of_engine(cls, engine_index: int, member_names: Sequence[str]) -> "PopulationCollector":
        """Register a collector, replacing any earlier one for the same engine."""
        if engine_index in cls._registered:
            REGISTRY.unregister(cls._registered.pop(engine_index))
        collector = cls._registered[engine_index] = cls(engine_index, member_names)
        REGISTRY.register(collector)
        return collector

    def collect(self) -> Iterator[Any]:
        """The current metrics."""
        if not self.totals:
            return
        rows = CounterMetricFamily(
            "chorus_engine_member_rows", "Token rows computed by a member.", labels=["engine", "member"]
        )
        seconds = CounterMetricFamily(
            "chorus_engine_member_seconds", "Seconds spent in a member's layers and head.", labels=["engine", "member"]
        )
        passes = CounterMetricFamily(
            "chorus_engine_member_passes", "Forward passes of a member, drafting included.", labels=["engine", "member"]
        )
        for idx, name in enumerate(self._member_names):
            passes.add_metric([self._engine, name], self.totals[f"member_passes/{idx}"])
            rows.add_metric([self._engine, name], self.totals[f"member_rows/{idx}"])
            seconds.add_metric([self._engine, name], self.totals[f"member_us/{idx}"] / 1e6)
        drops = CounterMetricFamily(
            "chorus_engine_drops",
            "Members dropped from requests to keep a time budget.",
            labels=["engine", "reason"],
        )
        for reason in DROP_REASONS:
            drops.add_metric([self._engine, reason], self.totals[f"drops/{reason}"])
        costs = GaugeMetricFamily(
            STEP_COST_METRIC,
            "Learned cost of a step: fixed, and per unit of what it computes.",
            labels=["engine", "part"],
        )
        for key, picoseconds in self.totals.items():
            if key.startswith("step_cost_ps/"):
                costs.add_metric([self._engine, key.partition("/")[2]], picoseconds / 1e12)
        yield from (rows, passes, seconds, drops, costs)
        for name, text, value in (
            ("chorus_engine_mixing_seconds", "Seconds spent mixing distributions.", self.totals["mixing_us"] / 1e6),
            ("chorus_engine_steps", "Steps run by the engine.", self.totals["steps"]),
            (
                "chorus_engine_caught_up_rows",
                "Catch-up rows: token rows that members computed after the step that they were left out of.",
                self.totals["caught_up_rows"],
            ),
        ):
            counter = CounterMetricFamily(name, text, labels=["engine"])
            counter.add_metric([self._engine], value)
            yield counter
        for name, text, value in (
            (
                "chorus_engine_active_sets",
                "Distinct sets of members among the running requests.",
                self.totals["active_sets"],
            ),
            (
                "chorus_engine_prior_version",
                "Version of the prior that new requests use.",
                self.totals["prior_version"],
            ),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["engine"])
            gauge.add_metric([self._engine], value)
            yield gauge
