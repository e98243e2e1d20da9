"""The rooms know only what they may: `population/` no other, the others only `population/`."""

import subprocess
import sys
from pathlib import Path


def test_the_rooms_stay_apart() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    finished = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout
