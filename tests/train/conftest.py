"""One finished tiny run for all tests that only look at such a run."""

from collections.abc import Iterator

import pytest
import torch

from chorus.train.prepare import prepare
from chorus.train.run import Run
from chorus.train.settings import Settings
from chorus.train.trajectory import Trajectory

TINY = Settings(
    corpus="stdlib", max_bytes=40_000, layers=1, width=32, heads=1, context_length=32, vocab_size=300,
    batch_tokens=512, trajectories=2, cycles=2, epochs_per_cycle=1,
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small only lose by a second thread, and a lot where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two trajectories of two members; shared, so leave it as it is or copy its directory."""
    run = prepare(TINY, tmp_path_factory.mktemp("train") / "finished")
    for idx in range(2):
        assert Trajectory(run, idx, torch.device("cpu")).train(lambda record: None, lambda: False)
    return run
