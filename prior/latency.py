"""Milliseconds per token on an engine: a table, measured through the engine's API or read from a file."""

import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.files import write_text
from chorus.population.manifest import Population
from chorus.prior.engine import Engine, generate

LATENCY_JSON = Path("prior") / "latency.json"
_PROMPT_TOKENS = 8
_REPEATS = 5


class Point(BaseModel):
    """One measured mixture."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    relative_cost: float = Field(gt=0)
    """In forward passes of the largest member."""
    ms_per_token: float = Field(gt=0)


class LatencyTable(BaseModel):
    """Milliseconds per token: of mixtures by relative cost (`points`), or per member (`by_member`) plus `fixed_ms`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    points: tuple[Point, ...] = ()
    by_member: dict[str, float] | None = None
    fixed_ms: float = Field(default=0.0, ge=0)
    engine: str = ""
    measured_at: str = ""

    @model_validator(mode="after")
    def _check(self) -> "LatencyTable":
        if bool(self.points) == bool(self.by_member):
            raise ValueError("expected either `points` or `by_member`")
        if self.by_member and min(self.by_member.values()) <= 0:
            raise ValueError("the time of every member must be above 0")
        return self

    def ms_of(self, relative_cost: float) -> float:
        """Linear interpolation between points, extrapolated along the nearest segment. Never falls as the cost rises."""
        costs, ms = self._curve()
        if len(costs) == 1:
            return float(ms[0] * relative_cost / costs[0])
        last = len(costs) - 1
        idx = min(max(int(np.searchsorted(costs, relative_cost)), 1), last)
        slope = (ms[idx] - ms[idx - 1]) / (costs[idx] - costs[idx - 1])
        return float(ms[idx - 1] + slope * (relative_cost - costs[idx - 1]))

    def cost_within(self, limit_ms: float) -> float:
        """The largest relative cost within `limit_ms`, by bisection of `ms_of`."""
        low, high = 0.0, 1.0
        while self.ms_of(high) <= limit_ms and high < 1e6:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.ms_of(middle) <= limit_ms * (1 + 1e-9) else (low, middle)
        return low

    def _curve(self) -> tuple[list[float], list[float]]:
        """Costs, rising, and their times: averaged per cost, then made non-decreasing with a running maximum."""
        by_cost = itertools.groupby(sorted(self.points, key=lambda p: p.relative_cost), key=lambda p: p.relative_cost)
        curve = [(cost, statistics.mean(point.ms_per_token for point in points)) for cost, points in by_cost]
        return [cost for cost, _ in curve], list(itertools.accumulate((ms for _, ms in curve), max))


def load_table(path: Path) -> LatencyTable:
    """Read a latency table, or take the rows of lowest concurrency from the output of `bench/engine.py --json`.

    Raises:
        ChorusError: the file is missing or has neither format.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(raw, dict) and "rows" in raw:
            lowest = min(row["concurrency"] for row in raw["rows"])
            points = [
                {"relative_cost": row["member_rows"], "ms_per_token": 1000 * lowest / row["tokens_per_s"]}
                for row in raw["rows"]
                if row["concurrency"] == lowest
            ]
            raw = {"points": points, "engine": "bench/engine.py", "measured_at": raw.get("date", "")}
        return LatencyTable.model_validate(raw)
    except FileNotFoundError:
        raise ChorusError(f"the latency table {path} does not exist. Pass an existing file with --latency.") from None
    except (ValidationError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        reason = "; ".join(e["msg"] for e in error.errors()) if isinstance(error, ValidationError) else repr(error)
        raise ChorusError(
            f"{path} is not a latency table ({reason}). Expected JSON like "
            '{"points": [{"relative_cost": 1, "ms_per_token": 5.2}]} or {"fixed_ms": 0.4, "by_member": {"t0-c00": 2.5}}.'
        ) from None


def save_table(table: LatencyTable, directory: Path) -> None:
    """Write DIR/prior/latency.json."""
    write_text(directory / LATENCY_JSON, table.model_dump_json(indent=2, exclude_none=True) + "\n")


def measure(
    engine: Engine, population: Population, *, num_tokens: int = 64, clock: Callable[[], float] = time.perf_counter
) -> LatencyTable:
    """Milliseconds per generated token of every tier, one request at a time: the median of several rounds over all tiers.

    Each round subtracts the time of a one-token answer from that of a long answer, which removes the time of the prompt.

    Raises:
        ChorusError: the context is too short, or the engine rejects a request or generates another number of tokens.
    """
    num_tokens = min(num_tokens, population.context_length - _PROMPT_TOKENS - 1)
    if num_tokens < 4:
        raise ChorusError(f"a context of {population.context_length} tokens is too short to measure latencies.")
    prompt = [idx % population.vocab_size for idx in range(2, 2 + _PROMPT_TOKENS)]
    measured_ms: dict[str, list[float]] = {tier.name: [] for tier in population.tiers}
    for round_idx in range(_REPEATS + 1):
        for tier in population.tiers:
            start = clock()
            generate(engine, tier.name, prompt, 1)
            between = clock()
            generate(engine, tier.name, prompt, num_tokens + 1)
            if round_idx:  # the first round warms up
                measured_ms[tier.name].append(1000 * ((clock() - between) - (between - start)) / num_tokens)
    return LatencyTable(
        points=tuple(
            Point(
                relative_cost=population.relative_cost(tier.members),
                ms_per_token=max(statistics.median(measured_ms[tier.name]), 1e-3),
            )
            for tier in population.tiers
        ),
        engine=engine.url,
        measured_at=manifest.now().isoformat(),
    )
