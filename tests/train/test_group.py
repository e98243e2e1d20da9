"""Several processes on one trajectory, as torchrun starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chorus.population.errors import ChorusError
from chorus.train.group import Group, joined
from chorus.train.prepare import prepare
from chorus.train.run import Run
from chorus.train.settings import Settings
from chorus.train.snapshot import load_member
from chorus.train.trajectory import Trajectory
from chorus.train.worker import check_shares

# Batches of 3 rows: two processes have unequal shares of them. The second cycle has a teacher.
TINY = Settings(
    corpus="stdlib", max_bytes=40_000, layers=1, width=32, heads=1, context_length=128, vocab_size=300,
    batch_tokens=384, trajectories=1, cycles=2, epochs_per_cycle=1, lr=0.005,
)  # fmt: skip
CPU = torch.device("cpu")


def steps(run: Run) -> list[dict[str, float]]:
    lines = (run.directory / "training" / "t0" / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == "step"]


def test_two_processes_under_torchrun_have_the_losses_of_one_with_the_same_batches(tmp_path: Path) -> None:
    alone, together = prepare(TINY, tmp_path / "alone"), prepare(TINY, tmp_path / "together")
    assert Trajectory(alone, 0, CPU).train(lambda record: None, lambda: False)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "chorus.train.worker", str(together.directory), "--ranks-per-trajectory", "2", "--threads", "1",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert together.finished
    expected, found = steps(alone), steps(together)
    assert len(found) == len(expected) > 30
    for before, after in zip(expected, found, strict=True):
        # The first step shows the average; then Adam turns roundings of tiny gradients into steps, and they grow.
        first = before["step"] == 0
        for key in ("loss", "cross_entropy"):
            assert after[key] == pytest.approx(before[key], rel=2e-6 if first else 2e-3), (
                f"{key} at step {before['step']}"
            )
        assert after["gradient_norm"] == pytest.approx(before["gradient_norm"], rel=1e-4 if first else 5e-2)
    ours, theirs = load_member(alone, "t0-c01", CPU), load_member(together, "t0-c01", CPU)
    one, other = (torch.nn.utils.parameters_to_vector(model.parameters()) for model in (ours, theirs))
    assert (one - other).norm() < 0.02 * one.norm()  # not element by element: on CPUs with AMX some differ by 0.03


@pytest.mark.parametrize("batch_rows", [3, 4, 17])
def test_shares_cover_every_row_once(batch_rows: int) -> None:
    rows = list(range(batch_rows))
    shares = [rows[Group(rank=rank, size=3).rows(batch_rows)] for rank in range(3)]
    assert [row for share in shares for row in share] == rows
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_processes_that_make_no_whole_groups_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ChorusError, match="--ranks-per-trajectory 2 does not divide the 3 processes"):
        joined(rank=0, world=3, size=2, device=CPU).__enter__()
    run = prepare(TINY, tmp_path / "run")
    with pytest.raises(ChorusError, match="--ranks-per-trajectory is 4; expected 1 to 3"):
        check_shares(run, 4)
