"""The queue before the engines: who goes first, who shrinks, who is turned away, and that everybody gets an answer."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import httpx
import pytest

from chorus.population.manifest import Population
from chorus.serve.gateway.admission.admission import Admission, Limits
from chorus.serve.gateway.admission.placement import Job, place
from chorus.serve.gateway.admission.queue import Grant
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.request.call import Call, read_call
from chorus.serve.gateway.request.errors import ApiError
from chorus.serve.gateway.request.keys import ANYONE, Tenant
from chorus.serve.gateway.request.tiers import default_tier, tiers_between
from tests.serve.gateway.conftest import gateway_before, known
from tests.serve.gateway.scripted import WHOLE, ScriptedEngine


class Door:
    """An admission before one engine that is up and answers whenever the test says."""

    def __init__(self, population: Population, session: aiohttp.ClientSession, **limits: Any) -> None:
        self.population = population
        self.engine = Engine(session, url="http://x", is_supervised=False, probe_interval_s=1, probe_timeout_s=1)
        self.admission = Admission(Limits(**limits), self._engines)

    def _engines(self, call: Call, avoid: Container[Engine]) -> Sequence[Engine]:
        return [self.engine]

    def ask(self, tenant: Tenant = ANYONE, **fields: Any) -> "asyncio.Task[Grant]":
        import json

        body = json.dumps({"prompt": "a", "max_tokens": 11, **fields}).encode()
        call = read_call(body, "completion", self.population, default_tier(self.population), tenant.floor)
        tiers = tiers_between(self.population, call.floor, call.choice.tier)
        return asyncio.create_task(self.admission.admit(call, tenant, tiers, arrived_at=time.perf_counter()))


def at_the_door(population: Population, story: Callable[[Door], Awaitable[None]], **limits: Any) -> None:
    async def tell() -> None:
        async with aiohttp.ClientSession() as session:
            await story(Door(population, session, **limits))

    asyncio.run(tell())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_the_earliest_deadline_goes_first_and_those_without_go_last(tiny: Population) -> None:
    async def story(door: Door) -> None:
        first = await door.ask()
        asks = {name: door.ask(**fields) for name, fields in
                {"none": {}, "late": {"latency_budget_ms": 20_000}, "soon": {"latency_budget_ms": 9_000}}.items()}  # fmt: skip
        await settle()
        order = []
        grant = first
        while asks:
            door.admission.release(grant)
            await settle()
            name = next(name for name, ask in asks.items() if ask.done())
            grant = asks.pop(name).result()
            order.append(name)
        door.admission.release(grant)
        assert order == ["soon", "late", "none"]
        assert door.admission.num_waiting == 0
        assert door.engine.traffic.num_sequences == 0

    at_the_door(tiny, story, max_sequences=1)


def test_tenants_share_an_engine_by_their_shares_whatever_they_throw_at_it(tiny: Population) -> None:
    greedy, modest = Tenant(name="greedy"), Tenant(name="modest", share=2.0)

    async def story(door: Door) -> None:
        grant = await door.ask()
        asks = [(each.name, door.ask(each, budget=1)) for each in [greedy] * 60 + [modest] * 30]
        await settle()
        served: Counter[str] = Counter()
        for _ in range(30):
            door.admission.release(grant)
            await settle()
            name, ask = next((name, ask) for name, ask in asks if ask.done())
            asks.remove((name, ask))
            grant = ask.result()
            served[name] += 1
        assert served["modest"] == pytest.approx(20, abs=1)
        for _, ask in asks:
            ask.cancel()

    at_the_door(tiny, story, max_sequences=1)


def test_a_full_queue_takes_the_place_from_whoever_fills_it(tiny: Population) -> None:
    async def story(door: Door) -> None:
        await door.ask()
        crowd = [door.ask(Tenant(name="crowd")) for _ in range(4)]
        await settle()
        with pytest.raises(ApiError) as refused:
            await door.ask(Tenant(name="crowd"))
        assert refused.value.status == 429
        assert int(refused.value.headers["Retry-After"]) >= 1
        other = door.ask(Tenant(name="other"))
        await settle()
        assert not other.done()
        assert [ask.done() for ask in crowd] == [False, False, False, True]
        with pytest.raises(ApiError):
            crowd[-1].result()
        for ask in [*crowd[:-1], other]:
            ask.cancel()

    at_the_door(tiny, story, max_sequences=1, max_queue=4)


def test_tiers_shrink_before_anybody_is_refused_but_not_below_floors_nor_promises(tiny: Population) -> None:
    floored = Tenant(name="floored", floor="standard")

    async def story(door: Door) -> None:
        filler = Tenant(name="filler")
        first = await door.ask(filler)
        assert first.tier.name == "max"
        asks = {
            "free": door.ask(Tenant(name="a")),
            "promised": door.ask(Tenant(name="b"), budget="max"),
            "tenant": door.ask(floored),
            "floor": door.ask(Tenant(name="c"), budget="max", min_budget=2),
        }
        filling = [door.ask(filler) for _ in range(8)]  # who was served already, and comes last
        await settle()
        door.admission.release(first)
        for _ in asks:
            await settle()
            for grant in [ask.result() for ask in asks.values() if ask.done()]:
                door.admission.release(grant)
        tiers = {name: ask.result().tier.name for name, ask in asks.items()}
        assert tiers == {"free": "economy", "promised": "max", "tenant": "standard", "floor": "standard"}
        for ask in filling:
            ask.cancel()

    at_the_door(tiny, story, max_sequences=1, max_queue=12)


def test_who_waits_too_long_is_refused_not_forgotten(tiny: Population) -> None:
    async def story(door: Door) -> None:
        await door.ask()
        with pytest.raises(ApiError) as refused:
            await door.ask()
        assert (refused.value.status, refused.value.code) == (429, "overloaded")
        assert door.admission.num_waiting == 0

    at_the_door(tiny, story, max_sequences=1, queue_timeout_s=0.2)


@pytest.mark.parametrize(("on_deadline", "status"), [("degrade", 429), ("truncate", 429), ("fail", 504)])
def test_a_deadline_that_passes_in_the_queue_is_answered_before_it_does(
    tiny: Population, on_deadline: str, status: int
) -> None:
    async def story(door: Door) -> None:
        door.engine.model = known()
        await door.ask()
        began_at = time.perf_counter()
        with pytest.raises(ApiError) as refused:
            await door.ask(latency_budget_ms=1000, on_deadline=on_deadline)
        assert refused.value.status == status
        assert time.perf_counter() - began_at < 1.0  # an idle engine would need 0.13 s for it

    at_the_door(tiny, story, max_sequences=1)


def test_who_leaves_the_queue_leaves_no_trace(tiny: Population) -> None:
    async def story(door: Door) -> None:
        grant = await door.ask()
        waiting = [door.ask() for _ in range(3)]
        await settle()
        waiting[0].cancel()
        await settle()
        assert door.admission.num_waiting == 2
        door.admission.release(grant)
        waiting[1].cancel()  # in the moment in which it is let in
        await settle()
        door.admission.release(await waiting[2])
        assert door.engine.traffic.num_sequences == 0

    at_the_door(tiny, story, max_sequences=1)


def test_the_time_to_come_back_is_how_long_the_queue_takes(tiny: Population) -> None:
    async def story(door: Door) -> None:
        grant = await door.ask()
        asks = [door.ask() for _ in range(20)]
        await settle()
        for ask in asks[:6]:
            await asyncio.sleep(0.2)
            door.admission.release(grant)
            await settle()
            grant = ask.result()
        assert door.admission.num_waiting == 14
        assert 3 <= door.admission.retry_after_s() <= 8  # 15 requests at 0.2 s each; a loaded machine takes longer
        for ask in asks:
            ask.cancel()

    at_the_door(tiny, story, max_sequences=1)


def test_ten_times_too_much_gets_429_with_a_time_and_nothing_else(tiny: Population) -> None:
    engine = ScriptedEngine([0.1, WHOLE])
    engine.content_type = "application/json"
    with gateway_before(engine, tiny, limits=Limits(max_sequences=4, max_queue=8)) as pair:

        def ask(idx: int) -> httpx.Response:
            return httpx.post(f"{pair.url}/v1/completions", json={"prompt": "a"}, timeout=60)

        with ThreadPoolExecutor(40) as threads:
            answers = list(threads.map(ask, range(120)))
        assert {answer.status_code for answer in answers} == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                assert answer.json()["error"]["code"] == "overloaded"
        assert any(answer.json().get("population", {}).get("tier") == "economy" for answer in answers)
        assert ask(0).status_code == 200
        metrics = httpx.get(f"{pair.url}/metrics").text
        assert "chorus_gateway_requests_waiting 0.0" in metrics
        assert 'chorus_gateway_engine_sequences{engine="' in metrics


def test_planning_beside_a_full_engine_is_quick_enough(tiny: Population) -> None:
    """Not a measurement: only that nobody made it quadratic."""

    async def story(door: Door) -> None:
        door.engine.model = known()
        for _ in range(200):
            await door.ask(latency_budget_ms=80_000_000)
        job = Job(tiers=tiny.tiers[::-1], size=read(tiny).size, finish_by=time.perf_counter() + 3600)
        began_at = time.process_time()
        place(job, door.engine.traffic, door.engine.model, now=time.perf_counter(), probability=0.9, max_sequences=999)
        assert time.process_time() - began_at < 0.1

    at_the_door(tiny, story, max_sequences=999)


def read(population: Population) -> Call:
    return read_call(b'{"prompt": "a"}', "completion", population, default_tier(population))


@pytest.mark.parametrize(
    "others",
    [
        {"latency_budget_ms": 1},  # hopeless: served at their floor whatever is decided
        {"latency_budget_ms": 86_400_000, "max_tokens": 4000},  # nobody waits for as long as that
        {"max_tokens": 0, "echo": True},  # prompts to be scored
    ],
)
def test_odd_requests_do_not_change_what_others_get(tiny: Population, others: dict[str, Any]) -> None:
    async def story(door: Door) -> None:
        door.engine.model = known(first_s=0.001, member_s=0.0002, row_s=0.00001)
        for idx in range(12):
            task = door.ask(latency_budget_ms=1000) if idx % 2 else door.ask(**{"latency_budget_ms": 1000, **others})
            await settle()
            grant = await task
            if idx % 2:
                assert grant.in_flight.work.members == 4
            door.admission.release(grant)

    at_the_door(tiny, story)


def test_where_only_prompts_are_scored_the_queue_goes_on(tiny: Population) -> None:
    async def story(door: Door) -> None:
        door.engine.model = known(first_s=0.001, member_s=0.0002, row_s=0.00001)
        score = {"max_tokens": 0, "echo": True}
        first = await door.ask(**score)
        second = door.ask(**score, latency_budget_ms=5000)
        await settle()
        assert door.admission.num_waiting == 1
        door.admission.release(first)
        assert (await second).is_promised

    at_the_door(tiny, story, max_sequences=1)
