"""Several engines: which of them a request goes to, what happens when one fails, freezes or goes, and how a gateway stops."""

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from chorus.population.manifest import Population
from chorus.serve.gateway.app import create_app
from chorus.serve.gateway.engines.breaker import Breaker
from chorus.serve.gateway.engines.discovery import Discovery
from chorus.serve.gateway.gateway import Gateway
from chorus.serve.gateway.settings import Settings
from chorus.serve.gateway.shared.store import MemoryStore
from tests.live import chorus_serve, serving, wait_for
from tests.serve.gateway.scripted import DONE, USAGE, WHOLE, ScriptedEngine, event

BODY = {"prompt": "a", "max_tokens": 3}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A gateway before two engines."""

    url: str
    gateway: Gateway
    engines: tuple[ScriptedEngine, ScriptedEngine]

    def post(self, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json={**BODY, **fields}, timeout=20)

    def counts(self) -> list[int]:
        return [len(engine.bodies) for engine in self.engines]

    def busy(self) -> tuple[ScriptedEngine, ScriptedEngine]:
        """The engine that got requests, and the other."""
        first, second = self.engines
        return (first, second) if len(first.bodies) > len(second.bodies) else (second, first)


@contextmanager
def cluster_of_two(tiny: Population, **options: Any) -> Iterator[Cluster]:
    engines = ScriptedEngine([WHOLE]), ScriptedEngine([WHOLE])
    with ExitStack() as stack:
        urls = tuple(stack.enter_context(serving(engine)).url for engine in engines)
        for engine in engines:
            engine.content_type = "application/json"
        options = {"probe_interval_s": 0.1, "calibrates": False, **options}
        gateway = Gateway(Settings(population=tiny, engine=urls, **options))
        server = stack.enter_context(serving(create_app(gateway)))
        wait_for("both", lambda: len([e for e in gateway.engines if e.is_up]) == 2, timeout_s=10)
        yield Cluster(url=server.url, gateway=gateway, engines=engines)


@pytest.fixture
def cluster(tiny: Population) -> Iterator[Cluster]:
    with cluster_of_two(tiny) as running:
        yield running


def test_requests_side_by_side_are_spread_over_the_engines(cluster: Cluster) -> None:
    for engine in cluster.engines:
        engine.steps = [0.5, WHOLE]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda idx: cluster.post(prompt=f"p{idx}"), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert min(cluster.counts()) >= 2


def test_what_begins_alike_goes_where_it_went_before(cluster: Cluster) -> None:
    for idx in range(6):
        cluster.post(prompt="the same long beginning " * 20 + str(idx))
    assert sorted(cluster.counts()) == [0, 6]


def test_a_request_that_was_not_begun_is_tried_on_the_other_engine(cluster: Cluster) -> None:
    cluster.post()
    known, other = cluster.busy()
    known.break_before_answer = 1
    assert cluster.post().status_code == 200
    assert (len(known.bodies), len(other.bodies)) == (2, 1)
    known.break_before_answer = other.break_before_answer = 1
    refused = cluster.post()
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert sum(cluster.counts()) == 5  # one try each, and no third


def test_a_stream_that_has_begun_is_never_begun_again(cluster: Cluster) -> None:
    for engine in cluster.engines:
        engine.steps, engine.content_type, engine.then_break = [event("a")], "text/event-stream", True
    answer = cluster.post(stream=True)
    assert '"code":"stream_broken"' in answer.text
    assert sum(cluster.counts()) == 1


def test_an_engine_that_keeps_failing_gets_nothing_for_a_while(cluster: Cluster) -> None:
    cluster.post()
    bad, good = cluster.busy()
    bad.status, bad.steps = 500, [b"oops"]
    codes = [cluster.post().status_code for _ in range(12)]
    assert codes.count(500) in {3, 4}  # until the circuit opens; one more if the pause was over meanwhile
    assert len(good.bodies) >= 7
    assert 'circuit_open{engine="' in httpx.get(f"{cluster.url}/metrics").text
    bad.status, bad.steps = 200, [WHOLE]
    before = len(bad.bodies)
    prompts = (str(idx) for idx in range(10_000))
    wait_for(
        "another try",
        lambda: cluster.post(prompt=next(prompts)).status_code == 200 and len(bad.bodies) > before + 1,
        timeout_s=15,
    )


def test_the_breaker_opens_after_failures_in_a_row_and_closes_after_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("chorus.serve.gateway.engines.breaker.time.monotonic", lambda: now[0])
    breaker = Breaker()
    for _ in range(2):
        breaker.note_failure()
        assert breaker.allows_request()
    breaker.note_failure()
    assert not breaker.allows_request()
    now[0] = 1.0
    assert breaker.allows_request()
    breaker.note_attempt()
    assert not breaker.allows_request()  # one tries, the others wait for how it fares
    breaker.note_failure()
    now[0] = 2.5
    assert not breaker.allows_request()  # the pause has doubled
    now[0] = 3.0
    assert breaker.allows_request()
    breaker.note_success()
    assert breaker.is_closed


def test_an_engine_that_freezes_is_left_and_its_streams_end_loudly(tiny: Population) -> None:
    with cluster_of_two(tiny, probe_timeout_s=0.5, stall_timeout_s=60.0) as cluster:
        for engine in cluster.engines:
            engine.steps, engine.content_type = [event("a"), 30.0], "text/event-stream"
        with httpx.stream("POST", f"{cluster.url}/v1/completions", json={**BODY, "stream": True}, timeout=20) as stream:
            parts = stream.iter_text()
            text = next(parts)
            frozen, other = cluster.busy()
            other.steps = [event("b"), USAGE, DONE]
            frozen.is_frozen = True
            text += "".join(parts)
        assert '"code":"stream_broken"' in text
        assert cluster.post(stream=True).text.endswith("[DONE]\n\n")
        frozen.is_frozen = False
        wait_for("both again", lambda: all(engine.is_up for engine in cluster.gateway.engines), timeout_s=10)


def test_what_a_frozen_engine_was_asked_is_asked_elsewhere_as_soon_as_it_is_given_up(tiny: Population) -> None:
    probe_timeout_s = 2.0
    with cluster_of_two(tiny, probe_timeout_s=probe_timeout_s, stall_timeout_s=60.0) as cluster:
        cluster.post()
        frozen, other = cluster.busy()
        frozen.is_frozen = True
        asked_at = time.monotonic()
        assert cluster.post(max_tokens=5).status_code == 200
        assert other.bodies[-1]["max_tokens"] == 5
        assert time.monotonic() - asked_at < 2 * probe_timeout_s, "it was looked at once more, in vain"
        frozen.is_frozen = False


def test_an_engine_that_says_it_is_well_and_computes_nothing_is_left_until_it_works_again(tiny: Population) -> None:
    with cluster_of_two(tiny, probe_timeout_s=0.5, stall_timeout_s=1.0) as cluster:
        cluster.post()
        stuck, other = cluster.busy()
        stuck.is_stuck = True
        assert cluster.post(max_tokens=5).status_code == 200  # whole, tried on the other engine
        assert other.bodies[-1]["max_tokens"] == 5
        assert sum(engine.is_up for engine in cluster.gateway.engines) == 1
        stuck.is_stuck = False
        wait_for("both again", lambda: all(engine.is_up for engine in cluster.gateway.engines), timeout_s=10)


def test_an_engine_that_computes_for_long_in_silence_is_not_left(tiny: Population) -> None:
    with cluster_of_two(tiny, stall_timeout_s=0.6) as cluster:
        for engine in cluster.engines:
            engine.steps = [2.5, WHOLE]
        counting = threading.Event()

        def count() -> None:
            while not counting.wait(0.05):
                for engine in cluster.engines:
                    engine.num_tokens += 1

        thread = threading.Thread(target=count)
        thread.start()
        try:
            assert cluster.post().status_code == 200
        finally:
            counting.set()
            thread.join()
        assert sum(cluster.counts()) == 1


def test_a_stream_that_stalls_ends_loudly(tiny: Population) -> None:
    with cluster_of_two(tiny, stall_timeout_s=0.5) as cluster:
        for engine in cluster.engines:
            engine.steps, engine.content_type = [event("a"), 30.0], "text/event-stream"
        assert "sent nothing for too long" in cluster.post(stream=True).text


def test_answers_are_never_mixed_up_between_requests(cluster: Cluster) -> None:
    for engine in cluster.engines:
        engine.echo = True

    def post(idx: int) -> tuple[str, str, str]:
        name = f"prompt-{idx}"
        answer = cluster.post(prompt=name, stream=idx % 2 == 0)
        return name, answer.text, answer.headers["x-request-id"]

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(post, range(120)))
    for name, text, _ in answers:
        assert f'"text":"{name}"' in text
    assert len({request_id for *_, request_id in answers}) == len(answers)


def find(*sources: str) -> list[str]:
    return asyncio.run(Discovery(sources, MemoryStore()).find())


def test_engines_are_found_behind_a_name() -> None:
    found = find("dns+http://localhost:1234", "http://other:1/")
    assert "http://127.0.0.1:1234" in found
    assert found[-1] == "http://other:1"


NAMELESS = ("no-such-name.invalid", "a" * 64, "a..b", "\u00e4" * 300, "x:99999999")


@pytest.mark.parametrize("name", NAMELESS)
def test_a_name_that_cannot_be_resolved_holds_up_no_other_source(name: str) -> None:
    assert find(f"dns+http://{name}", "http://other:1") == ["http://other:1"]


def test_engines_stay_known_while_their_name_cannot_be_resolved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[list[str] | Exception] = [["http://a:1"], OSError("no DNS"), TimeoutError(), UnicodeError(), []]

    async def resolve(url: str) -> list[str]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("chorus.serve.gateway.engines.discovery._resolve", resolve)

    async def looks() -> list[list[str]]:
        discovery = Discovery(("dns+http://engines:1",), MemoryStore())
        return [await discovery.find() for _ in range(5)]

    assert asyncio.run(looks()) == [["http://a:1"]] * 4 + [[]]
    assert len([record for record in caplog.records if "resolve" in record.message]) == 2  # its loss and its return


def test_engines_that_come_and_go_are_followed(tiny: Population, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[str] = []

    async def resolve(url: str) -> list[str]:
        return list(known)

    monkeypatch.setattr("chorus.serve.gateway.engines.discovery._resolve", resolve)
    first, second = ScriptedEngine([WHOLE]), ScriptedEngine([WHOLE])
    first.content_type = second.content_type = "application/json"
    options: dict[str, Any] = {"discovery_interval_s": 0.1, "probe_interval_s": 0.1, "calibrates": False}
    gateway = Gateway(Settings(population=tiny, engine="dns+http://engines:1", **options))
    with serving(first) as one, serving(second) as two, serving(create_app(gateway)) as server:
        url = f"{server.url}/v1/completions"
        assert httpx.post(url, json=BODY).status_code == 503
        known.append(one.url)
        wait_for("the first", lambda: httpx.post(url, json=BODY).status_code == 200, timeout_s=10)
        known[:] = [two.url]
        wait_for("the second", lambda: [e.url for e in gateway.engines if e.is_up] == [two.url], timeout_s=10)
        assert httpx.post(url, json=BODY).status_code == 200
        assert len(second.bodies) == 1


def test_told_to_stop_it_turns_red_serves_on_for_a_while_finishes_and_ends(
    tiny_population: Path, tmp_path: Path
) -> None:
    engine = ScriptedEngine([event("a"), *([0.1, event("b")] * 40), USAGE, DONE])
    with serving(engine) as behind:
        arguments = ("--engine", behind.url, "--drain-delay", "3", "--drain-timeout", "30")
        with chorus_serve(tiny_population, tmp_path / "output", *arguments) as server:
            server.wait_until_ready(60)
            texts: list[str] = []

            def stream() -> None:
                body = {**BODY, "stream": True}
                texts.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).text)

            threads = [threading.Thread(target=stream) for _ in range(3)]
            for thread in threads:
                thread.start()
            wait_for(
                "all to run", lambda: len([b for b in engine.bodies if b.get("max_tokens") == 3]) == 3, timeout_s=20
            )
            server.process.send_signal(signal.SIGTERM)
            wait_for("red", lambda: not server.is_ready(), timeout_s=3)
            late = httpx.post(f"{server.url}/v1/completions", json={**BODY, "stream": True}, timeout=60)
            assert late.text.endswith("[DONE]\n\n")
            assert late.headers["connection"] == "close"
            for thread in threads:
                thread.join(60)
            assert [text.endswith("[DONE]\n\n") for text in texts] == [True] * 3
            assert server.process.wait(40) == 0
            assert "Traceback" not in server.output


def test_a_slow_reader_gets_all_of_it_and_teaches_the_model_nothing(cluster: Cluster) -> None:
    long = [event("x" * 4096) for _ in range(3000)]
    for engine in cluster.engines:
        engine.steps, engine.content_type = [*long, USAGE, DONE], "text/event-stream"
    length, before = 0, sum(engine.model.count for engine in cluster.gateway.engines)
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json={**BODY, "stream": True}, timeout=60) as stream:
        time.sleep(0.5)
        for part in stream.iter_bytes():
            length += len(part)
    assert length > 3000 * 4096
    assert sum(engine.model.count for engine in cluster.gateway.engines) == before
