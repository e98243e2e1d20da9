"""What a user may spend, in the user's own unit, as limits on sets of members: members, forward passes, memory or milliseconds."""

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
WHAT = {
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
    """So much of a unit."""

    number: float
    unit: Unit

    @classmethod
    def parse(cls, text: str, where: str) -> "Amount":
        """`3` members, `1.5x`, `200MB` or `12ms`.

        Raises:
            ChorusError: it is none of these; `where` says what was being read.
        """
        found = _AMOUNT.fullmatch(text.strip())
        if found is None or (found["unit"] is None and "." in text):
            raise ChorusError(
                f"{where}: {text.strip()!r} is not an amount. Write it like 3 (members), 1.5x (forward passes of the "
                "largest member), 200MB (weights) or 12ms (per token)."
            )
        number, unit = float(found["number"]), found["unit"]
        if unit is None:
            return cls(number=number, unit="members")
        if unit in _BYTES:
            return cls(number=number * _BYTES[unit], unit="bytes")
        return cls(number=number, unit="x" if unit == "x" else "ms")


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Named tiers with what each may cost, all in one unit, and what none may exceed."""

    tiers: Mapping[str, Amount]
    """None, for tiers of the command's own choice."""
    cap: Amount | None = None

    @classmethod
    def parse(cls, text: str | None, cap: Amount | None = None) -> "Budgets":
        """From `economy=1,standard=2`, `small=200MB,big=1GB` and the like.

        Raises:
            ChorusError: it is written otherwise, names a tier twice, or mixes units.
        """
        tiers: dict[str, Amount] = {}
        for part in [] if text is None else text.split(","):
            name, separator, amount = (piece.strip() for piece in part.partition("="))
            if not (separator and amount and TIER_NAME.fullmatch(name)) or name in tiers:
                raise ChorusError(
                    f"--budgets {text!r} is not understood at {part!r}. Write it like `economy=1,standard=2,premium=4`."
                )
            tiers[name] = Amount.parse(amount, f"--budgets {part.strip()}")
        units = {amount.unit for amount in tiers.values()}
        if len(units) > 1 or (cap is not None and units - {"members", cap.unit}):
            mixed = sorted(units | ({cap.unit} if cap else set()))
            raise ChorusError(
                f"budgets in {' and '.join(mixed)} cannot be compared: give all of them, and the most, in one unit."
            )
        return cls(tiers=tiers, cap=cap)

    @property
    def unit(self) -> Unit:
        """Of the limits; `members` where there are none."""
        if self.cap is not None:
            return self.cap.unit
        return next((amount.unit for amount in self.tiers.values()), "members")

    @property
    def counts(self) -> dict[str, int] | None:
        """Members of each tier, where that is what was asked for."""
        if not self.tiers or any(amount.unit != "members" for amount in self.tiers.values()):
            return None
        return {name: int(amount.number) for name, amount in self.tiers.items()}


@dataclass(frozen=True, kw_only=True)
class Spending:
    """Budgets as `fit_prior` takes them."""

    counts: dict[str, int] | None
    """Members of each tier."""
    limited: tuple[str, ...] = ()
    """Tiers with a limit of cost, in the order of `limits.tiers`; none where `counts` are given."""
    limits: Limits | None = None


def resolve(budgets: Budgets, population: Population, directory: Path, table: LatencyTable | None) -> Spending:
    """Limits of cost for this population. Members that cost the same turn every limit into a number of members.

    Raises:
        ChorusError: there is no latency table for a limit in ms, a limit is below the cheapest member, or two are as good as one.
    """
    if budgets.unit == "members":
        return Spending(counts=budgets.counts)
    costs_M, limit_of = _costs(budgets.unit, population, directory, table)
    cap = math.inf if budgets.cap is None else limit_of(budgets.cap.number)
    wished = {} if budgets.counts is not None else budgets.tiers
    named = sorted(((name, limit_of(amount.number)) for name, amount in wished.items()), key=lambda pair: pair[1])
    for name, limit in [*named, ("the most", cap)]:
        if limit < float(costs_M.min()) * (1 - 1e-9):
            given = wished[name].number if name in wished else budgets.cap.number if budgets.cap else limit
            raise ChorusError(
                f"{name}: {given:g} {WHAT[budgets.unit]} are less than the cheapest member costs "
                f"({_at_least(budgets.unit, float(costs_M.min()), table)}). Allow that much."
            )
    if named and named[-1][1] > cap:
        raise ChorusError(
            f"tier {named[-1][0]!r} may cost more than the most that any may: lower it, or raise the most."
        )
    if float(np.ptp(costs_M)) > 1e-9 * float(costs_M.max()):
        limits = Limits(costs_M=costs_M, tiers=tuple(limit for _, limit in named), cap=cap)
        return Spending(counts=budgets.counts, limited=tuple(name for name, _ in named), limits=limits)
    each, most = float(costs_M[0]), len(costs_M)

    def members(limit: float) -> int:
        return most if limit == math.inf else min(most, int(limit / each + 1e-9))

    counts = budgets.counts or {name: members(limit) for name, limit in named} or None
    if counts and max(counts.values()) > members(cap):
        name = max(counts, key=counts.__getitem__)
        raise ChorusError(
            f"tier {name!r} asks for {counts[name]} members; within the most that any tier may cost fit {members(cap)}."
        )
    return Spending(counts=counts, limits=Limits(costs_M=np.ones(most), cap=float(members(cap))))


def _costs(
    unit: Unit, population: Population, directory: Path, table: LatencyTable | None
) -> tuple[FloatArray, Callable[[float], float]]:
    """The members' costs, and a function from an amount of the unit to a limit on their sum."""
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
            f"a limit in ms needs measured latencies. Measure the engine that will serve, "
            f"`{command('chorus', 'prior', 'measure', directory, '--engine', 'URL')}`, or give a table with --latency."
        )
    if table.by_member is not None:
        if missing := [member.name for member in population.members if member.name not in table.by_member]:
            raise ChorusError(f"the latency table has no entry for {', '.join(missing)}. Add them under `by_member`.")
        own_M = np.array([table.by_member[member.name] for member in population.members])
        return own_M, lambda amount: amount - table.fixed_ms
    return relative_M, table.cost_within


def _at_least(unit: Unit, cost: float, table: LatencyTable | None) -> str:
    if unit != "ms" or table is None:
        return f"{cost:g}"
    return f"{cost + table.fixed_ms if table.by_member is not None else table.ms_of(cost):.3g}"
