"""A gateway in a thread, in front of an engine that does what the test says."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chorus.population import manifest
from chorus.population.manifest import Population
from chorus.serve.gateway.app import create_app
from chorus.serve.gateway.engines.latency import LatencyModel, Load, Work
from chorus.serve.gateway.gateway import Gateway
from chorus.serve.gateway.settings import Settings
from chorus.serve.gateway.transport.connections import ConnectionLimits, server_options
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
def gateway_before(
    engine: ScriptedEngine, population: Population, *, connections: ConnectionLimits | None = None, **options: Any
) -> Iterator[Pair]:
    with serving(engine) as behind:
        gateway = Gateway(
            Settings(population=population, engine=behind.url, probe_interval_s=0.1, calibrates=False, **options)
        )
        with serving(create_app(gateway), **server_options(connections or ConnectionLimits())) as server:
            wait_for("the engine to be seen", lambda: gateway.pool.is_ready, timeout_s=10)
            yield Pair(server=server, engine=engine, gateway=gateway)


@pytest.fixture
def pair(tiny: Population) -> Iterator[Pair]:
    with gateway_before(ScriptedEngine(), tiny) as running:
        yield running


def known(*, first_s: float = 0.02, member_s: float = 0.01, row_s: float = 0.001) -> LatencyModel:
    """A model that has seen answers of an engine which takes just this long."""
    model = LatencyModel()
    for members in (1, 2, 4) * 8:
        for others in (0, 4, 12):
            work = Work(members=members, prompt_tokens=10, max_tokens=8)
            model.observe_first(Load(members=members, rows=others), work, first_s)
            load = Load(members=members, rows=others + members)
            model.observe_tokens(load, member_s * members + row_s * (others + members))
            model.observe_total(expected_s=1.0, seconds=1.0)
    return model
