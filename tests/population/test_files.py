"""Files under locks: no change of another process is lost, whoever is killed."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chorus.population.files import locked, write_text

COUNT = """
import sys
from pathlib import Path
from chorus.population.files import locked, write_text
path = Path(sys.argv[1])
for _ in range(50):
    with locked(path.with_name("lock")):
        write_text(path, str(int(path.read_text()) + 1))
"""
HOLD = """
import sys, time
from pathlib import Path
from chorus.population.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_processes_that_count_in_one_file_lose_nothing_and_leave_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "count"
    write_text(path, "0")
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, str(path)]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert path.read_text() == "150"
    assert [each.name for each in tmp_path.iterdir()] == ["count"]


def test_threads_lock_each_other_out(tmp_path: Path) -> None:
    inside: list[int] = []

    def hold(idx: int) -> None:
        with locked(tmp_path / "lock"):
            inside.append(idx)
            time.sleep(0.01)
            assert inside == [idx]
            inside.clear()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hold, range(12)))


def test_a_lock_is_refused_while_it_is_held_and_free_after_a_kill(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        with pytest.raises(BlockingIOError), locked(tmp_path / "lock", wait=False):
            pass
        process.kill()
        process.wait(10)
    with locked(tmp_path / "lock", wait=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder") as failure:
        write_text(tmp_path / "folder", "text")
    assert failure.value.filename == str(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
