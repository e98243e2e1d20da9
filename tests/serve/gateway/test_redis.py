"""What replicas share in a real Redis, and what becomes of it when Redis goes away and comes back."""

import asyncio
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from chorus.population import manifest
from chorus.population.live import LiveManifest
from chorus.population.manifest import Population
from chorus.serve.gateway.app import create_app
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.latency import LatencyModel
from chorus.serve.gateway.gateway import Gateway
from chorus.serve.gateway.request.keys import Keys
from chorus.serve.gateway.settings import Settings
from chorus.serve.gateway.shared.redis_store import RedisStore
from chorus.serve.gateway.shared.store import Bucket, MemoryStore
from chorus.serve.gateway.sync import _sync_prior, seed
from tests.live import Served, free_port, serving, wait_for
from tests.serve.gateway.conftest import known
from tests.serve.gateway.scripted import WHOLE, ScriptedEngine
from tests.serve.gateway.test_keys import ALICE, entry, text


class RedisServer:
    """A redis-server of our own, which a test may kill, freeze and start again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._port = free_port()
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, empty."""
        program = shutil.which("redis-server")
        assert program, "redis-server is missing: `make test` installs it, or apt-get install redis-server"
        options = ["--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._directory)]
        self.process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)

        def answers() -> bool:
            return subprocess.run(
                ["redis-cli", "-p", str(self._port), "ping"], capture_output=True, check=False
            ).stdout.startswith(b"PONG")

        wait_for("redis", answers, timeout_s=20)

    def kill(self) -> None:
        """End it without a word."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


PATIENT_S = 20.0
"""A timeout that Redis meets on a busy machine too."""


def in_redis(redis: RedisServer, scenario: Any, name: str = "tiny", *, timeout_s: float = PATIENT_S) -> Any:
    async def run() -> Any:
        store = RedisStore(redis.url, name, timeout_s=timeout_s)
        try:
            return await scenario(store)
        finally:
            await store.close()

    return asyncio.run(run())


BUCKET = Bucket(name="b", rate_per_s=0.01, burst=10)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.floats(0.5, 12), st.booleans()), max_size=12), st.integers())
def test_buckets_in_redis_and_in_memory_say_the_same(
    redis: RedisServer, steps: list[tuple[float, bool]], salt: int
) -> None:
    bucket = Bucket(name=f"b{salt}-{time.monotonic_ns()}", rate_per_s=0.01, burst=10)

    async def scenario(store: RedisStore) -> None:
        memory = MemoryStore()
        for amount, forced in steps:
            if forced:
                await store.settle(bucket, amount - 6)
                await memory.settle(bucket, amount - 6)
            else:
                assert await store.take(bucket, amount) == pytest.approx(await memory.take(bucket, amount), abs=5)
        assert store.is_up

    in_redis(redis, scenario)


def test_gateways_that_take_at_once_never_take_more_than_there_is(redis: RedisServer) -> None:
    async def scenario(store: RedisStore) -> int:
        bucket = Bucket(name="at-once", rate_per_s=0.01, burst=10)
        others = [RedisStore(redis.url, "tiny", timeout_s=PATIENT_S) for _ in range(4)]
        waits = await asyncio.gather(*(each.take(bucket, 1.0) for each in others for _ in range(25)))
        for each in others:
            await each.close()
        return waits.count(0.0)

    assert in_redis(redis, scenario) == 10


def test_without_redis_a_quota_is_the_gateways_share_and_with_it_again_the_whole(redis: RedisServer) -> None:
    async def scenario(store: RedisStore) -> None:
        others = [RedisStore(redis.url, "tiny", timeout_s=PATIENT_S) for _ in range(2)]
        keeping = [asyncio.create_task(each.run()) for each in [*others, store]]
        await asyncio.sleep(0.5)
        for task in keeping:
            task.cancel()
        await asyncio.gather(*keeping, return_exceptions=True)
        keeper = asyncio.create_task(store.run())
        await asyncio.sleep(0.5)
        redis.kill()
        bucket = Bucket(name="c", rate_per_s=0.01, burst=9)
        waits = [await store.take(bucket, 1.0) for _ in range(9)]
        assert waits.count(0.0) == 3
        assert not store.is_up
        redis.start()
        deadline = time.monotonic() + 20
        while not store.is_up and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        assert [await store.take(bucket, 1.0) for _ in range(9)].count(0.0) == 9
        keeper.cancel()
        for each in others:
            await each.close()

    in_redis(redis, scenario)


@pytest.mark.parametrize("level", ["nan", "inf", "-inf", "abc", "1e308", "-1e308", "0x10"])
@pytest.mark.parametrize("at", ["nan", "inf", "-1e308", "1e308", "1"])
def test_a_bucket_with_garbage_in_it_counts_as_full(redis: RedisServer, level: str, at: str) -> None:
    async def scenario(store: RedisStore) -> None:
        bucket = Bucket(name="g", rate_per_s=0.01, burst=3)
        await store._redis.hset("chorus:tiny:quota:g", mapping={"level": level, "at": at})
        waits = [await store.take(bucket, 1.0) for _ in range(4)]
        assert waits[:3] == [0.0] * 3
        assert 90 < waits[3] <= 100
        assert store.is_up
        await store._redis.set("chorus:tiny:quota:g", "a text")
        assert await store.take(bucket, 1.0) == 0.0
        assert store.is_up

    in_redis(redis, scenario)


def test_engines_are_known_on_while_redis_is_away_and_until_they_had_time_to_announce_themselves(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chorus.serve.gateway.shared.redis_store._TTL_S", 3.0)

    async def scenario(store: RedisStore) -> None:
        await store.announce("http://e:80")
        assert await store.engines() == ["http://e:80"]
        redis.kill()
        await asyncio.sleep(3.5)
        assert await store.engines() == ["http://e:80"]
        redis.start()  # empty
        assert await store.engines() == ["http://e:80"]
        await asyncio.sleep(3.5)
        assert await store.engines() == []

    in_redis(redis, scenario)


def test_a_frozen_redis_holds_nothing_up_for_long(redis: RedisServer) -> None:
    async def scenario(store: RedisStore) -> None:
        await store.take(BUCKET, 1.0)
        assert redis.process is not None
        redis.process.send_signal(signal.SIGSTOP)
        began_at = time.monotonic()
        for _ in range(20):
            await store.take(BUCKET, 0.1)
        assert time.monotonic() - began_at < 10
        redis.process.send_signal(signal.SIGCONT)

    in_redis(redis, scenario, timeout_s=0.5)


def test_what_one_gateway_learned_another_begins_with(redis: RedisServer) -> None:
    async def scenario(store: RedisStore) -> None:
        model = known()
        await store.save_model("http://e", model.state())
        found = await store.load_model("http://e")
        assert found is not None
        other = LatencyModel()
        other.restore(found)
        assert other.is_seeded
        assert await store.load_model("http://f") is None
        await store.announce("http://e:80")
        assert await store.engines() == ["http://e:80"]

    in_redis(redis, scenario)


@contextmanager
def gateway(tiny: Population, redis: RedisServer, **options: Any) -> Iterator[tuple[Served, Gateway]]:
    options = {"probe_interval_s": 0.1, "discovery_interval_s": 0.2, "calibrates": False, **options}
    made = Gateway(Settings(population=tiny, redis=redis.url, **options))
    with serving(create_app(made)) as server:
        yield server, made


def post(server: Served, **fields: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {ALICE}"}
    return httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", **fields}, headers=headers, timeout=20)


def shows_redis(server: Served, *, up: bool) -> bool:
    return f"chorus_gateway_redis_up {float(up)}" in httpx.get(f"{server.url}/metrics").text


def answering() -> ScriptedEngine:
    engine = ScriptedEngine([WHOLE])
    engine.content_type = "application/json"
    return engine


def test_two_gateways_keep_one_quota_and_survive_the_loss_of_redis(tiny: Population, redis: RedisServer) -> None:
    keys = text(entry("alice", ALICE, tokens_per_min=40))
    with serving(answering()) as engine:
        options = {"engine": engine.url, "keys": Keys(text=keys)}
        with gateway(tiny, redis, **options) as (one, first), gateway(tiny, redis, **options) as (two, second):
            wait_for("both", lambda: first.pool.is_ready and second.pool.is_ready, timeout_s=10)
            codes = [post(server, max_tokens=18).status_code for server in (one, two, one, two, one, two)]
            assert codes[:2] == [200, 200]
            assert 429 in codes  # 7 tokens each, 19 asked: the fifth finds too few
            assert shows_redis(one, up=True)
            redis.kill()
            assert post(one, max_tokens=5).status_code == 200
            assert httpx.get(f"{one.url}/ready").status_code == 200
            assert shows_redis(one, up=False)
            redis.start()
            wait_for("Redis to be back", lambda: shows_redis(one, up=True), timeout_s=20)
            assert post(two, max_tokens=5).status_code == 200


def test_engines_announced_in_redis_are_found(tiny: Population, redis: RedisServer) -> None:
    with serving(answering()) as engine, gateway(tiny, redis, engine="redis") as (server, _):
        assert post(server).status_code == 503
        in_redis(redis, lambda store: store.announce(engine.url))
        wait_for("the engine", lambda: post(server).status_code == 200, timeout_s=10)


def test_a_prior_fitted_for_one_gateway_becomes_live_in_all(
    tiny: Population, tiny_population: Path, tmp_path: Path, redis: RedisServer
) -> None:
    copies = [tmp_path / "one", tmp_path / "two"]
    for copy in copies:
        copy.mkdir()
        manifest.save(tiny, copy)
    with serving(answering()) as engine:
        options = [{"engine": engine.url, "directory": copy, "manifest": LiveManifest(copy)} for copy in copies]
        with gateway(tiny, redis, **options[0]) as (one, first), gateway(tiny, redis, **options[1]) as (two, second):
            wait_for("both", lambda: first.pool.is_ready and second.pool.is_ready, timeout_s=10)
            tier = tiny.tiers[1].model_copy(update={"weights": (0.9, 0.1)})
            fitted = tiny.model_copy(update={"prior_version": 7, "tiers": (tiny.tiers[0], tier, tiny.tiers[2])})
            manifest.save(fitted, copies[0])

            def version(server: Served) -> int:
                return int(httpx.get(f"{server.url}/version").json()["prior_version"])

            wait_for("both at version 7", lambda: version(one) == version(two) == 7, timeout_s=20)
            assert post(two, budget=2).json()["population"]["weights"] == [0.9, 0.1]
            assert manifest.load(copies[1]).prior_version == 7
            assert "chorus_gateway_prior_version 7.0" in httpx.get(f"{two.url}/metrics").text


async def _set(redis: RedisServer, *command: str | bytes) -> None:
    client = Redis.from_url(redis.url)
    await client.execute_command(*command)
    await client.aclose()


KEYS = ("quota:b", "engines", "gateways", "model:http://e", "prior")


@pytest.mark.parametrize("wrong", [("SET", "x"), ("SADD", "x"), ("SET", b"\xff\xfe"), ("HSET", "f", b"\xff")])
def test_keys_of_the_wrong_type_are_mended_and_redis_is_not_away(
    redis: RedisServer, wrong: tuple[str | bytes, ...]
) -> None:
    async def scenario(store: RedisStore) -> None:
        for key in KEYS:
            await _set(redis, wrong[0], f"chorus:tiny:{key}", *wrong[1:])
        assert [await store.take(BUCKET, 5.0) for _ in range(3)] == [0.0, 0.0, pytest.approx(500, abs=5)]
        await store.announce("http://e:1")
        assert await store.engines() == ["http://e:1"]
        assert await store.load_model("http://e") is None
        assert await store.live_prior() is None
        await store.publish_prior(3, "{}")
        assert await store.live_prior() == (3, "{}")
        keeper = asyncio.create_task(store.run())
        await asyncio.sleep(0.3)
        assert not keeper.done()
        keeper.cancel()
        assert store.is_up

    in_redis(redis, scenario)


@pytest.mark.parametrize("field", ["level", "at"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "abc", "1e308", "-1e308", "0x10", ""])
def test_no_number_in_a_bucket_counts_as_redis_being_away(redis: RedisServer, field: str, value: str) -> None:
    async def scenario(store: RedisStore) -> None:
        await _set(redis, "HSET", "chorus:tiny:quota:b", "level", "5", "at", str(time.time()))
        await _set(redis, "HSET", "chorus:tiny:quota:b", field, value)
        waits = [await store.take(BUCKET, 5.0) for _ in range(3)]
        assert store.is_up
        assert waits[0] == 0.0
        assert 0 < waits[2] < 1001

    in_redis(redis, scenario)


@pytest.mark.parametrize("version", ["abc", "", "nan", "inf", "-5", "1e400", "9" * 30, str(2**31), "3.5"])
def test_an_invalid_published_version_is_replaced(redis: RedisServer, version: str) -> None:
    async def scenario(store: RedisStore) -> None:
        await _set(redis, "HSET", "chorus:tiny:prior", "version", version, "manifest", "{}")
        await store.live_prior()
        await store.publish_prior(4, "{}", replacing="{}")
        assert await store.live_prior() == (4, "{}")

    in_redis(redis, scenario)


def test_clocks_of_gateways_may_jump(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(store: RedisStore) -> None:
        for offset_s in (-1e6, 1e6):
            monkeypatch.setattr(time, "time", lambda offset_s=offset_s: 1.7e9 + offset_s)
            await store.announce("http://e:1")
            assert await store.engines() == ["http://e:1"]

    in_redis(redis, scenario)


def test_what_is_dated_in_the_future_does_not_stay_and_what_is_no_address_is_left_aside(redis: RedisServer) -> None:
    async def scenario(store: RedisStore) -> None:
        now = time.time()
        for score, url in (
            (now + 1e6, "http://future:1"),
            (now, "file:///etc/passwd"),
            (now, "http://[::1"),
            (now, "x"),
        ):
            await _set(redis, "ZADD", "chorus:tiny:engines", str(score), url)
        await store.announce("http://e:1")
        assert await store.engines() == ["http://e:1"]

    in_redis(redis, scenario)


@pytest.mark.parametrize("poison", ["{broken", "[" * 100_000, "[1]", '{"first": {}}', "null"])
def test_garbage_about_an_engine_teaches_nothing(redis: RedisServer, poison: str) -> None:
    async def scenario(store: RedisStore) -> None:
        engine = Engine(Mock(), url="http://e", is_supervised=False, probe_interval_s=1.0, probe_timeout_s=1.0)
        await _set(redis, "SET", "chorus:tiny:model:http://e", poison)
        assert not await seed(store, engine)

    in_redis(redis, scenario)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, -1e300])
def test_poisoned_numbers_about_an_engine_teach_nothing(value: float) -> None:
    for place in ("weights", "moment", "gram", "mean", "miss", "surprises", "tokens_per_character"):
        state = known().state()
        if place in state:
            state[place] = [[value, 1.0]] if place == "surprises" else value
        else:
            first = state["first"]
            part = first[place]
            first[place] = value if isinstance(part, float) else [value] * len(part)
            if place == "gram":
                first[place] = [[value] * len(part)] * len(part)
        model = LatencyModel()
        with pytest.raises(ValueError, match=r"below|too large"):
            model.restore(state)
        assert not model.is_seeded


def test_a_writer_to_redis_can_change_only_the_prior_on_disk(
    tiny: Population, tmp_path: Path, redis: RedisServer
) -> None:
    manifest.save(tiny, tmp_path)
    before = (tmp_path / manifest.MANIFEST).read_text()
    member = tiny.members[0]
    forged = {
        "path": {"members": (member.model_copy(update={"path": "../elsewhere"}), *tiny.members[1:])},
        "digest": {"members": (member.model_copy(update={"sha256": {}}), *tiny.members[1:])},
        "fewer": {"members": tiny.members[:1], "tiers": tiny.tiers[:1]},
        "tokenizer": {"tokenizer_sha256": "0" * 64},
        "context": {"context_length": 7},
        "far": {"prior_version": tiny.prior_version + 5000},
    }

    async def publish(store: RedisStore, version: int, text: str) -> None:
        await _set(redis, "HSET", f"chorus:{tiny.name}:prior", "version", str(version), "manifest", text)

    async def run(store: RedisStore) -> None:
        for name, update in forged.items():
            theirs = tiny.model_copy(update={"prior_version": tiny.prior_version + 1, **update})
            for version in (theirs.prior_version, theirs.prior_version + 1):  # its own, and another
                await publish(store, version, theirs.model_dump_json())
                await _sync_prior(store, tiny, tmp_path)
                assert (tmp_path / manifest.MANIFEST).read_text() == before, name
                assert await store.live_prior() == (tiny.prior_version, tiny.model_dump_json()), name
        fitted = tiny.model_copy(update={"prior_version": tiny.prior_version + 1, "tiers": tiny.tiers[:2]})
        elsewhere = tiny.provenance.model_copy(update={"source": "elsewhere"})
        await publish(
            store, fitted.prior_version, fitted.model_copy(update={"provenance": elsewhere}).model_dump_json()
        )
        await _sync_prior(store, tiny, tmp_path)
        assert manifest.load(tmp_path) == fitted

    in_redis(redis, run, tiny.name)


def test_sharing_goes_on_after_garbage(tiny: Population, redis: RedisServer) -> None:
    key = f"chorus:{tiny.name}:prior"
    with serving(answering()) as engine, gateway(tiny, redis, engine=engine.url):

        def version() -> str:
            return subprocess.run(
                ["redis-cli", "-u", redis.url, "HGET", key, "version"], capture_output=True, check=True, text=True
            ).stdout.strip()

        wait_for("the prior", lambda: version() == str(tiny.prior_version), timeout_s=10)
        for garbage in ("abc", "9" * 40):
            asyncio.run(_set(redis, "HSET", key, "version", garbage, "manifest", "{}"))
            wait_for("ours again", lambda: version() == str(tiny.prior_version), timeout_s=10)
