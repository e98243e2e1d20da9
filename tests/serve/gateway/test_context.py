"""How long a context the gateway says and plans with, where engines were started with another than their members have."""

from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from chorus.population.manifest import Population
from chorus.serve.gateway.app import create_app
from chorus.serve.gateway.gateway import Gateway
from chorus.serve.gateway.settings import Settings
from tests.live import serving, wait_for
from tests.serve.gateway.conftest import gateway_before
from tests.serve.gateway.scripted import WHOLE, ScriptedEngine


def starting_with(length: Any) -> ScriptedEngine:
    engine = ScriptedEngine([WHOLE])
    engine.content_type = "application/json"
    engine.models = [{"id": "tiny", "max_model_len": length}]
    return engine


def shown(url: str) -> set[int]:
    return {card["max_model_len"] for card in httpx.get(f"{url}/v1/models").json()["data"]}


def test_models_and_the_planner_use_the_context_that_the_engine_was_started_with(
    tiny: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny.context_length == 256
    with gateway_before(starting_with(64), tiny) as pair:
        wait_for("its length", lambda: pair.gateway.pool.context_length, timeout_s=5)
        assert shown(pair.url) == {64}
        seen = []
        note_request = pair.gateway.admission._caps.note_request
        monkeypatch.setattr(
            pair.gateway.admission._caps,
            "note_request",
            lambda job, engine: (seen.append(job.size.max_tokens), note_request(job, engine)),
        )
        body = {"messages": [{"role": "user", "content": "a"}]}
        httpx.post(f"{pair.url}/v1/chat/completions", json=body).raise_for_status()
        assert seen == [64]


@pytest.mark.parametrize(
    "models", [[], None, 7, [{}], [{"max_model_len": None}], [{"max_model_len": "64"}], [{"max_model_len": -1}]]
)
def test_an_engine_that_does_not_say_has_its_members_context(tiny: Population, models: Any) -> None:
    engine = starting_with(64)
    engine.models = models
    with gateway_before(engine, tiny) as pair:
        assert pair.gateway.pool.context_length is None
        assert shown(pair.url) == {256}


def test_of_several_engines_the_shortest_context_counts(tiny: Population) -> None:
    with ExitStack() as stack:
        urls = tuple(stack.enter_context(serving(starting_with(length))).url for length in (64, 128, 4096))
        gateway = Gateway(Settings(population=tiny, engine=urls, calibrates=False, probe_interval_s=0.1))
        url = stack.enter_context(serving(create_app(gateway))).url
        wait_for("all", lambda: all(engine.context_length for engine in gateway.engines), timeout_s=5)
        assert shown(url) == {64}
        assert gateway.settings.population.context_length == 256
