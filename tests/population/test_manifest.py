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


def test_a_tiers_decoding_is_written_only_where_it_is_chosen(directory: Path) -> None:
    before = manifest.load(directory)
    assert "decoding" not in (directory / manifest.MANIFEST).read_text(), (
        "older versions refuse a field that they do not know"
    )
    chosen = before.tiers[-1].model_copy(update={"decoding": "sampled"})
    manifest.save(before.model_copy(update={"tiers": (*before.tiers[:-1], chosen)}), directory)
    assert [tier.decoding for tier in manifest.load(directory).tiers] == ["auto", "auto", "sampled"]


def test_a_tier_of_unknown_decoding_is_refused(directory: Path) -> None:
    text = (directory / manifest.MANIFEST).read_text()
    (directory / manifest.MANIFEST).write_text(text.replace('"name": "max",', '"name": "max", "decoding": "fast",'))
    with pytest.raises(ChorusError, match=r"tiers\.2\.decoding"):
        manifest.load(directory)


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


def member_with(directory: Path, **changes: object) -> None:
    members = json.loads((directory / manifest.MANIFEST).read_text())["members"]
    edit(directory, members=[{**members[0], **changes}, *members[1:]])


@pytest.mark.parametrize(
    "path", ["/etc", "..", "../other", "members/../../other", "", ".", "a\0b", "members/t0-c00/.."]
)
def test_a_member_outside_the_directory_is_refused(directory: Path, path: str) -> None:
    member_with(directory, path=path)
    with pytest.raises(ChorusError, match=r"members\.0\.path.*inside the population"):
        manifest.load(directory)


@pytest.mark.parametrize(
    "digests",
    [{}, {"model.safetensors": ""}, {"model.safetensors": "A" * 64}, {"../x.safetensors": "0" * 64}, {"": "0" * 64}],
)
def test_a_member_without_digests_of_its_files_is_refused(directory: Path, digests: dict[str, str]) -> None:
    member_with(directory, sha256=digests)
    with pytest.raises(ChorusError, match=r"members\.0\.sha256"):
        manifest.load(directory)


def test_weights_that_the_manifest_does_not_name_are_found(directory: Path) -> None:
    shutil.copy(directory / "members/t0-c01/model.safetensors", directory / "members/t0-c02/more.safetensors")
    with pytest.raises(ChorusError, match=r"t0-c02.*no digest of .*more\.safetensors"):
        manifest.verify(manifest.load(directory), directory)


@pytest.mark.parametrize("linked", ["members", "members/t0-c01", "members/t0-c01/model.safetensors"])
def test_links_out_of_the_directory_are_found(directory: Path, tmp_path: Path, linked: str) -> None:
    loaded = manifest.load(directory)
    (directory / linked).rename(tmp_path / "elsewhere")
    (directory / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ChorusError, match="outside the population"):
        manifest.verify(loaded, directory)


def test_links_inside_the_directory_and_to_all_of_it_are_followed(directory: Path, tmp_path: Path) -> None:
    (directory / "members/t0-c01").rename(directory / "members/moved")
    (directory / "members/t0-c01").symlink_to("moved")
    (tmp_path / "link").symlink_to(directory)
    manifest.verify(manifest.load(tmp_path / "link"), tmp_path / "link")


@pytest.mark.parametrize("name", ["population.json", "members/t0-c00/config.json"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b"{\xff", "not UTF-8 at byte 1"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b'{"vocab_size": ' + b"9" * 5_000 + b"}", "is not JSON"),
        (None, "Is a directory"),
    ],
)
def test_what_is_no_json_is_one_sentence(directory: Path, name: str, content: bytes | None, says: str) -> None:
    (directory / name).unlink()
    if content is None:
        (directory / name).mkdir()
    else:
        (directory / name).write_bytes(content)
    with pytest.raises(ChorusError, match=says):
        manifest.verify(manifest.load(directory), directory)


def test_a_thousand_problems_are_told_in_a_line(directory: Path) -> None:
    edit(directory, **{f"surprise{idx}": idx for idx in range(1000)})
    with pytest.raises(ChorusError, match="and 995 more") as refusal:
        manifest.load(directory)
    assert len(str(refusal.value)) < 1_000


def test_a_prior_from_elsewhere_is_saved_only_where_it_is_the_newest_for_these_members(directory: Path) -> None:
    at = manifest.load(directory).model_copy(update={"prior_version": 5})
    manifest.save(at, directory)
    for version, saved in ((4, 5), (5, 5), (7, 7), (6, 7)):
        manifest.save_newer(at.model_copy(update={"prior_version": version}), directory)
        assert manifest.load(directory).prior_version == saved
    fewer = at.model_copy(update={"prior_version": 9, "members": at.members[:2], "tiers": at.tiers[:1]})
    manifest.save_newer(fewer, directory)
    assert manifest.load(directory).prior_version == 7
