import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from chorus.population.errors import ChorusError
from chorus.train.data import Epoch, TrainTokens
from tests.worlds import small_disk

BOS, EOS = 0, 1


@pytest.fixture
def documents() -> list[list[int]]:
    """Documents that no other contains: each has tokens of its own."""
    generator = np.random.default_rng(0)
    return [[BOS, *range(100 * d + 2, 100 * d + 2 + int(generator.integers(1, 90))), EOS] for d in range(20)]


@pytest.fixture
def data(tmp_path: Path, documents: list[list[int]]) -> TrainTokens:
    TrainTokens.save(tmp_path, [len(document) for document in documents], documents)
    return TrainTokens(tmp_path)


def whole(data: TrainTokens, **keys: int) -> list[int]:
    return Epoch(data, **keys).read(0, len(data.tokens)).tolist()


def test_an_epoch_holds_every_document_once_and_whole(data: TrainTokens, documents: list[list[int]]) -> None:
    stream = whole(data, seed=3, trajectory=1, epoch=4)
    starts = [*(idx for idx, token in enumerate(stream) if token == BOS), len(stream)]
    cut = [stream[start:stop] for start, stop in itertools.pairwise(starts)]
    assert sorted(cut) == sorted(documents)
    assert cut != documents, "documents are reshuffled"


def test_order_is_a_function_of_seed_trajectory_and_epoch(data: TrainTokens) -> None:
    first = whole(data, seed=3, trajectory=1, epoch=4)
    assert first == whole(data, seed=3, trajectory=1, epoch=4)
    for other in ({"seed": 4}, {"trajectory": 2}, {"epoch": 5}):
        assert first != whole(data, **{"seed": 3, "trajectory": 1, "epoch": 4, **other})


def test_batches_are_consecutive_cuts_with_targets_one_token_ahead(data: TrainTokens) -> None:
    epoch = Epoch(data, seed=0, trajectory=0, epoch=0)
    stream = epoch.read(0, len(data.tokens))
    num_batches = (len(stream) - 1) // (3 * 16)
    for idx in range(num_batches):
        inputs, targets = epoch.batch(idx, rows=3, length=16)
        assert inputs.shape == targets.shape == (3, 16)
        np.testing.assert_array_equal(inputs.ravel(), stream[idx * 48 : idx * 48 + 48])
        np.testing.assert_array_equal(targets.ravel(), stream[idx * 48 + 1 : idx * 48 + 49])
    with pytest.raises(AssertionError, match="past the end"):
        epoch.batch(num_batches, rows=3, length=16)


def test_damaged_tokens_are_a_sentence(tmp_path: Path, data: TrainTokens) -> None:
    (tmp_path / "train-tokens.npy").write_bytes(b"nonsense")
    with pytest.raises(ChorusError, match=r"cannot be read.*new --out"):
        TrainTokens(tmp_path)


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    save = (
        "import sys; import numpy as np; from pathlib import Path; from chorus.train.data import TrainTokens\n"
        "TrainTokens.save(Path(sys.argv[1]), [1_000_000], [np.zeros(1_000_000, dtype=np.uint32)])"
    )
    with small_disk(tmp_path / "disk", megabytes=2) as disk:
        done = subprocess.run([sys.executable, "-c", save, str(disk.path)], check=False, capture_output=True, text=True)
        assert done.returncode == 1, done  # a SIGBUS would be -7
        assert "No space left on device" in done.stderr
        assert list(disk.path.iterdir()) == []
