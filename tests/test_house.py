"""The rooms know only what they may: `population/` no other, the others only `population/`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_rooms_stay_apart() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout


def test_the_fast_tests_start_no_engine_and_no_server() -> None:
    files = (ROOT / "tests/check.txt").read_text().split()
    assert files == sorted(set(files))
    for name in files:
        assert "from tests.live import" not in (ROOT / name).read_text(), f"{name} starts servers"
