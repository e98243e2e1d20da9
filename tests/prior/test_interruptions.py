"""`chorus prior fit` beside another, killed at any moment, on a full disk: the manifest is always whole, and a fit can follow."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from chorus.population import files, manifest
from chorus.population.cli import main
from chorus.population.errors import ChorusError
from chorus.prior import run as running
from chorus.prior.run import fit_population
from tests.prior.matrices import cut_splits
from tests.worlds import small_disk


@pytest.fixture
def tiny(tiny_population: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "tiny"
    shutil.copytree(tiny_population, directory)
    cut_splits(directory, num_documents=3)
    return directory


def during_a_fit(directory: Path, monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Fit, and let something happen between its reading of the manifest and its writing."""
    original = running.fit_prior

    def fit_prior(*arguments: object, **keys: object) -> object:
        monkeypatch.setattr(running, "fit_prior", original)
        happens()
        return original(*arguments, **keys)  # type: ignore[arg-type]

    monkeypatch.setattr(running, "fit_prior", fit_prior)
    fit_population(directory)


def test_a_fit_during_another_gets_a_version_of_its_own(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during_a_fit(tiny, monkeypatch, lambda: fit_population(tiny))
    assert manifest.load(tiny).prior_version == 2
    assert '"prior_version": 2' in (tiny / "prior/fit.json").read_text()


def test_two_commands_at_once_make_two_versions(tiny: Path) -> None:
    command = [sys.executable, "-m", "chorus", "prior", "fit", str(tiny)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=500)[0].split("Prior version ")[1][0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert said == ["1", "2"]
    assert manifest.load(tiny).prior_version == 2
    assert not list(tiny.glob(".population*"))


def test_a_member_that_joins_during_a_fit_stays(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = manifest.load(tiny)
    names = [member.name for member in whole.members]
    fewer = whole.model_copy(update={"members": whole.members[1:]}).with_uniform_tiers()
    manifest.save(fewer, tiny)

    during_a_fit(tiny, monkeypatch, lambda: manifest.save(whole.with_uniform_tiers(), tiny))

    population = manifest.load(tiny)
    assert [member.name for member in population.members] == names
    assert population.prior_version == 1
    assert {name for tier in population.tiers for name in tier.members} <= set(names[1:])
    assert [member.test_loss is None for member in population.members] == [True, False, False, False]


def test_a_member_that_goes_during_a_fit_ends_it_with_a_sentence(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = manifest.load(tiny)
    fewer = whole.model_copy(update={"members": whole.members[1:]}).with_uniform_tiers()
    with pytest.raises(ChorusError, match=f"{whole.members[0].name} was removed or has other weights"):
        during_a_fit(tiny, monkeypatch, lambda: manifest.save(fewer, tiny))
    assert manifest.load(tiny) == fewer
    assert not (tiny / "prior" / "fit.json").exists()


def test_a_fit_waits_for_whoever_holds_the_manifest(tiny: Path) -> None:
    fitting = threading.Thread(target=fit_population, args=(tiny,))
    with manifest.updating(tiny):
        before = manifest.load(tiny)
        fitting.start()
        fitting.join(timeout=5)
        assert fitting.is_alive()
        manifest.save(before.model_copy(update={"prior_version": 7}), tiny)
    fitting.join(timeout=120)
    assert manifest.load(tiny).prior_version == 8


def test_a_crash_at_any_write_leaves_a_manifest_and_the_next_fit_works(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(BaseException):
        """Ends everything, as a kill does."""

    whole, flush = manifest.load(tiny), files._flush
    writes = survived = 0

    def crashing(path: Path) -> None:
        nonlocal writes
        writes += 1
        if writes == survived + 1:
            raise Crash
        flush(path)

    monkeypatch.setattr(files, "_flush", crashing)
    while True:
        writes = 0
        try:
            fit_population(tiny)
            break
        except Crash:
            survived += 1
        now = manifest.load(tiny)
        manifest.verify(now, tiny)
        assert now.prior_version in (0, 1)
        assert now.prior_version == 1 or now == whole
    assert survived >= 10  # every write of a fit, before its file is in place and after
    assert manifest.load(tiny).prior_version == 2  # the last crash came after the manifest was in place
    assert len(manifest.load(tiny).tiers) >= 2


def test_killed_at_random_moments_a_fit_leaves_a_manifest_and_the_next_one_works(tiny: Path) -> None:
    """CHORUS_KILLS=20 is the long version."""
    moments = random.Random(3)
    command = [sys.executable, "-m", "chorus", "prior", "fit", str(tiny)]
    version = 0
    for _ in range(int(os.environ.get("CHORUS_KILLS", "3"))):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        rows = tiny / "prior" / "likelihoods"
        while process.poll() is None and not rows.exists() and time.monotonic() < deadline:
            time.sleep(0.05)  # the imports, which take most of its time
        time.sleep(moments.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        now = manifest.load(tiny)
        manifest.verify(now, tiny)
        assert version <= now.prior_version <= version + 1
        version = now.prior_version
    assert fit_population(tiny)[0].prior_version == version + 1
    assert manifest.load(tiny).prior_version == version + 1


def test_a_full_disk_is_a_sentence_and_the_fit_goes_on_after_room_is_made(
    tiny_population: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", megabytes=16) as disk:
        directory = disk.path / "tiny"
        shutil.copytree(tiny_population, directory)
        cut_splits(directory, num_documents=3)
        before = (directory / manifest.MANIFEST).read_bytes()
        monkeypatch.setattr(sys, "argv", ["chorus", "prior", "fit", str(directory)])
        for room in (0, 8_192, 65_536):  # full at the first row, at later ones, at the reports and pictures
            disk.fill(leaving=room)
            with pytest.raises(SystemExit) as stopped:
                main()
            said = capsys.readouterr().err
            assert stopped.value.code == 2, said
            assert said.startswith("error: ")
            assert "No space left on device" in said
            assert said.count("\n") == 1
            assert (directory / manifest.MANIFEST).read_bytes() == before
            manifest.verify(manifest.load(directory), directory)
        disk.make_room()
        main()
        assert manifest.load(directory).prior_version == 1
