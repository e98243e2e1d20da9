"""The processes of a run on one machine: started, listened to, and stopped together."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import IO

from chorus.population.errors import ChorusError
from chorus.population.files import locked
from chorus.train.log import Record
from chorus.train.run import Run

STOPPED = 3
"""Exit status of a process that was told to stop and left a checkpoint."""

# Without these, glibc gives every large activation back to the kernel and faults it in again: steps take up to three times
# as long (bench/LOG.md).
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "MALLOC_TOP_PAD_": "67108864",
}


class Workers:
    """Processes that train the trajectories of a run.

    One per trajectory, as far as there are cores or GPUs; each gets its share of the cores.
    """

    def __init__(self, run: Run, *, checkpoint_seconds: float, student: str | None = None) -> None:
        """With `student`, one process trains that student instead (`train.student`)."""
        self.world, self.threads = plan_processes(run.settings.trajectories)
        self.interrupted_by: int | None = None
        self._records: queue.Queue[Record | None] = queue.Queue()
        self._processes = [
            subprocess.Popen(
                [
                    sys.executable, "-P", "-m", "chorus.train.worker", str(run.directory),
                    "--rank", str(rank), "--world", str(self.world), "--threads", str(self.threads),
                    "--checkpoint-seconds", str(checkpoint_seconds),
                    *(["--student", student] if student else []),
                ],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(self.threads)},
            )
            for rank in range(self.world)
        ]  # fmt: skip
        for process in self._processes:
            assert process.stdout is not None
            threading.Thread(target=self._listen, args=(process.stdout,), daemon=True).start()

    def records(self) -> Iterator[Record]:
        """What the processes say, until all of them have ended. When one fails, the others checkpoint and stop.

        Raises:
            ChorusError: a process failed; the others have stopped with a checkpoint.
        """
        problem: str | None = None
        open_pipes = len(self._processes)
        while open_pipes:
            record = self._records.get()
            if record is None:
                open_pipes -= 1
                failed = [p for p in self._processes if p.poll() not in (None, 0, STOPPED)]
                if failed and problem is None:
                    problem = _describe_failure(failed[0])
            elif record["event"] == "error":
                problem = str(record["message"])
            else:
                yield record
            if problem is not None:
                self.stop()
        for process in self._processes:
            process.wait()
        failed = [process for process in self._processes if process.returncode not in (0, STOPPED)]
        if problem is not None or failed:
            raise ChorusError(problem or _describe_failure(failed[0]))

    @property
    def finished(self) -> bool:
        """Whether every process has trained all of its trajectories."""
        return all(process.returncode == 0 for process in self._processes)

    def stop(self) -> None:
        """Ask every process to checkpoint and end."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """Within the block, SIGINT and SIGTERM stop the processes instead of ending this one."""

        def catch(number: int, frame: FrameType | None) -> None:
            self.interrupted_by = number
            self.stop()

        previous = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.stop()

    def _listen(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                self._records.put(json.loads(line))
        self._records.put(None)


def plan_processes(trajectories: int) -> tuple[int, int]:
    """(processes, threads of each) for so many trajectories on this machine."""
    cores = len(os.sched_getaffinity(0))
    world = min(trajectories, _num_gpus() or cores)
    return world, max(1, cores // world)


def check_compiler() -> None:
    """Refuse `--compile` where it cannot work.

    Raises:
        ChorusError: there is no C++ compiler, which `torch.compile` needs on CPUs and GPUs alike.
    """
    from chorus.train.compiling import has_compiler  # with torch, which other commands start without

    if not has_compiler():
        raise ChorusError(
            "--compile needs a C++ compiler, and there is none (g++ or clang++). Install one, or leave it out."
        )


def _num_gpus() -> int:
    """GPUs that PyTorch can use; a build for CPUs alone need not be imported to know that there are none."""
    if version("torch").endswith("+cpu"):
        return 0
    import torch

    return torch.cuda.device_count()


@contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Hold a run's directory, so that two commands cannot train into it at once.

    Raises:
        ChorusError: another command holds it.
    """
    (directory / "training").mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(directory / "training" / "lock", wait=False))
        except BlockingIOError:
            raise ChorusError(
                f"another chorus train is at work in {directory}. Wait for it, or stop it (it checkpoints), and run again."
            ) from None
        yield


def disk_sentence(error: OSError, directory: Path) -> str:
    """What to say when a file could not be written or read."""
    return (
        f"writing to {error.filename or directory} failed ({error.strerror or error}). Members finished so far stay usable; "
        "free some space and run the same command again to continue."
    )


def _describe_failure(process: "subprocess.Popen[str]") -> str:
    status = process.wait()
    if status == -signal.SIGKILL:
        return (
            "a training process was killed (SIGKILL), most likely for want of memory. Members finished so far stay usable; "
            "run the same command again to continue, or train smaller members into a new --out."
        )
    return f"a training process failed with status {status}; its message stands above. Run the same command again to continue."
