"""Budgets in members, forward passes, bytes or milliseconds, turned into limits on sets of members."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from chorus.population.errors import ChorusError
from chorus.population.manifest import Population
from chorus.population.shell import command
from chorus.prior.latency import LatencyTable
from chorus.prior.quadratic import FloatArray
from chorus.prior.selection import Limits

# M members
Unit = Literal["members", "x", "bytes", "ms"]
UNIT_TEXT = {
    "members": "members",
    "x": "forward passes of the largest member",
    "bytes": "bytes of weights",
    "ms": "ms per token",
}
TIER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_AMOUNT = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>x|ms|[KMGT]i?B|B)?")
_BYTES = {"B": 1} | {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
_BYTES |= {f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}


@dataclass(frozen=True, kw_only=True)
class Amount:
    """A number with its unit."""

    number: float
    unit: Unit

    @classmethod
    def parse(cls, text: str, where: str) -> "Amount":
        """Parse `3` (members), `1.5x`, `200MB` or `12ms`.

        Raises:
            ChorusError: `text` has another form. The message starts with `where`, the option being parsed.
        """
        match = _AMOUNT.fullmatch(text.strip())
        if match is None or (match["unit"] is None and "." in text):
            raise ChorusError(
                f"{where}: {text.strip()!r} is not an amount. Write it like 3 (members), 1.5x (forward passes of the "
                "largest member), 200MB (weights) or 12ms (per token)."
            )
        number, unit = float(match["number"]), match["unit"]
        if unit is None:
            return cls(number=number, unit="members")
        if unit in _BYTES:
            return cls(number=number * _BYTES[unit], unit="bytes")
        return cls(number=number, unit="x" if unit == "x" else "ms")


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """The most that each named tier may cost, and a cap for all tiers, in one unit."""

    tiers: Mapping[str, Amount]
    """Empty: the command chooses the tiers."""
    cap: Amount | None = None

    @classmethod
    def parse(cls, text: str | None, cap: Amount | None = None) -> "Budgets":
        """Parse `economy=1,standard=2`, `small=200MB,big=1GB` and so on.

        Raises:
            ChorusError: `text` cannot be parsed, names a tier twice, or mixes units.
        """
        tiers: dict[str, Amount] = {}
        for part in [] if text is None else text.split(","):
            name, separator, amount = (piece.strip() for piece in part.partition("="))
            if not (separator and amount and TIER_NAME.fullmatch(name)) or name in tiers:
                raise ChorusError(
                    f"--budgets {text!r}: {part!r} cannot be parsed or repeats a name. Write `economy=1,standard=2,premium=4`."
                )
            tiers[name] = Amount.parse(amount, f"--budgets {part.strip()}")
        units = {amount.unit for amount in tiers.values()}
        if len(units) > 1 or (cap is not None and units - {"members", cap.unit}):
            mixed = sorted(units | ({cap.unit} if cap else set()))
            raise ChorusError(
                f"budgets in {' and '.join(mixed)} cannot be compared: give all budgets and the cap in one unit."
            )
        return cls(tiers=tiers, cap=cap)

    @property
    def unit(self) -> Unit:
        """The unit of the limits; `members` without limits."""
        if self.cap is not None:
            return self.cap.unit
        return next((amount.unit for amount in self.tiers.values()), "members")

    @property
    def counts(self) -> dict[str, int] | None:
        """Members of each tier; None unless all budgets are in members."""
        if not self.tiers or any(amount.unit != "members" for amount in self.tiers.values()):
            return None
        return {name: int(amount.number) for name, amount in self.tiers.items()}


@dataclass(frozen=True, kw_only=True)
class ResolvedBudgets:
    """Budgets in the form that `fit_prior` takes."""

    counts: dict[str, int] | None
    """Members of each tier."""
    limited: tuple[str, ...] = ()
    """Tiers with a cost limit, in the order of `limits.tiers`; empty if `counts` are given."""
    limits: Limits | None = None


def resolve(budgets: Budgets, population: Population, directory: Path, table: LatencyTable | None) -> ResolvedBudgets:
    """Cost limits for this population. If all members cost the same, every limit becomes a number of members.

    Raises:
        ChorusError: a limit is in ms and `table` is None or incomplete, a limit is below the cost of the cheapest member, or a tier
            exceeds the cap.
    """
    if budgets.unit == "members":
        return ResolvedBudgets(counts=budgets.counts)
    costs_M, limit_of = _costs(budgets.unit, population, directory, table)
    cap = math.inf if budgets.cap is None else limit_of(budgets.cap.number)
    requested = {} if budgets.counts is not None else budgets.tiers
    named = sorted(((name, limit_of(amount.number)) for name, amount in requested.items()), key=lambda pair: pair[1])
    for name, limit in [*named, ("the cap", cap)]:
        if limit < float(costs_M.min()) * (1 - 1e-9):
            given = requested[name].number if name in requested else budgets.cap.number if budgets.cap else limit
            raise ChorusError(
                f"{name}: {given:g} {UNIT_TEXT[budgets.unit]} is less than the cheapest member costs "
                f"({_min_amount(budgets.unit, float(costs_M.min()), table)}). Allow at least that."
            )
    if named and named[-1][1] > cap:
        raise ChorusError(
            f"the budget of tier {named[-1][0]!r} is above the cap for all tiers: lower it, or raise the cap."
        )
    if float(np.ptp(costs_M)) > 1e-9 * float(costs_M.max()):
        limits = Limits(costs_M=costs_M, tiers=tuple(limit for _, limit in named), cap=cap)
        return ResolvedBudgets(counts=budgets.counts, limited=tuple(name for name, _ in named), limits=limits)
    member_cost, num_members = float(costs_M[0]), len(costs_M)

    def max_members(limit: float) -> int:
        return num_members if limit == math.inf else min(num_members, int(limit / member_cost + 1e-9))

    counts = budgets.counts or {name: max_members(limit) for name, limit in named} or None
    if counts and max(counts.values()) > max_members(cap):
        name = max(counts, key=counts.__getitem__)
        raise ChorusError(
            f"tier {name!r} has a budget of {counts[name]} members, but only {max_members(cap)} fit under the cap for all tiers."
        )
    return ResolvedBudgets(counts=counts, limits=Limits(costs_M=np.ones(num_members), cap=float(max_members(cap))))


def _costs(
    unit: Unit, population: Population, directory: Path, table: LatencyTable | None
) -> tuple[FloatArray, Callable[[float], float]]:
    """The members' costs, and a function that converts an amount of `unit` to a limit on the sum of costs."""
    relative_M = np.array([population.relative_cost((member.name,)) for member in population.members])
    if unit == "x":
        return relative_M, lambda amount: amount
    if unit == "bytes":
        sizes = [
            sum((directory / member.path / file).stat().st_size for file in member.sha256)
            for member in population.members
        ]
        return np.array(sizes, dtype=np.float64), lambda amount: amount
    if table is None:
        raise ChorusError(
            f"a limit in ms needs measured latencies. Measure the engine that will serve this population, "
            f"`{command('chorus', 'prior', 'measure', directory, '--engine', 'URL')}`, or pass a table with --latency."
        )
    if table.by_member is not None:
        if missing := [member.name for member in population.members if member.name not in table.by_member]:
            raise ChorusError(f"the latency table has no entry for {', '.join(missing)}. Add them under `by_member`.")
        latency_M = np.array([table.by_member[member.name] for member in population.members])
        return latency_M, lambda amount: amount - table.fixed_ms
    return relative_M, table.cost_within


def _min_amount(unit: Unit, cost: float, table: LatencyTable | None) -> str:
    """A cost in the unit of the budgets, for messages."""
    if unit != "ms" or table is None:
        return f"{cost:g}"
    return f"{cost + table.fixed_ms if table.by_member is not None else table.ms_of(cost):.3g}"
