"""A manifest replaced in use: a new prior is taken over, anything else is left aside."""

import logging
import shutil
from pathlib import Path

import pytest

from chorus.population import manifest
from chorus.population.live import LiveManifest
from chorus.population.manifest import Population


@pytest.fixture
def directory(tiny_population: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_population, tmp_path / "live"))


def refit(population: Population) -> Population:
    return population.model_copy(update={"tiers": population.tiers[:1], "prior_version": population.prior_version + 1})


def test_a_new_prior_is_taken_over(directory: Path) -> None:
    live = LiveManifest(directory)
    before = live.current()
    assert live.current() is before
    manifest.save(refit(before), directory)
    assert live.current().prior_version == before.prior_version + 1
    assert [tier.name for tier in live.current().tiers] == ["economy"]


def test_other_members_are_left_aside(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    live = LiveManifest(directory)
    before = live.current()
    fewer = before.model_copy(update={"members": before.members[:2], "tiers": before.tiers[:1]})
    manifest.save(fewer, directory)
    with caplog.at_level(logging.ERROR):
        assert live.current() is before
        assert live.current() is before
    assert [record.message for record in caplog.records if "members" in record.message] == [caplog.records[0].message]


def test_a_broken_or_missing_manifest_is_left_aside(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    live = LiveManifest(directory)
    before = live.current()
    for broken in (b"{", b"[" * 100_000, b"\xff\xfe"):
        (directory / manifest.MANIFEST).write_bytes(broken)
        assert live.current() is before
    (directory / manifest.MANIFEST).unlink()
    assert live.current() is before
    manifest.save(refit(before), directory)
    assert live.current().prior_version == before.prior_version + 1
