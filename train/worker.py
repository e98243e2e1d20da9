"""A process that trains trajectories of a prepared run and prints JSON lines: `python -m chorus.train.worker DIR`.

Process r of w trains trajectories r, r + w, ...; r and w come from `--rank` and `--world`, or from torchrun's environment. With
`--ranks-per-trajectory N`, under torchrun, N neighbouring processes share each trajectory and average their gradients.
Exit status: 0 all trajectories finished, 2 failed with a message in the last record, 3 stopped after writing a checkpoint.
"""

import argparse
import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch

from chorus.population.errors import ChorusError
from chorus.train import student
from chorus.train.group import joined
from chorus.train.launch import STOPPED, disk_error_message
from chorus.train.log import Record
from chorus.train.run import Run
from chorus.train.trajectory import Trajectory


def main() -> int:
    """Train this process's share of the trajectories, one after the other."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    stop = _StopFlag()
    try:
        run = Run.load(arguments.directory)
        device = choose_device(int(os.environ.get("LOCAL_RANK", arguments.rank)))
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL reduces on the current device
        if arguments.student:
            training = student.training(run, arguments.student, device, checkpoint_seconds=arguments.checkpoint_seconds)
            return 0 if training.train(stop.emit, stop.is_set) else STOPPED
        size = arguments.ranks_per_trajectory
        check_shares(run, size)
        with joined(rank=arguments.rank, world=arguments.world, size=size, device=device) as group:
            for idx in range(arguments.rank // size, run.settings.trajectories, arguments.world // size):
                trajectory = Trajectory(run, idx, device, checkpoint_seconds=arguments.checkpoint_seconds, group=group)
                if not trajectory.train(stop.emit, stop.is_set):
                    return STOPPED
    except ChorusError as error:
        stop.emit({"event": "error", "message": str(error)})
        return 2
    except OSError as error:
        stop.emit({"event": "error", "message": disk_error_message(error, arguments.directory)})
        return 2
    return 0


def check_shares(run: Run, size: int) -> None:
    """Raise ChorusError if a trajectory has more processes than its smallest batch has rows."""
    smallest = min(cycle.batch_rows for idx in range(run.settings.trajectories) for cycle in run.schedule(idx).cycles())
    if not 0 < size <= smallest:
        raise ChorusError(
            f"--ranks-per-trajectory is {size}; expected 1 to {smallest}: the smallest batch has {smallest} rows of "
            f"{run.settings.context_length} tokens. Use fewer, or train into a new --out with larger --batch-tokens."
        )


def choose_device(rank: int) -> torch.device:
    """A GPU, shared if there are more processes than GPUs; the CPU if there is none."""
    count = torch.cuda.device_count()
    return torch.device("cuda", rank % count) if count else torch.device("cpu")


class _StopFlag:
    """Set by SIGTERM, SIGINT, the end of the parent process, or a closed output pipe."""

    def __init__(self) -> None:
        self._set = False
        self._parent = os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._catch)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set or os.getppid() != self._parent

    def emit(self, record: Record) -> None:
        try:
            print(json.dumps(record), flush=True)
        except BrokenPipeError:
            self._set = True
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train trajectories of a prepared run.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rank", type=int, default=int(os.environ.get("RANK", "0")))
    parser.add_argument("--world", type=int, default=int(os.environ.get("WORLD_SIZE", "1")))
    parser.add_argument("--ranks-per-trajectory", type=int, default=1)
    parser.add_argument("--student", help="train this student instead of trajectories")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checkpoint-seconds", type=float, default=60.0)
    return parser.parse_args()


if __name__ == "__main__":
    status = 1
    try:
        status = main()
    except Exception:  # noqa: BLE001 - the process ends with the traceback either way
        traceback.print_exc()
    with suppress(OSError):  # the reader is gone
        sys.stdout.flush()
        sys.stderr.flush()
    # Skip the interpreter's shutdown: gloo's thread may wait for the GIL while the process group, destroyed under the GIL, waits
    # for gloo's thread (seen with PyTorch 2.13: the process never ended).
    os._exit(status)
