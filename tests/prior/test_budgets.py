import json
import math

import numpy as np
import pytest

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.manifest import Member
from chorus.prior.budgets import Amount, Budgets, resolve
from chorus.prior.latency import LatencyTable, Point, load_table, measure

TABLE = LatencyTable(points=(Point(relative_cost=1, ms_per_token=3), Point(relative_cost=4, ms_per_token=9)))


@pytest.fixture
def even(tiny_population):
    return manifest.load(tiny_population), tiny_population


@pytest.fixture
def uneven(even):
    """The same members, but each said to have more parameters than the one before."""
    population, directory = even
    sizes = [100_000, 150_000, 200_000, 400_000]
    members = tuple(
        member.model_copy(update={"num_parameters": n}) for member, n in zip(population.members, sizes, strict=True)
    )
    assert all(isinstance(member, Member) for member in members)
    return population.model_copy(update={"members": members}), directory


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [
        ("3", 3, "members"),
        ("1.5x", 1.5, "x"),
        ("12ms", 12, "ms"),
        ("0.5 ms", 0.5, "ms"),
        ("200MB", 2e8, "bytes"),
        ("1.5GiB", 1.5 * 2**30, "bytes"),
    ],
)
def test_reads_amounts(text, number, unit):
    assert Amount.parse(text, "here") == Amount(number=number, unit=unit)


@pytest.mark.parametrize("text", ["1.5", "fast", "-1", "3 apples", "", "1e3"])
def test_refuses_what_is_no_amount(text):
    with pytest.raises(ChorusError, match="is not an amount"):
        Amount.parse(text, "--budgets big")


@pytest.mark.parametrize(
    ("text", "cap", "message"),
    [
        ("a=1,b=2x", None, "one unit"),
        ("a=2x", Amount(number=9, unit="ms"), "one unit"),
        ("a=1,a=2", None, "economy=1"),
        ("a", None, "economy=1"),
        ("a b=1", None, "economy=1"),
    ],
)
def test_refuses_budgets_that_make_no_sense(text, cap, message):
    with pytest.raises(ChorusError, match=message):
        Budgets.parse(text, cap)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("a=1,b=3", {"a": 1, "b": 3}),
        ("a=1.9x,b=3x", {"a": 1, "b": 3}),
        ("a=3ms,b=7.5ms", {"a": 1, "b": 3}),  # 1 + 2 ms for each member
    ],
)
def test_members_of_one_cost_turn_limits_into_numbers_of_members(even, text, counts):
    spending = resolve(Budgets.parse(text), *even, TABLE)

    assert spending.counts == counts
    assert spending.limited == ()


def test_memory_counts_the_files_of_the_weights(even):
    population, directory = even
    each = sum((directory / population.members[0].path / file).stat().st_size for file in population.members[0].sha256)

    spending = resolve(Budgets.parse(f"a={each}B,b={3 * each + 1}B"), population, directory, None)

    assert spending.counts == {"a": 1, "b": 3}


def test_the_most_that_a_tier_may_cost_bounds_every_set(even):
    spending = resolve(Budgets.parse(None, Amount(number=2.7, unit="x")), *even, None)

    assert spending.counts is None
    assert spending.limits.cap == 2
    with pytest.raises(ChorusError, match="has a budget of 3 members, but only 2 fit under the cap"):
        resolve(Budgets.parse("a=1,b=3", Amount(number=2.7, unit="x")), *even, None)


def test_members_of_different_cost_are_limited_by_cost(uneven):
    spending = resolve(Budgets.parse("big=1.2x,small=0.5x"), *uneven, None)

    assert spending.counts is None
    assert spending.limited == ("small", "big")
    assert spending.limits.tiers == (0.5, 1.2)
    np.testing.assert_allclose(spending.limits.costs_M, [0.25, 0.375, 0.5, 1.0])


