"""Members made of a finished population: students of the mixture, and weight averages."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.train import member, student
from chorus.train.average import average
from chorus.train.candidates import average as average_command
from chorus.train.candidates import distil
from chorus.train.member import add_member
from chorus.train.run import Run
from chorus.train.snapshot import load_member

CPU = torch.device("cpu")
SMALL = {"layers": 1, "width": 32, "heads": 1, "epochs": 2, "alpha": 0.9, "temperature": 1.0}


@pytest.fixture
def run(finished_run: Run, tmp_path: Path) -> Run:
    """A copy of a finished run."""
    return Run.load(shutil.copytree(finished_run.directory, tmp_path / "pop"))


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(distil if arguments[0] == "distil" else average_command, list(arguments[1:]))
    assert isinstance(result.exception, ChorusError), result.output
    return str(result.exception)


def test_a_student_joins_the_population_and_tells_what_it_learnt(run: Run) -> None:
    result = CliRunner().invoke(distil, [str(run.directory), "--epochs", "2", "--width", "64", "--heads", "2"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "distilled from 4 members" in result.output
    population = manifest.load(run.directory)
    manifest.verify(population, run.directory)
    assert [member.name for member in population.members][-1] == "student"
    new = population.member("student")
    assert (new.epochs, new.teacher, new.cycle) == (2.0, None, None)
    assert load_member(run, "student", CPU).shape.width == 64
    log = run.directory / "training" / "students" / "student" / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records[-1]["event"] == "member"
    assert f"student: {records[-1]['selection_loss']:.4f} nats" in result.output
    assert records[-2]["cross_entropy"] < records[0]["cross_entropy"] - 0.5
    assert "already" in refusal("distil", str(run.directory))


def test_a_student_hears_the_whole_mixture_and_goes_on_after_a_stop(run: Run) -> None:
    tier = manifest.load(run.directory).tiers[-1]
    student.claim(run, "apprentice", student.make_plan(run, tier, **SMALL))
    seen: list[float] = []
    apprentice = student.training(run, "apprentice", CPU)
    assert not apprentice.train(lambda record: seen.append(float(record["loss"])), lambda: len(seen) == 1)
    # The first batch again, with the mixture's probabilities written out.
    fresh = student.training(run, "apprentice", CPU)
    fresh.initialise()
    from chorus.train.data import Epoch, TrainTokens

    epoch = Epoch(TrainTokens(run.directory / "training"), seed=0, trajectory=2, epoch=0)
    cycle = fresh.run.schedule(0).cycles()[0]
    tokens, targets = (torch.from_numpy(part) for part in epoch.batch(0, rows=cycle.batch_rows, length=32))
    log_p = torch.log_softmax(fresh.model(tokens).flatten(0, 1) @ fresh.model.lm_head.weight.T, -1)
    members = [load_member(run, name, CPU) for name in tier.members]
    pooled = sum(
        weight * torch.softmax(member(tokens).flatten(0, 1) @ member.lm_head.weight.T, -1)
        for member, weight in zip(members, tier.weights, strict=True)
    )
    assert isinstance(pooled, torch.Tensor)
    divergence = (pooled * (pooled.log() - log_p)).sum(-1).mean()
    expected = 0.1 * torch.nn.functional.nll_loss(log_p, targets.flatten()) + 0.9 * divergence
    assert seen[0] == pytest.approx(expected.item(), rel=1e-3)  # the steps may run in bfloat16

    other = student.make_plan(run, tier, **{**SMALL, "epochs": 3})
    with pytest.raises(ChorusError, match=r"started in .* with other settings"):
        student.claim(run, "apprentice", other)
    assert student.training(run, "apprentice", CPU).train(lambda record: None, lambda: False)
    log = (run.directory / "training" / "students" / "apprentice" / "log.jsonl").read_text()
    assert log.count('"event": "step"') == cycle.steps


def test_an_average_has_the_mean_of_its_members_weights(run: Run) -> None:
    result = CliRunner().invoke(average_command, [str(run.directory), "--last", "2"])
    assert result.exit_code == 0, (result.output, result.exception)
    population = manifest.load(run.directory)
    manifest.verify(population, run.directory)
    assert [member.name for member in population.members][-2:] == ["t0-a02", "t1-a02"]
    parts = [load_member(run, name, CPU) for name in ("t1-c00", "t1-c01")]
    for mean, one, other in zip(average(run, 1, 2).parameters(), *(m.parameters() for m in parts), strict=True):
        torch.testing.assert_close(mean, (one + other) / 2)
    assert "already has the averages of the last 2 members" in refusal("average", str(run.directory), "--last", "2")
    assert "expected 2 to 2" in refusal("average", str(run.directory), "--last", "3")


def test_an_average_that_was_interrupted_is_completed_by_the_same_command(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def killed(*arguments: object, **keys: object) -> float:
        if made:
            raise KeyboardInterrupt
        made.append(arguments[2])
        return add_member(*arguments, **keys)  # type: ignore[arg-type]

    monkeypatch.setattr(member, "add_member", killed)
    command = [str(run.directory), "--last", "2"]
    assert CliRunner().invoke(average_command, command).exit_code == 1
    monkeypatch.undo()
    names = [each.name for each in manifest.load(run.directory).members]
    assert names[-1:] == made == ["t0-a02"]
    first = manifest.load(run.directory).member("t0-a02").sha256

    result = CliRunner().invoke(average_command, command)

    assert result.exit_code == 0, (result.output, result.exception)
    population = manifest.load(run.directory)
    manifest.verify(population, run.directory)
    assert [each.name for each in population.members] == [*names, "t1-a02"]
    assert population.member("t0-a02").sha256 == first
    assert "t1-a02: " in result.output
    assert "already" in refusal("average", *command)


def test_a_damaged_member_is_neither_averaged_nor_a_teacher(run: Run) -> None:
    file = run.directory / "members" / "t1-c00" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    assert "'t1-c00': " in refusal("average", str(run.directory), "--last", "2")
    tier = manifest.load(run.directory).tiers[-1]
    student.claim(run, "apprentice", student.make_plan(run, tier, **SMALL))
    with pytest.raises(ChorusError, match=r"'t1-c00': .* changed or damaged"):
        student.training(run, "apprentice", CPU).train(lambda record: None, lambda: False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tier", "none-such"], "none-such"),
        (["--epochs", "0"], "--epochs-per-cycle is 0"),
        (["--alpha", "2"], "--distil-alpha is 2.0"),
        (["--width", "48"], "heads of size 48"),
    ],
)
def test_students_that_cannot_be_meant(arguments: list[str], sentence: str, finished_run: Run) -> None:
    assert sentence in refusal("distil", str(finished_run.directory), *arguments)


def test_without_a_finished_run_there_is_nothing_to_distil(finished_run: Run, tmp_path: Path) -> None:
    assert "no prepared training run" in refusal("distil", str(tmp_path))
    copy = shutil.copytree(finished_run.directory, tmp_path / "unfinished")
    population = manifest.load(copy)
    manifest.save(population.model_copy(update={"members": population.members[:-1]}).with_uniform_tiers(), copy)
    assert "is not finished" in refusal("distil", str(copy))
    assert "is not finished" in refusal("average", str(copy))
