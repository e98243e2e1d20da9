"""What all tests share: the environment of a closed network, and one small population per session."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.live import ChorusServe

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session")
def tiny_population(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a population of four random members; shared by all tests, so leave it as it is."""
    from tests.worlds import make_population

    directory = tmp_path_factory.mktemp("populations") / "tiny"
    make_population(directory)
    return directory


@pytest.fixture(scope="session")
def trained_population(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a population of four members that `chorus train` made, under `tests.worlds.with_nested_tiers`."""
    from chorus.population import manifest
    from tests.worlds import with_nested_tiers

    directory = tmp_path_factory.mktemp("populations") / "trained"
    shape = ["--layers", "2", "--width", "64", "--heads", "2", "--vocab-size", "512", "--context-length", "128"]
    length = [
        "--trajectories",
        "2",
        "--cycles",
        "2",
        "--epochs-per-cycle",
        "1",
        "--max-bytes",
        "150000",
        "--batch-tokens",
        "1024",
    ]
    command = [sys.executable, "-m", "chorus", "train", "stdlib", "--out", str(directory), *shape, *length]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    manifest.save(with_nested_tiers(manifest.load(directory)), directory)
    return directory


@pytest.fixture(scope="session")
def _chorus_server(tiny_population: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["ChorusServe"]:
    from tests.live import ENGINE_ARGUMENTS, chorus_serve

    output = tmp_path_factory.mktemp("serve") / "output.txt"
    with chorus_serve(tiny_population, output, "--", *ENGINE_ARGUMENTS) as server:
        yield server


@pytest.fixture
def chorus_server(_chorus_server: "ChorusServe") -> "ChorusServe":
    """`chorus serve` of the tiny population in float32, one for all tests, ready at the begin of each."""
    _chorus_server.wait_until_ready()
    return _chorus_server


@pytest.fixture
def gateway_url(chorus_server: "ChorusServe") -> str:
    """Address of the gateway."""
    return chorus_server.url


@pytest.fixture
def engine_url(chorus_server: "ChorusServe") -> str:
    """Address of the engine behind it."""
    return chorus_server.engine_url
