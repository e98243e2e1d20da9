"""A gateway in a thread, in front of an engine that does what the test says."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from population import manifest
from population.manifest import Population
from serve.gateway.app import create_app
from serve.gateway.gateway import Gateway
from serve.gateway.settings import Settings
from tests.live import Served, serving, wait_for
from tests.serve.gateway.scripted import ScriptedEngine


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A gateway and the engine behind it."""

    server: Served
    engine: ScriptedEngine
    gateway: Gateway

    @property
    def url(self) -> str:
        return self.server.url


@pytest.fixture(scope="session")
def tiny(tiny_population: Path) -> Population:
    return manifest.load(tiny_population)


@contextmanager
def gateway_before(engine: ScriptedEngine, population: Population, **options: Any) -> Iterator[Pair]:
    with serving(engine) as behind:
        gateway = Gateway(
            Settings(population=population, engine=behind.url, probe_interval_s=0.1, calibrates=False, **options)
        )
        with serving(create_app(gateway)) as server:
            wait_for("the engine to be seen", lambda: gateway.pool.is_ready, timeout_s=10)
            yield Pair(server=server, engine=engine, gateway=gateway)


@pytest.fixture
def pair(tiny: Population) -> Iterator[Pair]:
    with gateway_before(ScriptedEngine(), tiny) as running:
        yield running
