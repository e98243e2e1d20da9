"""A trajectory in this process: stopped, crashed and diverged at many moments, which costs too much with whole processes."""

import logging
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.train import schedule
from chorus.train.checkpoint import load_checkpoint
from chorus.train.log import Record
from chorus.train.prepare import prepare
from chorus.train.run import Run
from chorus.train.settings import Settings
from chorus.train.trajectory import Trajectory

TINY = Settings(
    corpus="stdlib", max_bytes=60_000, layers=1, width=32, heads=1, context_length=32, vocab_size=300,
    batch_tokens=512, trajectories=1, cycles=3, epochs_per_cycle=1,
)  # fmt: skip
CPU = torch.device("cpu")


class Crash(BaseException):
    """What a SIGKILL looks like to the files on disk: nothing runs after it."""


def train_whole(run: Run) -> None:
    assert Trajectory(run, 0, CPU).train(lambda record: None, lambda: False)


def train_until(run: Run, records: int, moments: random.Random) -> bool:
    """Train until so many records are written, then crash or stop; True when the trajectory is finished first."""
    written: list[Record] = []
    crashes = moments.random() < 0.5

    def emit(record: Record) -> None:
        written.append(record)
        if crashes and len(written) == records:
            raise Crash

    trajectory = Trajectory(run, 0, CPU, checkpoint_seconds=moments.choice([0.0, 1e9]))
    try:
        return trajectory.train(emit, lambda: not crashes and len(written) >= records)
    except Crash:
        return False


def digests(run: Run) -> list[dict[str, str]]:
    return [member.sha256 for member in manifest.load(run.directory).members]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = prepare(TINY, tmp_path_factory.mktemp("trajectory") / "undisturbed")
    train_whole(run)
    return run


def test_crashes_and_stops_at_twenty_moments_change_nothing(undisturbed: Run, tmp_path: Path) -> None:
    run = prepare(TINY, tmp_path / "disturbed")
    moments = random.Random(5)
    disturbances = 0
    while not train_until(run, moments.randint(1, 9) if disturbances < 20 else 10**9, moments):
        disturbances += 1
    assert disturbances == 20
    assert digests(run) == digests(undisturbed)


def test_divergence_stops_with_the_step_and_what_to_try(tmp_path: Path) -> None:
    settings = Settings(**{**vars(TINY), "lr": 1e25})
    run = prepare(settings, tmp_path / "diverged")
    with pytest.raises(ChorusError, match=r"trajectory 0, step \d+ .* diverged: .*lower --lr \(try 3.3e\+24\)"):
        train_whole(run)


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    def first_steps(name: str, tokens: int | None) -> list[Record]:
        records: list[Record] = []
        run = prepare(Settings(**{**vars(TINY), "micro_batch_tokens": tokens}), tmp_path / name)
        Trajectory(run, 0, CPU).train(records.append, lambda: len(records) >= 5)
        return records

    whole = first_steps("whole", None)
    parts = first_steps("parts", 160)  # 5 rows of 16, so the last part is smaller
    for one, other in zip(whole, parts, strict=True):
        assert one["cross_entropy"] == pytest.approx(other["cross_entropy"], rel=1e-4)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-2)


