"""What answers of no given length are taken to need, and which tier they get for it."""

import asyncio
import statistics
from typing import Any

import pytest

from chorus.population.manifest import Population
from chorus.population.wire import EXPECTED_TOKENS_ARGUMENT
from chorus.serve.gateway.admission.admission import Limits
from chorus.serve.gateway.admission.lengths import PRIOR_TOKENS, AnswerLengths
from chorus.serve.gateway.request.keys import Tenant
from chorus.serve.gateway.request.size import Size
from tests.serve.gateway.conftest import Pair, known
from tests.serve.gateway.scripted import DONE, event
from tests.serve.gateway.test_deadlines import ask_chat
from tests.serve.gateway.virtual import Costs, Outcome, World, in_virtual_time

OPEN = Size(max_tokens=8192, is_open=True)
SLOW = Costs(step_s=0.01, member_s=0.02, row_s=0.001, prompt_row_s=0.0001)
"""A token of all four members takes a tenth of a second: thirty seconds hold 300 of them, and a context 8192."""


def learned(*lengths: int, tenant: str = "a") -> AnswerLengths:
    found = AnswerLengths()
    for length in lengths:
        found.observe(OPEN, tenant, length)
    return found


def test_without_observations_the_prior_length_is_used_up_to_the_context() -> None:
    assert AnswerLengths().planned(OPEN, "a").max_tokens == PRIOR_TOKENS
    assert AnswerLengths().planned(Size(max_tokens=128, is_open=True), "a").max_tokens == 128


def test_nine_of_ten_answers_stay_below_what_is_expected() -> None:
    assert learned(*range(100)).expected("a") == 90
    assert learned(*[20] * 95, *[8000] * 5).expected("a") == 20, "a few long ones change nothing"


def test_a_first_short_answer_is_not_yet_the_rule() -> None:
    assert learned(5).expected("a") == PRIOR_TOKENS
    assert learned(*[5] * 10).expected("a") == 5


def test_a_length_that_the_request_names_is_planned_with() -> None:
    size = Size(max_tokens=4096)
    lengths = learned(*[5] * 20)
    assert lengths.planned(size, "a") == size
    lengths.observe(size, "a", 4096)
    assert lengths.expected("a") == 5


def test_tenants_do_not_learn_from_each_other() -> None:
    lengths = learned(*[5] * 20, tenant="a")
    assert lengths.expected("b") == PRIOR_TOKENS


def test_answers_that_were_cut_do_not_make_the_expectation_shorter_and_shorter() -> None:
    lengths = learned(*[100] * 20)
    for _ in range(200):
        lengths.observe(OPEN, "a", 40, is_cut=True)
    assert lengths.expected("a") == 100


def test_only_recent_answers_count() -> None:
    assert learned(*[2000] * 300, *[50] * 200).expected("a") == 50


def members(
    monkeypatch: pytest.MonkeyPatch, population: Population, lengths: list[int], **request: Any
) -> list[Outcome]:
    """Open chats one after the other, with thirty seconds for each."""

    async def scenario() -> list[Outcome]:
        world = World(population, costs=SLOW, limits=Limits())
        working = world.working()
        await world.closed_loop(1, 30, budget_s=None, tier="max")
        await world.closed_loop(1, 30, budget_s=None, tier="economy")
        found = [await world.send(budget_s=30, max_tokens=length, is_open=True, **request) for length in lengths]
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
        return found

    found: list[Outcome] = in_virtual_time(monkeypatch, scenario())
    return found


def test_a_chat_with_thirty_seconds_is_answered_by_all_members_once_answers_are_known_to_be_short(
    tiny: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = tiny.model_copy(update={"context_length": 8192})
    found = members(monkeypatch, wide, [40] * 30)
    assert all(each.is_in_time for each in found)
    assert found[0].members > 1, "the prior alone is better than the whole context"
    assert all(each.members == 4 for each in found[20:])


def test_a_chat_that_becomes_longer_than_expected_still_ends_in_time(
    tiny: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = tiny.model_copy(update={"context_length": 8192})
    found = members(monkeypatch, wide, [*[40] * 25, *[400] * 3])
    assert all(each.members == 4 for each in found[20:25])
    for each in found[25:]:
        assert each.is_in_time
        assert 1 < each.members < 4, "members left when it went beyond"


def test_a_tenant_of_long_answers_takes_no_members_from_others(
    tiny: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = tiny.model_copy(update={"context_length": 8192})

    async def scenario() -> float:
        world = World(wide, costs=SLOW, limits=Limits())
        working = world.working()
        await world.closed_loop(1, 30, budget_s=None, tier="max")
        await world.closed_loop(1, 30, budget_s=None, tier="economy")
        short, long = Tenant(name="short"), Tenant(name="long")
        for _ in range(15):
            await world.send(budget_s=30, max_tokens=40, is_open=True, tenant=short)
            await world.send(budget_s=30, max_tokens=2000, is_open=True, tenant=long)
        found = [await world.send(budget_s=30, max_tokens=40, is_open=True, tenant=short) for _ in range(5)]
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
        return statistics.fmean(each.members for each in found)

    assert in_virtual_time(monkeypatch, scenario()) == 4


def test_lengths_are_learned_from_answers_and_told_to_the_engine(pair: Pair) -> None:
    pair.gateway.engines[0].model = known()
    usage = {"prompt_tokens": 4, "total_tokens": 34, "completion_tokens": 30}
    whole = event("a", usage=usage)[6:-2]
    pair.engine.steps, pair.engine.content_type = [whole], "application/json"
    sent = []
    for _ in range(11):
        ask_chat(pair, latency_budget_ms=20_000)
        sent.append(pair.engine.bodies[-1]["vllm_xargs"][EXPECTED_TOKENS_ARGUMENT])
        assert "max_tokens" not in pair.engine.bodies[-1]
    assert (sent[0], sent[-1]) == (256, 30), "at first the whole of this small context"
    ask_chat(pair, latency_budget_ms=20_000, max_tokens=100)
    assert EXPECTED_TOKENS_ARGUMENT not in pair.engine.bodies[-1]["vllm_xargs"]
    ask_chat(pair)
    assert EXPECTED_TOKENS_ARGUMENT not in pair.engine.bodies[-1]["vllm_xargs"]


def test_streams_teach_lengths_too(pair: Pair) -> None:
    usage = {"prompt_tokens": 4, "total_tokens": 24, "completion_tokens": 20}
    pair.engine.steps = [event("a"), event("", choices=[], usage=usage), DONE]
    for _ in range(10):
        ask_chat(pair, stream=True)
    assert pair.gateway.admission.lengths.expected("anyone") == 20
