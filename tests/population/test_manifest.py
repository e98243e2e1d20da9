"""The manifest: what it accepts, what it refuses, and that damage is found."""

import json
import shutil
from pathlib import Path

import pytest

from chorus.population import manifest
from chorus.population.errors import ChorusError


@pytest.fixture
def directory(tiny_population: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_population, tmp_path / "copy"))


def edit(directory: Path, **changes: object) -> None:
    path = directory / manifest.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_saved_is_what_is_loaded(directory: Path) -> None:
    loaded = manifest.load(directory)
    manifest.save(loaded, directory)
    assert manifest.load(directory) == loaded
    manifest.verify(loaded, directory)


def test_unknown_fields_are_refused(directory: Path) -> None:
    edit(directory, surprise=1)
    with pytest.raises(ChorusError, match="surprise"):
        manifest.load(directory)


def test_another_schema_version_is_refused(directory: Path) -> None:
    edit(directory, schema_version=2)
    with pytest.raises(ChorusError, match="schema version 2"):
        manifest.load(directory)


def test_a_manifest_cut_short_is_refused(directory: Path) -> None:
    path = directory / manifest.MANIFEST
    path.write_text(path.read_text()[:100])
    with pytest.raises(ChorusError, match="not JSON"):
        manifest.load(directory)


def test_a_directory_without_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ChorusError, match="chorus train"):
        manifest.load(tmp_path)


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.5, -0.5], [1.0]])
def test_weights_off_the_simplex_are_refused(directory: Path, weights: list[float]) -> None:
    tiers = json.loads((directory / manifest.MANIFEST).read_text())["tiers"]
    tiers[1]["weights"] = weights
    edit(directory, tiers=tiers)
    with pytest.raises(ChorusError, match="standard"):
        manifest.load(directory)


def test_a_tier_of_unknown_members_is_refused(directory: Path) -> None:
    tiers = json.loads((directory / manifest.MANIFEST).read_text())["tiers"]
    tiers[0]["members"] = ["nobody"]
    edit(directory, tiers=tiers)
    with pytest.raises(ChorusError, match="nobody"):
        manifest.load(directory)


def test_changed_weights_are_found(directory: Path) -> None:
    file = directory / "members/t0-c01/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ChorusError, match=r"t0-c01.*sha256"):
        manifest.verify(manifest.load(directory), directory)


def test_a_missing_member_is_found(directory: Path) -> None:
    shutil.rmtree(directory / "members/t0-c02")
    with pytest.raises(ChorusError, match=r"t0-c02.*missing"):
        manifest.verify(manifest.load(directory), directory)


def test_a_member_of_another_vocabulary_is_found(directory: Path) -> None:
    path = directory / "members/t0-c02/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 600}))
    with pytest.raises(ChorusError, match=r"t0-c02.*600"):
        manifest.verify(manifest.load(directory), directory)


def test_another_tokenizer_is_found(directory: Path) -> None:
    path = directory / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ChorusError, match="tokenizer"):
        manifest.verify(manifest.load(directory), directory)


def test_a_failed_write_leaves_the_old_manifest(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (directory / manifest.MANIFEST).read_bytes()

    def full_disk(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        manifest.save(manifest.load(directory), directory)
    assert (directory / manifest.MANIFEST).read_bytes() == before
    assert not list(directory.glob(".population*"))