def test_the_teacher_begins_when_the_trajectory_is_saturated_also_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        schedule, "SATURATED_GAIN", 0.1
    )  # so small a model saturates late; the fourth cycle gains 0.05 here
    run = prepare(
        Settings(**{**vars(TINY), "distil_after": "saturation", "cycles": 6, "max_bytes": 30_000}), tmp_path / "run"
    )
    records: list[Record] = []

    def two_steps_into_the_fifth_cycle() -> bool:
        return [record.get("cycle") for record in records[-3:]] == [None, 4, 4]

    assert not Trajectory(run, 0, CPU).train(records.append, two_steps_into_the_fifth_cycle)
    assert Trajectory(run, 0, CPU).train(records.append, lambda: False)
    losses = [float(record["selection_loss"]) for record in records if record["event"] == "member"]
    begin = next(cycle for cycle in range(2, 7) if schedule.saturated(losses[:cycle]))
    assert 2 < begin < 6, "otherwise this shows nothing"
    teachers = [f"t0-c{cycle - 1:02d}" if cycle >= begin else None for cycle in range(6)]
    assert [member.teacher for member in manifest.load(run.directory).members] == teachers
    steps = [record for record in records if record["event"] == "step"]
    taught = {record["cycle"] for record in steps if record["loss"] != record["cross_entropy"]}
    assert taught == set(range(begin, 6))


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # PyTorch's compiler
def test_compiled_steps_are_those_of_plain_ones_to_rounding_also_after_a_stop(tmp_path: Path) -> None:
    settings = Settings(**{**vars(TINY), "cycles": 2, "max_bytes": 20_000})
    records: dict[str, list[Record]] = {"plain": [], "compiled": [], "stopped": []}
    runs = {}
    for name, found in records.items():
        runs[name] = prepare(replace(settings, compile=name != "plain"), tmp_path / name)
        if name == "stopped":
            assert not Trajectory(runs[name], 0, CPU).train(found.append, lambda: len(found) >= 20)  # noqa: B023 - at once
        assert Trajectory(runs[name], 0, CPU).train(found.append, lambda: False)
    # Not to the bit, also after a stop: what is compiled anew may be compiled otherwise (seen where vLLM was loaded before).
    steps = {name: [record for record in found if record["event"] == "step"] for name, found in records.items()}
    assert len(steps["plain"]) == len(steps["compiled"]) == len({record["step"] for record in steps["stopped"]}) > 20
    for one, other in zip(records["plain"][:5], records["compiled"][:5], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
    last, *compiled = (found[-1]["cross_entropy"] for found in steps.values())
    assert compiled == pytest.approx([last, last], rel=0.03)


def test_a_restart_begins_the_next_cycle_as_if_it_were_the_first(tmp_path: Path) -> None:
    run = prepare(Settings(**{**vars(TINY), "restart": True}), tmp_path / "restarts")
    records: list[Record] = []
    Trajectory(run, 0, CPU).train(records.append, lambda: records[-2:-1] != [] and records[-2]["event"] == "member")
    other = Trajectory(run, 0, CPU)
    position = load_checkpoint(other.directory, other.model, other.step.optimiser)
    assert position is not None
    assert (position.cycle, position.step) == (1, 1), "stopped after the first step behind the boundary"
    assert other.step.optimiser.num_steps == 1, "the optimiser's state does not cross the boundary"
    assert Trajectory(run, 0, CPU).train(records.append, lambda: False)
    starts = [cycle.first_step for cycle in run.schedule(0).cycles()]
    first = [float(r["cross_entropy"]) for r in records if r["event"] == "step" and r["step"] in starts]
    assert first == pytest.approx([math.log(300)] * 3, abs=0.1), "each cycle begins with a model that knows nothing"
    assert len(set(first)) == 3, "but not with the same one"
    assert [member.teacher for member in manifest.load(run.directory).members] == [None, "t0-c00", "t0-c01"]


def test_without_distillation_no_member_has_a_teacher(tmp_path: Path) -> None:
    run = prepare(Settings(**{**vars(TINY), "distil_alpha": 0.0, "cycles": 2}), tmp_path / "plain")
    records: list[Record] = []
    Trajectory(run, 0, CPU).train(records.append, lambda: False)
    assert [member.teacher for member in manifest.load(run.directory).members] == [None, None]
    assert all(record["loss"] == record["cross_entropy"] for record in records if record["event"] == "step")


def flip(path: Path, moments: random.Random) -> None:
    """Change one bit in the middle half of a file, where the weights are."""
    content = bytearray(path.read_bytes())
    content[moments.randrange(len(content) // 4, 3 * len(content) // 4)] ^= 1 << moments.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_flipped_bit_in_a_checkpoint_is_found_and_told(
    undisturbed: Run, tmp_path: Path, damaged: int, caplog: pytest.LogCaptureFixture
) -> None:
    run, moments = prepare(TINY, tmp_path / "flipped"), random.Random(damaged)
    home = run.directory / "training" / "t0"

    def train_for(records: int) -> None:
        written: list[Record] = []
        trajectory = Trajectory(run, 0, CPU, checkpoint_seconds=0.0)
        assert not trajectory.train(written.append, lambda: len(written) >= records)

    train_for(12)
    checkpoints = sorted(home.glob("checkpoint-*.pt"))
    assert len(checkpoints) == 2
    for path in checkpoints[2 - damaged :]:
        flip(path, moments)
    with caplog.at_level(logging.WARNING):
        train_for(3)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (1 if damaged == 1 else 3)
    for path, line in zip(checkpoints[::-1][:damaged], told, strict=False):
        assert path.name in line
        assert "trying the previous checkpoint" in line
    assert ("starts again" in told[-1]) == (damaged == 2)
    left = sorted(home.glob("checkpoint-*.pt"))
    assert len(left) == 2  # those of now: damaged ones of a later step do not push them out
    caplog.clear()
    train_whole(run)
    assert caplog.records == []
    assert digests(run) == digests(undisturbed)
