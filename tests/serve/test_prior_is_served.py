"""What the prior promises is what the engine gives: the manifest's losses, recounted through echoed log-probabilities."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from chorus.population import manifest
from chorus.population.cli import cli
from chorus.population.errors import ChorusError
from chorus.population.manifest import Loss, Tier
from chorus.population.tokens import TokenSplit, split_path
from chorus.prior.distributions import tier_losses
from chorus.prior.engine import connect, engine_losses
from chorus.prior.evaluate import check_engine
from chorus.prior.likelihoods import likelihoods
from chorus.prior.splits import HELD_OUT, ScoredSplit, own_splits
from tests.live import ChorusServe
from tests.prior.matrices import cut_splits

TOLERANCE = 1e-4


def test_split(directory: Path) -> ScoredSplit:
    population = manifest.load(directory)
    return own_splits(directory, context_length=population.context_length, vocab_size=population.vocab_size)["test"]


test_split.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture
def refitted(chorus_server: ChorusServe, tiny_population: Path) -> Iterator[Path]:
    """The population that is being served, on few documents and with a prior that the command has fitted while the server ran.

    Beside its tiers stand others, so that every kind of pool is among them.
    """
    before = manifest.load(tiny_population)
    kept = {name: split_path(tiny_population, name).read_bytes() for name in HELD_OUT}
    try:
        cut_splits(tiny_population, num_documents=2)
        command = ["prior", "fit", str(tiny_population), "--budgets", "one=1,three=3", "--pools", "log"]
        CliRunner().invoke(cli, command, catch_exceptions=False)
        fitted = manifest.load(tiny_population)
        assert fitted.prior_version == 1
        names = tuple(member.name for member in fitted.members[1:])
        tiers = tuple(
            Tier(
                name=f"{pool}-{kind}", members=names, weights=(0.5, 0.2, 0.3), pool=pool, temperature=t, relative_cost=3
            )
            for pool in ("linear", "log")
            for kind, t in (("plain", 1.0), ("sharp", 0.7), ("flat", 1.7))
        )
        losses = tier_losses(fitted, tiny_population, test_split(tiny_population), tiers)
        counted = tuple(
            tier.model_copy(update={"test_loss": Loss(nats=nats, low=nats, high=nats, num_tokens=1)})
            for tier, nats in zip(tiers, (float(losses_N.mean()) for losses_N in losses), strict=True)
        )
        manifest.save(fitted.model_copy(update={"tiers": (*fitted.tiers, *counted)}), tiny_population)
        yield tiny_population
    finally:
        manifest.save(before, tiny_population)
        for name, data in kept.items():
            split_path(tiny_population, name).write_bytes(data)
        shutil.rmtree(tiny_population / "prior", ignore_errors=True)


def test_the_losses_in_the_manifest_are_those_of_the_running_engine(chorus_server: ChorusServe, refitted: Path) -> None:
    population, split = manifest.load(refitted), test_split(refitted)
    assert max(np.diff(split.split.offsets)) > population.context_length  # a window fills the engine's whole context
    gateway, engine = (connect(url, population) for url in (chorus_server.url, f"{chorus_server.engine_url}/v1"))
    assert (gateway.is_gateway, engine.is_gateway) == (True, False)

    for tier in population.tiers:
        assert tier.test_loss is not None
        found_N = engine_losses(gateway, gateway.request(tier.name), split)
        assert found_N.mean() == pytest.approx(tier.test_loss.nats, abs=TOLERANCE), tier.name
        if tier.pool == "log":
            np.testing.assert_allclose(engine_losses(engine, engine.request(tier.name), split), found_N, atol=TOLERANCE)
    assert {tier.pool for tier in population.tiers} == {"linear", "log"}


def test_the_command_compares_an_engine_with_the_members(chorus_server: ChorusServe, refitted: Path) -> None:
    result = CliRunner().invoke(cli, ["prior", "evaluate", str(refitted), "--engine", chorus_server.url])

    assert result.exit_code == 0, result.exception
    for tier in manifest.load(refitted).tiers:
        assert tier.test_loss is not None
        (line,) = re.findall(rf"^{tier.name} .*$", result.output, re.MULTILINE)
        engine_nats, nats, _, largest, promised = line.split()[1:]
        assert float(engine_nats) == pytest.approx(float(nats), abs=TOLERANCE)
        assert float(promised) == pytest.approx(float(nats), abs=TOLERANCE)
        assert float(largest) < 1e-3


def test_a_prior_that_is_not_the_served_one_is_found_out(
    chorus_server: ChorusServe, refitted: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(refitted, tmp_path / "other"))
    population = manifest.load(other)
    tier = population.tier("three")
    light = [0.05] * (len(tier.members) - 1)  # members of weight zero have left it
    changed = tier.model_copy(update={"weights": (*light, 1 - sum(light)), "pool": "linear", "temperature": 1.0})
    manifest.save(population.model_copy(update={"tiers": (population.tiers[0], changed)}), other)

    served = check_engine(other, chorus_server.url, corpus=None, max_bytes=1, split_on=None)[2]
    result = CliRunner().invoke(cli, ["prior", "evaluate", str(other), "--engine", chorus_server.url])

    assert [found.agrees for found in served] == [True, False]
    assert isinstance(result.exception, ChorusError)
    assert "for three" in str(result.exception)


def test_members_are_scored_by_an_engine_as_they_are_here(
    chorus_server: ChorusServe, refitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    population = manifest.load(refitted)
    kept = refitted / "prior" / "likelihoods"
    here_MN = np.array(likelihoods(population, refitted, [test_split(refitted)]))
    shutil.rmtree(kept)
    monkeypatch.setattr("chorus.prior.likelihoods.load_model", None)  # no member is run in this process
    engine = connect(chorus_server.engine_url, population)
    found_MN = likelihoods(population, refitted, [test_split(refitted)], engine=engine)
    np.testing.assert_allclose(np.log(found_MN), np.log(here_MN), atol=TOLERANCE)

    shutil.rmtree(kept)
    command = ["prior", "fit", str(refitted), "--engine"]
    result = CliRunner().invoke(cli, [*command, chorus_server.engine_url])
    assert result.exit_code == 0, result.exception
    assert manifest.load(refitted).prior_version == population.prior_version + 1
    refused = CliRunner().invoke(cli, [*command, chorus_server.url])
    assert "offers tiers only" in str(refused.exception)


def test_latencies_are_measured_and_fitted_within(chorus_server: ChorusServe, refitted: Path) -> None:
    measured = CliRunner().invoke(cli, ["prior", "measure", str(refitted), "--engine", chorus_server.url])
    assert measured.exit_code == 0, measured.exception
    assert "ms per token" in measured.output

    result = CliRunner().invoke(cli, ["prior", "fit", str(refitted), "--max-latency-ms", "100000"])

    assert result.exit_code == 0, result.exception
    assert manifest.load(refitted).tiers[-1].budget >= 2


def test_refuses_what_is_no_engine_of_this_population(chorus_server: ChorusServe, refitted: Path) -> None:
    population = manifest.load(refitted)

    with pytest.raises(ChorusError, match="not the address"):
        connect("127.0.0.1:8000", population)
    with pytest.raises(ChorusError, match="Is an engine running"):
        connect("http://127.0.0.1:9", population)
    with pytest.raises(ChorusError, match="expected 'elsewhere'"):
        connect(chorus_server.url, population.model_copy(update={"name": "elsewhere"}))
    split = ScoredSplit(name="test", split=TokenSplit.from_documents([[1, 2, 3]]), context_length=9)
    engine = connect(chorus_server.engine_url, population)
    with pytest.raises(ChorusError, match="unknown tier 'nowhere'"):
        engine_losses(engine, engine.request("nowhere"), split)
    with pytest.raises(ChorusError, match="unknown member 'nobody'"):
        engine_losses(engine, engine.request_member("nobody"), split)
