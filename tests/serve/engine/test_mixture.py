"""From the manifest's tiers to what the engine runs."""

import shutil
from pathlib import Path

import pytest

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.manifest import Tier
from chorus.serve.engine.mixture import Mixture, Prior


def test_tiers_become_mixtures_over_member_indices(tiny_population: Path) -> None:
    prior = Prior(tiny_population)
    assert prior.tiers == ("economy", "standard", "max")
    assert prior.mixture("standard").members == (0, 1)
    assert prior.mixture("standard").weights == pytest.approx((1 / 3, 2 / 3))
    assert prior.mixture(None).tier == "max"


def test_members_of_weight_zero_do_not_run(tiny_population: Path) -> None:
    population = manifest.load(tiny_population)
    tier = Tier(name="t", members=("t0-c03", "t0-c01", "t0-c00"), weights=(0.25, 0.0, 0.75), relative_cost=3)
    mixture = Mixture.from_tier(tier, population)
    assert (mixture.members, mixture.weights) == ((0, 3), (0.75, 0.25))


def test_an_unknown_tier_is_refused_by_name(tiny_population: Path) -> None:
    with pytest.raises(ChorusError, match=r"'gold'.*economy, standard, max"):
        Prior(tiny_population).mixture("gold")


def test_a_population_without_a_prior_is_served_uniformly(tiny_population: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(tiny_population, tmp_path / "bare"))
    manifest.save(manifest.load(bare).model_copy(update={"tiers": ()}), bare)
    assert Prior(bare).mixture("max").weights == (0.25, 0.25, 0.25, 0.25)


def test_a_prior_fitted_again_takes_over(tiny_population: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_population, tmp_path / "live"))
    prior = Prior(directory)
    population = manifest.load(directory)
    tier = population.tiers[0].model_copy(update={"members": ("t0-c03",)})
    manifest.save(population.model_copy(update={"tiers": (tier,), "prior_version": 1}), directory)
    assert prior.mixture("economy").members == (3,)
    assert prior.version == 1
    with pytest.raises(ChorusError, match="has economy"):
        prior.mixture("max")
