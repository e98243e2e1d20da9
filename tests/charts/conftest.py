"""One cluster for all tests of the rendered chart."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from chorus.population import manifest
from chorus.population.manifest import Loss
from tests.charts.cluster import ENGINES, GATEWAYS, REDIS, Cluster, num_engines_up
from tests.live import wait_for


@pytest.fixture(scope="package")
def cluster(tiny_population: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    for each in (directory, directory.parent):
        each.chmod(0o755)  # pods run as somebody else
    population = directory / "population"
    shutil.copytree(tiny_population, population)
    for path in population.rglob(
        "*"
    ):  # safetensors writes files that only their owner may read; pods are somebody else
        path.chmod(path.stat().st_mode | 0o044 | (0o011 if path.is_dir() else 0))
    found = manifest.load(population)
    losses = (4.6, 4.4, 4.3)
    tiers = tuple(
        tier.model_copy(update={"test_loss": Loss(nats=nats, low=nats - 0.1, high=nats + 0.1, num_tokens=999)})
        for tier, nats in zip(found.tiers, losses, strict=True)
    )
    manifest.save(found.model_copy(update={"tiers": tiers, "prior_version": 1}), population)
    cluster = Cluster(directory, population)
    try:
        cluster.start("redis", "Deployment", "redis")
        engines = [cluster.start(f"engine-{idx}", "StatefulSet", "engine") for idx in range(2)]
        gateway = cluster.start("gateway-0", "Deployment", "gateway")
        cluster.pods["redis"].wait_until_ready()
        cluster.network.add(REDIS, cluster.pods["redis"].address)
        for engine in engines:
            engine.wait_until_ready()
            cluster.network.add(ENGINES, engine.address)
        gateway.wait_until_ready()
        cluster.network.add(GATEWAYS, gateway.address)
        wait_for("both engines", lambda: num_engines_up(cluster.url) == 2, timeout_s=60)
        yield cluster
    finally:
        cluster.stop()