def test_a_table_by_member_is_taken_as_it_is(even):
    population, directory = even
    names = [member.name for member in population.members]
    table = LatencyTable(by_member=dict(zip(names, (1.0, 2.0, 3.0, 4.0), strict=True)), fixed_ms=0.5)

    spending = resolve(Budgets.parse("a=3.6ms", Amount(number=8, unit="ms")), population, directory, table)

    np.testing.assert_allclose(spending.limits.costs_M, [1, 2, 3, 4])
    assert spending.limits.tiers == pytest.approx((3.1,))
    assert spending.limits.cap == 7.5
    with pytest.raises(ChorusError, match=names[3]):
        resolve(Budgets.parse("a=3ms"), population, directory, LatencyTable(by_member=dict.fromkeys(names[:3], 1.0)))


@pytest.mark.parametrize(
    ("text", "cap", "message"),
    [
        ("a=0.4x", None, "less than the cheapest member"),
        (None, Amount(number=2, unit="ms"), r"less than the cheapest member costs \(3\)"),
        ("a=3x", Amount(number=2, unit="x"), "is above the cap for all tiers"),
    ],
)
def test_refuses_limits_that_leave_nothing(even, text, cap, message):
    with pytest.raises(ChorusError, match=message):
        resolve(Budgets.parse(text, cap), *even, TABLE)


def test_milliseconds_need_a_table(even):
    with pytest.raises(ChorusError, match="chorus prior measure"):
        resolve(Budgets.parse("a=3ms"), *even, None)


def test_the_table_is_read_along_straight_lines_and_back():
    assert [TABLE.ms_of(cost) for cost in (0.5, 1, 2, 4, 6)] == pytest.approx([2, 3, 5, 9, 13])
    for ms in (2.0, 3.0, 5.0, 11.0):
        assert TABLE.ms_of(TABLE.cost_within(ms)) == pytest.approx(ms)
    noisy = LatencyTable(points=tuple(Point(relative_cost=c, ms_per_token=m) for c, m in ((1, 3), (2, 2.9), (4, 9))))
    assert noisy.ms_of(2) == 3  # a dearer mixture is not taken to be faster
    single = LatencyTable(points=(Point(relative_cost=2, ms_per_token=8),))
    assert single.ms_of(3) == 12


def test_reads_its_own_tables_those_of_the_bench_and_no_others(tmp_path):
    path = tmp_path / "latency.json"
    path.write_text(TABLE.model_dump_json())
    assert load_table(path) == TABLE
    rows = [
        {"concurrency": c, "mix": "tier", "member_rows": k, "tokens_per_s": 1000 * c / (1 + 2 * k)}
        for c in (1, 16)
        for k in (1, 4)
    ]
    path.write_text(json.dumps({"date": "2026-11-24", "rows": rows}))
    assert [load_table(path).ms_of(k) for k in (1, 2, 4)] == pytest.approx([3, 5, 9])
    for text in ("{}", "[]", "{", '{"rows": []}', '{"points": [{"relative_cost": 1, "ms_per_token": -1}]}'):
        path.write_text(text)
        with pytest.raises(ChorusError, match="is not a latency table"):
            load_table(path)
    with pytest.raises(ChorusError, match="does not exist"):
        load_table(tmp_path / "nothing.json")


def test_measures_the_time_of_a_token_without_that_of_the_prompt(even, monkeypatch):
    population, _ = even
    now = 0.0

    def generate(engine, tier, prompt, num_tokens):
        nonlocal now
        now += 0.5 + 0.002 * population.tier(tier).budget * num_tokens

    monkeypatch.setattr("chorus.prior.latency.generate", generate)

    class Anywhere:
        url = "http://here"

    table = measure(Anywhere(), population, clock=lambda: now)

    assert [point.relative_cost for point in table.points] == [1, 2, 4]
    assert [point.ms_per_token for point in table.points] == pytest.approx([2, 4, 8])
    assert math.isclose(table.ms_of(3), 6)
