"""The command as a user runs it: what it refuses, what it leaves behind, and how it goes on after a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.tokens import TokenSplit, split_path
from chorus.train.command import train
from chorus.train.heldout import loss
from chorus.train.run import Run, likelihoods_path
from tests.worlds import small_disk

TINY = [
    "--max-bytes", "60000", "--layers", "1", "--width", "32", "--heads", "1", "--context-length", "32",
    "--vocab-size", "300", "--batch-tokens", "512", "--cycles", "3", "--epochs-per-cycle", "1",
]  # fmt: skip
NUM_STEPS = 60  # at least, in each trajectory


def start(out: Path, *more: str, **options: object) -> "subprocess.Popen[str]":
    """`chorus train` on the standard library as a process group of its own."""
    command = [sys.executable, "-m", "chorus", "train", "stdlib", "--out", str(out), *TINY, *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **options
    )  # type: ignore[call-overload,no-any-return]


def finish(process: "subprocess.Popen[str]") -> str:
    """All that it printed."""
    output, _ = process.communicate(timeout=120)
    return output


def steps_logged(out: Path, trajectory: int) -> int:
    log = out / "training" / f"t{trajectory}" / "log.jsonl"
    return log.read_text().count('"event": "step"') if log.exists() else 0


def wait_for_steps(out: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    while min(steps_logged(out, 0), steps_logged(out, 1)) < count:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.005)


def wait_for_members(out: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    while not (out / manifest.MANIFEST).exists() or len(manifest.load(out).members) < count:
        assert time.monotonic() < deadline, "no member is finished"
        time.sleep(0.005)


def digests(out: Path) -> dict[str, dict[str, str]]:
    return {member.name: member.sha256 for member in manifest.load(out).members}


def records(out: Path, trajectory: int) -> list[dict[str, object]]:
    """The log without what depends on the clock."""
    lines = (out / "training" / f"t{trajectory}" / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def checkpoints(out: Path) -> list[str]:
    """The newest checkpoint of each trajectory."""
    return [max(path.name for path in (out / "training" / f"t{idx}").glob("checkpoint-*.pt")) for idx in (0, 1)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    out = tmp_path_factory.mktemp("train") / "undisturbed"
    process = start(out)
    output = finish(process)
    assert process.returncode == 0, output
    assert f"chorus prior fit {out}" in output
    assert "all 6, uniform weights" in output
    return out


def test_a_run_leaves_a_population_that_verifies_and_that_hugging_face_reads(undisturbed: Path) -> None:
    population = manifest.load(undisturbed)
    manifest.verify(population, undisturbed)
    assert [m.name for m in population.members] == ["t0-c00", "t1-c00", "t0-c01", "t1-c01", "t0-c02", "t1-c02"]
    assert [m.teacher for m in population.members] == [None, None, "t0-c00", "t1-c00", "t0-c01", "t1-c01"]
    assert [m.epochs for m in population.members] == [1, 1, 2, 2, 3, 3]
    assert population.provenance.settings["cycles"] == 3
    assert {tier.name: tier.budget for tier in population.tiers} == {"economy": 1, "max": 6}

    member = undisturbed / population.members[0].path
    model = AutoModelForCausalLM.from_pretrained(member)
    assert model.num_parameters() == population.members[0].num_parameters
    tokenizer = AutoTokenizer.from_pretrained(undisturbed)
    assert tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id
    for split in ("fitness", "selection", "test"):
        assert TokenSplit.load(split_path(undisturbed, split)).num_documents > 0


def test_members_learn_and_trajectories_differ(undisturbed: Path) -> None:
    import numpy as np

    run = Run.load(undisturbed)
    losses = {name: loss(np.load(likelihoods_path(run, name))) for name in digests(undisturbed)}
    for trajectory in (0, 1):
        falling = [losses[f"t{trajectory}-c{cycle:02d}"] for cycle in range(3)]
        assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.9 * np.log(300)
    assert len({str(digest) for digest in digests(undisturbed).values()}) == 6


def test_the_log_holds_every_step_with_its_rates(undisturbed: Path) -> None:
    run = Run.load(undisturbed)
    steps = [record for record in records(undisturbed, 1) if record["event"] == "step"]
    expected = [(c, step) for c in run.schedule(0).cycles() for step in range(c.steps)]
    assert len(steps) == len(expected) >= NUM_STEPS
    for record, (cycle, step) in zip(steps, expected, strict=True):
        assert (record["learning_rate"], record["weight_decay"]) == run.schedule(0).rates(cycle, step)
        assert record["step"] == cycle.first_step + step
    assert not list((undisturbed / "training" / "t1").glob("*checkpoint*")), "a finished trajectory needs none"


def test_the_same_command_on_a_finished_run_only_reports(undisturbed: Path) -> None:
    before = digests(undisturbed)
    result = CliRunner().invoke(train, ["stdlib", "--out", str(undisturbed), *TINY])
    assert result.exit_code == 0, result.output
    assert "already finished" in result.output
    assert digests(undisturbed) == before


def test_other_settings_on_the_same_directory_are_refused(undisturbed: Path) -> None:
    result = CliRunner().invoke(train, ["stdlib", "--out", str(undisturbed), *TINY, "--lr", "0.5"])
    assert isinstance(result.exception, ChorusError)
    assert "contains another run (lr 0.015 there, 0.5 here)" in str(result.exception)


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = start(out, "--checkpoint-seconds", "0")
    wait_for_steps(out, NUM_STEPS // 2)
    wait_for_members(out, 1)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    assert process.returncode == -signal.SIGKILL
    manifest.verify(manifest.load(out), out)
    checkpoints = sorted((out / "training" / "t0").glob("checkpoint-*.pt"))
    assert len(checkpoints) in (2, 3)  # the kill may fall between writing one and removing the oldest
    checkpoints[-1].write_bytes(checkpoints[-1].read_bytes()[:1000])  # a damaged one falls back to the one before

    process = start(out)
    output = finish(process)
    assert process.returncode == 0, output
    assert digests(out) == digests(undisturbed)
    assert [records(out, idx) for idx in (0, 1)] == [records(undisturbed, idx) for idx in (0, 1)]


def test_killed_at_random_moments_a_run_ends_with_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    """CHORUS_KILLS=20 is the long version: about two minutes."""
    kills, moments, out = int(os.environ.get("CHORUS_KILLS", "3")), random.Random(11), tmp_path / "killed"
    for _ in range(kills):
        process = start(out, "--checkpoint-seconds", "0")
        if moments.random() < 0.3:
            time.sleep(moments.uniform(0, 3))  # while it starts, prepares or finds its checkpoint
        else:
            wait_for_steps(
                out, min(steps_logged(out, 0), steps_logged(out, 1)) + moments.randint(1, max(1, NUM_STEPS // kills))
            )
            time.sleep(moments.uniform(0, 0.05))  # anywhere in a step, a checkpoint, a member
        assert process.poll() is None, finish(process)
        os.killpg(process.pid, signal.SIGKILL)
        finish(process)
        kept = [len(list((out / "training" / f"t{idx}").glob("checkpoint-*.pt"))) for idx in (0, 1)]
        assert max(kept) <= 3  # two, and the one before while it is removed
    process = start(out)
    output = finish(process)
    assert process.returncode == 0, output
    assert digests(out) == digests(undisturbed)
    assert [records(out, idx) for idx in (0, 1)] == [records(undisturbed, idx) for idx in (0, 1)]


def test_sigterm_checkpoints_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    long = ("--cycles", "60")  # it must not end before it is killed, however late that comes
    process = start(out, *long)
    wait_for_steps(out, 5)
    second = CliRunner().invoke(train, ["stdlib", "--out", str(out), *TINY, *long])
    assert "another chorus command is training" in str(second.exception)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Run the same command again" in output
    stopped_at = checkpoints(out)
    assert len(stopped_at) == 2

    process = start(out, *long)
    wait_for_steps(out, 15)
    process.kill()  # the command alone: its processes notice, checkpoint and end, which closes the pipe that finish reads
    finish(process)
    assert checkpoints(out) > stopped_at


def test_a_full_disk_stops_with_a_sentence_and_what_was_finished_is_usable(tmp_path: Path) -> None:
    import resource

    def bound_files() -> (
        None
    ):  # members of 60 kB fit, checkpoints of 360 kB do not: as if the disk ran full at that moment
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    out = tmp_path / "full"
    process = start(out, preexec_fn=bound_files)
    output = finish(process)
    assert process.returncode == 2, output
    assert "File too large" in output
    assert "Members finished so far stay usable" in output
    assert "Traceback" not in output
    population = manifest.load(out)
    manifest.verify(population, out)
    assert {member.name for member in population.members} <= {"t0-c00", "t1-c00"}


def test_a_disk_that_runs_full_stops_the_run_which_goes_on_when_there_is_room(
    undisturbed: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", megabytes=96) as disk:
        out = disk.path / "out"
        process = start(out, "--checkpoint-seconds", "0")
        wait_for_members(out, 1)
        disk.fill()
        output = finish(process)
        assert process.returncode == 2, output
        assert "No space left on device" in output
        assert "run the same command again to continue" in output
        assert "Traceback" not in output
        manifest.verify(manifest.load(out), out)
        disk.make_room()

        process = start(out)
        output = finish(process)
        assert process.returncode == 0, output
        assert digests(out) == digests(undisturbed)
        assert [records(out, idx) for idx in (0, 1)] == [records(undisturbed, idx) for idx in (0, 1)]


def test_a_flipped_bit_in_the_newest_checkpoint_is_told_and_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "flipped"
    process = start(out, "--checkpoint-seconds", "0")
    wait_for_steps(out, NUM_STEPS // 2)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    newest = sorted((out / "training" / "t1").glob("checkpoint-*.pt"))[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)

    process = start(out)
    output = finish(process)
    assert process.returncode == 0, output
    assert f"{newest.name} is damaged" in output
    assert digests(out) == digests(undisturbed)
