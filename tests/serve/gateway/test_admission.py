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


class Harness:
    """An admission before one engine that is up and answers whenever the test says."""

    def __init__(self, population: Population, session: aiohttp.ClientSession, **limits: Any) -> None:
        self.population = population
        self.engine = Engine(session, url="http://x", is_supervised=False, probe_interval_s=1, probe_timeout_s=1)
        self.admission = Admission(Limits(**limits), self._engines)

    def _engines(self, call: Call, avoid: Container[Engine]) -> Sequence[Engine]:
        return [self.engine]

    def submit(self, tenant: Tenant = ANYONE, **fields: Any) -> "asyncio.Task[Grant]":
        import json

        body = json.dumps({"prompt": "a", "max_tokens": 11, **fields}).encode()
        call = read_call(body, "completion", self.population, default_tier(self.population), tenant.floor)
        tiers = tiers_between(self.population, call.floor, call.choice.tier)
        return asyncio.create_task(self.admission.admit(call, tenant, tiers, arrived_at=time.perf_counter()))


def run_scenario(population: Population, scenario: Callable[[Harness], Awaitable[None]], **limits: Any) -> None:
    async def run() -> None:
        async with aiohttp.ClientSession() as session:
            await scenario(Harness(population, session, **limits))

    asyncio.run(run())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_the_earliest_deadline_goes_first_and_those_without_go_last(tiny: Population) -> None:
    async def scenario(harness: Harness) -> None:
        first = await harness.submit()
        tasks = {name: harness.submit(**fields) for name, fields in
                {"none": {}, "late": {"latency_budget_ms": 20_000}, "soon": {"latency_budget_ms": 9_000}}.items()}  # fmt: skip
        await settle()
        order = []
        grant = first
        while tasks:
            harness.admission.release(grant)
            await settle()
            name = next(name for name, task in tasks.items() if task.done())
            grant = tasks.pop(name).result()
            order.append(name)
        harness.admission.release(grant)
        assert order == ["soon", "late", "none"]
        assert harness.admission.num_waiting == 0
        assert harness.engine.traffic.num_sequences == 0

    run_scenario(tiny, scenario, max_sequences=1)


def test_tenants_share_an_engine_by_their_shares_whatever_they_throw_at_it(tiny: Population) -> None:
    greedy, modest = Tenant(name="greedy"), Tenant(name="modest", share=2.0)

    async def scenario(harness: Harness) -> None:
        grant = await harness.submit()
        tasks = [(each.name, harness.submit(each, budget=1)) for each in [greedy] * 60 + [modest] * 30]
        await settle()
        served: Counter[str] = Counter()
        for _ in range(30):
            harness.admission.release(grant)
            await settle()
            name, task = next((name, task) for name, task in tasks if task.done())
            tasks.remove((name, task))
            grant = task.result()
            served[name] += 1
        assert served["modest"] == pytest.approx(20, abs=1)
        for _, task in tasks:
            task.cancel()

    run_scenario(tiny, scenario, max_sequences=1)


def test_a_full_queue_takes_the_place_from_whoever_fills_it(tiny: Population) -> None:
    async def scenario(harness: Harness) -> None:
        await harness.submit()
        crowd = [harness.submit(Tenant(name="crowd")) for _ in range(4)]
        await settle()
        with pytest.raises(ApiError) as refused:
            await harness.submit(Tenant(name="crowd"))
        assert refused.value.status == 429
        assert int(refused.value.headers["Retry-After"]) >= 1
        other = harness.submit(Tenant(name="other"))
        await settle()
        assert not other.done()
        assert [task.done() for task in crowd] == [False, False, False, True]
        with pytest.raises(ApiError):
            crowd[-1].result()
        for task in [*crowd[:-1], other]:
            task.cancel()

    run_scenario(tiny, scenario, max_sequences=1, max_queue=4)


def test_tiers_shrink_before_anybody_is_refused_but_not_below_floors_nor_promises(tiny: Population) -> None:
    floored = Tenant(name="floored", floor="standard")

    async def scenario(harness: Harness) -> None:
        filler = Tenant(name="filler")
        first = await harness.submit(filler)
        assert first.tier.name == "max"
        tasks = {
            "free": harness.submit(Tenant(name="a")),
            "promised": harness.submit(Tenant(name="b"), budget="max"),
            "tenant": harness.submit(floored),
            "floor": harness.submit(Tenant(name="c"), budget="max", min_budget=2),
        }
        filling = [harness.submit(filler) for _ in range(8)]  # who was served already, and comes last
        await settle()
        harness.admission.release(first)
        for _ in tasks:
            await settle()
            for grant in [task.result() for task in tasks.values() if task.done()]:
                harness.admission.release(grant)
        tiers = {name: task.result().tier.name for name, task in tasks.items()}
        assert tiers == {"free": "economy", "promised": "max", "tenant": "standard", "floor": "standard"}
        for task in filling:
            task.cancel()

    run_scenario(tiny, scenario, max_sequences=1, max_queue=12)


