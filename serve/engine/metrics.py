"""What the engine tells Prometheus beside vLLM's own metrics: rows and seconds of each member, mixing, drops, the prior's version.

The scheduler counts in the engine's core process; its totals reach the API server with vLLM's own statistics, for `/metrics`.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from vllm.v1.metrics.loggers import StatLoggerBase

from chorus.population import manifest
from chorus.population.checkpoint import ARCHITECTURE
from chorus.serve.engine.stopwatch import MIXING

DROP_REASONS = {
    "start": "the request asked to begin with fewer",
    "late": "the time budget is spent",
    "forecast": "the time budget would be missed",
}
"""Why members leave a request: the metric's label, and the words of the request's own report."""

_SEND_INTERVAL_S = 0.25


class StepCounts:
    """Totals since the engine started. Kept by the scheduler, in integers: the channel carries no others."""

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
            seconds: of each member, and of mixing.
            draft_passes: forwards of members that drafted, beside that of each that ran any rows.
            caught_up: rows for tokens of steps that had left their member out.
        """
        self._num_steps += 1
        self._rows_by_set.update(rows_by_set)
        self._passes.update({member for members in rows_by_set for member in members})
        self._passes.update(draft_passes)
        self._caught_up += caught_up
        self._seconds = [total + more for total, more in zip(self._seconds, seconds, strict=True)]

    def count_drop(self, reason: str) -> None:
        """Add a member that left a request; `reason` is a key of `DROP_REASONS`."""
        self._drops[reason] += 1

    @property
    def mixing_s(self) -> float:
        """Seconds spent mixing."""
        return max(0.0, self._seconds[MIXING])

    def is_due(self, *, is_idle: bool) -> bool:
        """Whether the totals should be sent with this step: a few times a second, and when the last request is done."""
        now = time.monotonic()
        if not is_idle and now - self._sent_at < _SEND_INTERVAL_S:
            return False
        self._sent_at = now
        return True

    def totals(self, *, active_sets: int, prior_version: int, step_cost: Mapping[str, float]) -> dict[str, int]:
        """Everything as `name` or `name/label` with a whole number; seconds in micro- or picoseconds."""
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
        totals |= {f"step_cost_ps/{part}": round(seconds * 1e12) for part, seconds in step_cost.items()}
        return totals | {f"drops/{reason}": self._drops[reason] for reason in DROP_REASONS}


def attach(totals: dict[str, int], scheduler_stats: Any) -> None:
    """Let vLLM's statistics carry the totals to the API server.

    They have no place for a plugin's own. The one for waiting LoRA adapters holds a dictionary of integers, and is not read in a
    population, which refuses LoRA at start.
    """
    scheduler_stats.waiting_lora_adapters = totals


class PopulationStatLogger(StatLoggerBase):
    """vLLM makes one for each engine in the API server (group `vllm.stat_logger_plugins`) and hands it every statistic."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._collector: PopulationCollector | None = None
        if ARCHITECTURE in vllm_config.model_config.architectures:
            population = manifest.load(Path(vllm_config.model_config.model))
            self._collector = PopulationCollector.of_engine(
                engine_index, [member.name for member in population.members]
            )

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the newest totals."""
        if self._collector is not None and scheduler_stats is not None and scheduler_stats.waiting_lora_adapters:
            self._collector.totals = dict(scheduler_stats.waiting_lora_adapters)
            scheduler_stats.waiting_lora_adapters = {}

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


class PopulationCollector(Collector):
    """Shows one engine's totals to Prometheus."""

    _registered: ClassVar[dict[int, "PopulationCollector"]] = {}

    def __init__(self, engine_index: int, member_names: Sequence[str]) -> None:
        self.totals: dict[str, int] = {}
        self._engine = str(engine_index)
        self._member_names = member_names

    @classmethod
    def of_engine(cls, engine_index: int, member_names: Sequence[str]) -> "PopulationCollector":
        """A registered collector; it takes the place of an earlier one for the same engine."""
        if engine_index in cls._registered:
            REGISTRY.unregister(cls._registered.pop(engine_index))
        collector = cls._registered[engine_index] = cls(engine_index, member_names)
        REGISTRY.register(collector)
        return collector

    def collect(self) -> Iterator[Any]:
        """The metrics of this moment."""
        if not self.totals:
            return
        rows = CounterMetricFamily(
            "chorus_engine_member_rows", "Token rows that a member computed.", labels=["engine", "member"]
        )
        seconds = CounterMetricFamily(
            "chorus_engine_member_seconds", "Seconds spent in a member's layers and head.", labels=["engine", "member"]
        )
        passes = CounterMetricFamily(
            "chorus_engine_member_passes", "Forwards of a member, drafts included.", labels=["engine", "member"]
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
            "chorus_engine_step_cost_seconds",
            "What a step costs, as learned: at all, and for each thing that it computes.",
            labels=["engine", "part"],
        )
        for key, picoseconds in self.totals.items():
            if key.startswith("step_cost_ps/"):
                costs.add_metric([self._engine, key.partition("/")[2]], picoseconds / 1e12)
        yield from (rows, passes, seconds, drops, costs)
        for name, text, value in (
            ("chorus_engine_mixing_seconds", "Seconds spent mixing distributions.", self.totals["mixing_us"] / 1e6),
            ("chorus_engine_steps", "Steps that the engine has run.", self.totals["steps"]),
            (
                "chorus_engine_caught_up_rows",
                "Token rows that members computed late, after steps that had left them out.",
                self.totals["caught_up_rows"],
            ),
        ):
            counter = CounterMetricFamily(name, text, labels=["engine"])
            counter.add_metric([self._engine], value)
            yield counter
        for name, text, value in (
            (
                "chorus_engine_active_sets",
                "Different sets of members among the requests now.",
                self.totals["active_sets"],
            ),
            (
                "chorus_engine_prior_version",
                "Version of the prior that new requests get.",
                self.totals["prior_version"],
            ),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["engine"])
            gauge.add_metric([self._engine], value)
            yield gauge
