"""The store in Redis as it is run in earnest: behind TLS, chosen by Sentinel, as a cluster; each with its real processes."""

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from chorus.population.errors import ChorusError
from chorus.serve.gateway.shared.redis_client import check_address
from chorus.serve.gateway.shared.redis_store import RedisStore
from chorus.serve.gateway.shared.store import Bucket
from tests.live import free_port, wait_for

BUCKET = Bucket(name="b", rate_per_s=0.01, burst=10)
PATIENT_S = 20.0


@contextmanager
def server(directory: Path, port: int, *options: str, cli: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """A redis-server on `port` of the loopback, ready."""
    program = shutil.which("redis-server")
    assert program, "redis-server is missing: `make test` installs it, or apt-get install redis-server"
    directory.mkdir(exist_ok=True)
    command = [program, *options, "--bind", "127.0.0.1", "--dir", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for("redis", lambda: b"PONG" in ask(port, "ping", cli=cli), timeout_s=30)
            yield process
        finally:
            process.kill()


def ask(port: int, *command: str, cli: tuple[str, ...] = ()) -> bytes:
    return subprocess.run(["redis-cli", "-p", str(port), *cli, *command], capture_output=True, check=False).stdout


async def use(store: RedisStore) -> None:
    """Every operation of the store, as one gateway after another would call them."""
    assert [await store.take(BUCKET, 5.0) for _ in range(3)] == [0.0, 0.0, pytest.approx(500, abs=5)]
    await store.settle(BUCKET, -5.0)
    assert await store.take(BUCKET, 5.0) == 0.0
    await store.announce("http://e:80")
    assert await store.engines() == ["http://e:80"]
    await store.save_model("http://e:80", {"a": 1})
    assert await store.load_model("http://e:80") == {"a": 1}
    await store.publish_prior(3, "{}")
    assert await store.live_prior() == (3, "{}")
    assert store.is_up


def in_store(url: str, scenario: Any = use) -> None:
    async def run() -> None:
        store = RedisStore(url, "tiny", timeout_s=PATIENT_S)
        try:
            await scenario(store)
        finally:
            await store.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "url",
    [
        "http://h:1",
        "redis+sentinel://h:1",  # of which primary?
        "redis+sentinel://h:1/main/x",
        "redis+cluster://h:1/0",
        "redis+cluster://",
        "redis+cluster://h:1,,h:2",
        "redis+cluster://h:port",
        "redis+other://h:1",
        "redis://h:port",
        "redis+cluster://h:1?socket_timeout=x",
    ],
)
def test_addresses_that_cannot_be_meant(url: str) -> None:
    with pytest.raises(ChorusError, match="is not an address of Redis"):
        check_address(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "rediss://:p@h:1/0?ssl_ca_certs=/x",
        "unix:///s",
        "redis+sentinel://u:p@h:1,[::1]:2/main",
        "rediss+sentinel://h/main/2?sentinel_password=p",
        "rediss+cluster://h:1,h2",
    ],
)
def test_addresses_of_every_form(url: str) -> None:
    check_address(url)


def test_a_refusal_shows_no_password() -> None:
    with pytest.raises(ChorusError) as refusal:
        check_address("redis+sentinel://user:secret@h:1")
    assert "secret" not in str(refusal.value)


def test_a_server_behind_tls_and_a_password(tmp_path: Path) -> None:
    certificate, key = str(tmp_path / "c.pem"), str(tmp_path / "k.pem")
    make = "req -x509 -newkey rsa:2048 -nodes -subj /CN=test -addext subjectAltName=IP:127.0.0.1 -days 1"
    subprocess.run(["openssl", *make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    port = free_port()
    tls = f"--port 0 --tls-port {port} --tls-cert-file {certificate} --tls-key-file {key} --tls-ca-cert-file {certificate}"
    options = [*tls.split(), "--tls-auth-clients", "no", "--requirepass", "secret"]
    cli = ("--tls", "--cacert", certificate, "-a", "secret")
    with server(tmp_path / "redis", port, *options, cli=cli):
        in_store(f"rediss://:secret@127.0.0.1:{port}/0?ssl_ca_certs={certificate}")

        async def without_trust(store: RedisStore) -> None:
            await store.take(BUCKET, 1.0)
            assert not store.is_up

        in_store(f"rediss://:secret@127.0.0.1:{port}/0", without_trust)


def test_a_cluster(tmp_path: Path) -> None:
    port = free_port()
    options = ["--port", str(port), "--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--save", ""]
    with server(tmp_path / "node", port, *options):
        ask(port, "cluster", "addslotsrange", "0", "16383")
        wait_for("the cluster", lambda: b"cluster_state:ok" in ask(port, "cluster", "info"), timeout_s=30)
        in_store(f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{port}")  # one of its nodes is away


def test_a_cluster_that_is_away_is_redis_being_away() -> None:
    async def scenario(store: RedisStore) -> None:
        assert await store.take(BUCKET, 5.0) == 0.0  # from this gateway's share
        assert not store.is_up

    in_store(f"redis+cluster://127.0.0.1:{free_port()}", scenario)


def test_sentinel_names_the_primary_and_its_successor(tmp_path: Path) -> None:
    primary, replica, sentinel = free_port(), free_port(), free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"sentinel monitor main 127.0.0.1 {primary} 1\nsentinel down-after-milliseconds main 1000\n"
        "sentinel failover-timeout main 5000\n"
    )
    with ExitStack() as running:
        first = running.enter_context(server(tmp_path / "one", primary, "--port", str(primary), "--save", ""))
        options = ["--port", str(replica), "--save", "", "--replicaof", "127.0.0.1", str(primary)]
        running.enter_context(server(tmp_path / "two", replica, *options))
        wait_for("the replica", lambda: b"master_link_status:up" in ask(replica, "info", "replication"), timeout_s=30)
        running.enter_context(server(tmp_path / "watch", sentinel, str(config), "--sentinel", "--port", str(sentinel)))
        wait_for(
            "its discovery",
            lambda: str(replica).encode() in ask(sentinel, "sentinel", "replicas", "main"),
            timeout_s=60,
        )

        async def scenario(store: RedisStore) -> None:
            await use(store)
            first.kill()
            first.wait()
            for _ in range(600):
                await store.announce("http://f:80")
                if store.is_up and b"role:master" in ask(replica, "info", "replication"):
                    break
                await asyncio.sleep(0.1)
            assert await store.live_prior() == (3, "{}"), "what was written before has survived"
            assert store.is_up

        in_store(f"redis+sentinel://127.0.0.1:{sentinel}/main", scenario)