def test_who_waits_too_long_is_refused_not_forgotten(tiny: Population) -> None:
    async def scenario(harness: Harness) -> None:
        await harness.submit()
        with pytest.raises(ApiError) as refused:
            await harness.submit()
        assert (refused.value.status, refused.value.code) == (429, "overloaded")
        assert harness.admission.num_waiting == 0

    run_scenario(tiny, scenario, max_sequences=1, queue_timeout_s=0.2)


@pytest.mark.parametrize(("on_deadline", "status"), [("degrade", 429), ("truncate", 429), ("fail", 504)])
def test_a_deadline_that_passes_in_the_queue_is_answered_before_it_does(
    tiny: Population, on_deadline: str, status: int
) -> None:
    async def scenario(harness: Harness) -> None:
        harness.engine.model = known()
        await harness.submit()
        began_at = time.perf_counter()
        with pytest.raises(ApiError) as refused:
            await harness.submit(latency_budget_ms=1000, on_deadline=on_deadline)
        assert refused.value.status == status
        assert time.perf_counter() - began_at < 1.0  # an idle engine would need 0.13 s for it

    run_scenario(tiny, scenario, max_sequences=1)


def test_who_leaves_the_queue_leaves_no_trace(tiny: Population) -> None:
    async def scenario(harness: Harness) -> None:
        grant = await harness.submit()
        waiting = [harness.submit() for _ in range(3)]
        await settle()
        waiting[0].cancel()
        await settle()
        assert harness.admission.num_waiting == 2
        harness.admission.release(grant)
        waiting[1].cancel()  # in the moment in which it is let in
        await settle()
        harness.admission.release(await waiting[2])
        assert harness.engine.traffic.num_sequences == 0

    run_scenario(tiny, scenario, max_sequences=1)


def test_the_time_to_come_back_is_how_long_the_queue_takes(tiny: Population) -> None:
    async def scenario(harness: Harness) -> None:
        grant = await harness.submit()
        tasks = [harness.submit() for _ in range(20)]
        await settle()
        for task in tasks[:6]:
            await asyncio.sleep(0.2)
            harness.admission.release(grant)
            await settle()
            grant = task.result()
        assert harness.admission.num_waiting == 14
        assert 3 <= harness.admission.retry_after_s() <= 8  # 15 requests at 0.2 s each; a loaded machine takes longer
        for task in tasks:
            task.cancel()

    run_scenario(tiny, scenario, max_sequences=1)


def test_ten_times_too_much_gets_429_with_a_time_and_nothing_else(tiny: Population) -> None:
    engine = ScriptedEngine([0.1, WHOLE])
    engine.content_type = "application/json"
    with gateway_before(engine, tiny, limits=Limits(max_sequences=4, max_queue=8)) as pair:

        def post(idx: int) -> httpx.Response:
            return httpx.post(f"{pair.url}/v1/completions", json={"prompt": "a"}, timeout=60)

        with ThreadPoolExecutor(40) as threads:
            answers = list(threads.map(post, range(120)))
        assert {answer.status_code for answer in answers} == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                assert answer.json()["error"]["code"] == "overloaded"
        assert any(answer.json().get("population", {}).get("tier") == "economy" for answer in answers)
        assert post(0).status_code == 200
        metrics = httpx.get(f"{pair.url}/metrics").text
        assert "chorus_gateway_requests_waiting 0.0" in metrics
        assert 'chorus_gateway_engine_sequences{engine="' in metrics


def test_planning_beside_a_full_engine_is_quick_enough(tiny: Population) -> None:
    """Not a measurement: only that nobody made it quadratic."""

    async def scenario(harness: Harness) -> None:
        harness.engine.model = known()
        for _ in range(200):
            await harness.submit(latency_budget_ms=80_000_000)
        job = Job(tiers=tiny.tiers[::-1], size=read(tiny).size, finish_by=time.perf_counter() + 3600)
        began_at = time.process_time()
        place(
            job,
            harness.engine.traffic,
            harness.engine.model,
            now=time.perf_counter(),
            probability=0.9,
            max_sequences=999,
        )
        assert time.process_time() - began_at < 0.1

    run_scenario(tiny, scenario, max_sequences=999)


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
    async def scenario(harness: Harness) -> None:
        harness.engine.model = known(first_s=0.001, member_s=0.0002, row_s=0.00001)
        for idx in range(12):
            task = (
                harness.submit(latency_budget_ms=1000)
                if idx % 2
                else harness.submit(**{"latency_budget_ms": 1000, **others})
            )
            await settle()
            grant = await task
            if idx % 2:
                assert grant.in_flight.work.members == 4
            harness.admission.release(grant)

    run_scenario(tiny, scenario)


def test_where_only_prompts_are_scored_the_queue_goes_on(tiny: Population) -> None:
    async def scenario(harness: Harness) -> None:
        harness.engine.model = known(first_s=0.001, member_s=0.0002, row_s=0.00001)
        score = {"max_tokens": 0, "echo": True}
        first = await harness.submit(**score)
        second = harness.submit(**score, latency_budget_ms=5000)
        await settle()
        assert harness.admission.num_waiting == 1
        harness.admission.release(first)
        assert (await second).is_promised

    run_scenario(tiny, scenario, max_sequences=1)
