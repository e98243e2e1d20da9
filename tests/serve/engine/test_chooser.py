"""Which way of decoding is chosen, where steps cost something else than expected."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from chorus.serve.engine.chooser import Candidate, DecodingChooser, Kind
from chorus.serve.engine.deadline import StepCost, StepLoad
from chorus.serve.engine.decoding import Acceptance, tokens_per_step
from chorus.serve.engine.mixture import Mixture

SIX = Mixture(tier="max", members=tuple(range(6)), weights=(1 / 6,) * 6, pool="linear", temperature=1.0)


def linear_s(load: StepLoad) -> float:
    return 0.001 + 0.003 * load.active_members + 0.0001 * load.member_rows


class Engine:
    """Requests of six members, whose steps take what is expected times a factor of their kind."""

    def __init__(
        self, factors: dict[Kind, float], *, acceptance: float, num_requests: int = 1, can_be_sampled: bool = True
    ) -> None:
        self.cost, self.dice = StepCost(), random.Random(1)
        self.chooser = DecodingChooser(self.cost)
        self.taken = Counter[Kind]()
        self.seconds = self.tokens = 0.0
        self._factors, self._acceptance, self._can_be_sampled = factors, acceptance, can_be_sampled
        self.resize(num_requests)

    def resize(self, num_requests: int) -> None:
        self._candidates = [
            Candidate(
                mixture=SIX, context=0, can_be_sampled=self._can_be_sampled, is_sampled=False, acceptance=Acceptance()
            )
            for _ in range(num_requests)
        ]

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.chooser.choose(self._candidates)
            self._step()

    def _step(self) -> None:
        way, count = self.chooser.current, len(self._candidates)
        load = StepLoad(requests=count, active_members=6, member_rows=6 * count)
        kind: Kind = "plain"
        tokens = float(count)
        if way.samples:
            kind, load = "sampled", replace(load, active_members=6 * (1 - (5 / 6) ** count))
        elif way.drafts:
            kind, k = "drafts", way.drafts
            load = replace(
                load,
                requests=count * (1 + k),
                active_members=6 + k,
                member_rows=6 * count * (1 + k) + k * count,
            )
            tokens = count * tokens_per_step(self._acceptance, k)
            for each in self._candidates:
                accepted = next((idx for idx in range(k) if self.dice.random() > self._acceptance), k)
                assert each.acceptance is not None
                each.acceptance.observe(k, accepted)
        seconds = linear_s(load) * self._factors[kind] * self.dice.lognormvariate(0, 0.1)
        self.chooser.observe_step(kind, load, seconds, num_requests=count)
        if kind != "drafts":
            self.cost.observe(load, seconds, members_s=seconds - 0.001)
        self.taken[kind] += 1
        self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens


def engine_after(num_steps: int, **options: Any) -> Engine:
    """One that has learned for so many steps, and then counted as many."""
    engine = Engine(**options)
    engine.run(num_steps)
    engine.taken.clear()
    engine.seconds = engine.tokens = 0.0
    engine.run(num_steps)
    return engine


AS_EXPECTED: dict[Kind, float] = {"plain": 1.0, "sampled": 1.0, "drafts": 1.0}


def test_one_request_is_sampled_and_without_that_drafted_for() -> None:
    assert engine_after(200, factors=AS_EXPECTED, acceptance=0.8).taken["sampled"] > 190
    engine = engine_after(200, factors=AS_EXPECTED, acceptance=0.8, can_be_sampled=False)
    assert engine.taken["drafts"] > 190


@pytest.mark.parametrize(
    ("kind", "dearer"), [("sampled", 1.0), ("sampled", 1.6), ("drafts", 1.0), ("drafts", 1.6), ("drafts", 2.5)]
)
def test_a_way_that_is_slower_than_expected_is_left(kind: Kind, dearer: float) -> None:
    """What is lost against the best fixed way is what trying the others again costs."""
    factors = {**AS_EXPECTED, kind: dearer}
    engine = engine_after(2000, factors=factors, acceptance=0.8, can_be_sampled=kind == "sampled")
    plain_s = linear_s(StepLoad(requests=1, active_members=6, member_rows=6))
    sampled_s = factors["sampled"] * linear_s(StepLoad(requests=1, active_members=1, member_rows=6))
    drafts_s = [
        factors["drafts"] * linear_s(StepLoad(requests=1 + k, active_members=6 + k, member_rows=6 + 7 * k))
        for k in range(1, 7)
    ]
    speeds = [1 / plain_s, *(tokens_per_step(0.8, k) / seconds for k, seconds in enumerate(drafts_s, start=1))]
    if kind == "sampled":
        speeds.append(1 / sampled_s)
    assert engine.tokens / engine.seconds > 0.93 * max(speeds)


def test_plain_steps_that_become_slow_let_the_others_in() -> None:
    factors = {**AS_EXPECTED, "drafts": 3.0}
    engine = engine_after(500, factors=factors, acceptance=0.8, can_be_sampled=False)
    assert engine.taken["plain"] > 400
    factors["drafts"] = 1.0
    engine.run(1000)
    engine.taken.clear()
    engine.run(500)
    assert engine.taken["drafts"] > 400


def test_what_is_slow_for_many_requests_stays_fast_for_one() -> None:
    factors = dict(AS_EXPECTED)
    engine = engine_after(300, factors=factors, acceptance=0.8, can_be_sampled=False)
    for _ in range(6):
        for num_requests, factor in ((16, 3.0), (1, 1.0)):
            factors["drafts"] = factor
            engine.resize(num_requests)
            engine.run(300)
    for num_requests, factor, kind in ((16, 3.0, "plain"), (1, 1.0, "drafts")):
        factors["drafts"] = factor
        engine.resize(num_requests)
        engine.taken.clear()
        engine.run(40)
        assert engine.taken[kind] > 36, "nothing is to be learned again when the batch changes"
