"""What a run leaves behind for people: the report, its figures and its picture."""

import json

import numpy as np
import pytest
import torch

from chorus.population.tokens import TokenSplit, split_path
from chorus.train import diversity, heldout, report
from chorus.train.run import Run, diversity_path, likelihoods_path
from chorus.train.snapshot import load_member

CPU = torch.device("cpu")


@pytest.fixture
def run(finished_run: Run) -> Run:
    """Two trajectories of two members."""
    return finished_run


def test_results_follow_the_members_and_their_mixture(run: Run) -> None:
    found = report.results(run)
    assert [result.name for result in found] == ["t0-c00", "t1-c00", "t0-c01", "t1-c01"]
    assert [result.total_epochs for result in found] == [2, 2, 4, 4]
    likelihoods = [np.load(likelihoods_path(run, result.name)) for result in found]
    for count, result in enumerate(found, start=1):
        assert result.loss == pytest.approx(heldout.loss(likelihoods[count - 1]))
        assert result.mixture == pytest.approx(heldout.mixture_loss(likelihoods[:count]), abs=1e-6)


def test_divergences_are_those_of_the_members_own_distributions(run: Run) -> None:
    names = [result.name for result in report.results(run)]
    found = diversity.divergences([diversity_path(run, name) for name in names])
    assert np.allclose(np.diag(found), 0, atol=1e-9)
    split = TokenSplit.load(split_path(run.directory, "selection"))
    one, other = (
        diversity.sampled_log_p(load_member(run, name, CPU), split).astype(np.float64) for name in (names[0], names[3])
    )
    assert np.allclose(np.exp(one).sum(axis=1), 1, atol=5e-3)
    assert found[0, 3] == pytest.approx((np.exp(one) * (one - other)).sum(axis=1).mean(), rel=1e-2)
    assert found[0, 3] > 0


def test_the_report_holds_every_member_and_a_picture(run: Run) -> None:
    path = report.write_report(run)
    text = path.read_text()
    for result in report.results(run):
        assert f"| {result.name} | {result.epochs:g} | {result.loss:.4f} | {result.mixture:.4f} |" in text
    assert "Mean KL between members of different trajectories" in text
    assert "| lr | 0.015 |" in text
    assert (run.directory / report.PNG).read_bytes().startswith(b"\x89PNG")
    assert report.PNG.name in text


def test_tensorboard_holds_what_was_logged(run: Run) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from chorus.train import watch

    lines = (run.directory / "training" / "t1" / "log.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    assert list(watch.recorded(run, logged)) == logged
    events = EventAccumulator(str(run.directory / "training" / "tensorboard" / "t1")).Reload()
    rates = [(event.step, event.value) for event in events.Scalars("train/learning_rate")]
    steps = [record for record in logged if record["event"] == "step"]
    assert rates == [(record["step"], pytest.approx(record["learning_rate"])) for record in steps]
    assert len(events.Scalars("selection/loss")) == run.settings.cycles


def test_a_run_of_an_older_version_has_a_report_without_divergences(run: Run) -> None:
    hidden = diversity_path(run, "t0-c00")
    kept = hidden.read_bytes()
    hidden.unlink()
    assert "Mean KL" not in report.write_report(run).read_text()
    hidden.write_bytes(kept)
