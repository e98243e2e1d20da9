"""Starts and stops the training processes of a run on one machine, and collects their records."""

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
"""Exit status of a process that stopped on request after writing a checkpoint."""

# Without these, glibc returns every large activation to the kernel and faults it in again, and steps take up to three times as long
# (bench/LOG.md).
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "MALLOC_TOP_PAD_": "67108864",
}


class Workers:
    """Processes that train the trajectories of a run: one per trajectory, at most one per GPU or else per core.

    Cores are divided evenly among them.
    """

    def __init__(self, run: Run, *, checkpoint_seconds: float, student: str | None = None) -> None:
        """With `student`, one process trains that student instead; `run` is then its `student_run` (see `train.student`)."""
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
            threading.Thread(target=self._collect, args=(process.stdout,), daemon=True).start()

    def records(self) -> Iterator[Record]:
        """Records of all processes, until all have ended. If one fails, the others write a checkpoint and stop.

        Raises:
            ChorusError: a process failed; the others have stopped after writing a checkpoint.
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
        """Whether every process has finished all its trajectories."""
        return all(process.returncode == 0 for process in self._processes)

    def stop(self) -> None:
        """Send SIGTERM to every process, which then writes a checkpoint and ends."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """Inside the block, SIGINT and SIGTERM stop the training processes instead of ending this one."""

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

    def _collect(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                self._records.put(json.loads(line))
        self._records.put(None)


def plan_processes(trajectories: int) -> tuple[int, int]:
    """(number of processes, threads per process) for a number of trajectories on this machine."""
    cores = len(os.sched_getaffinity(0))
    world = min(trajectories, _num_gpus() or cores)
    return world, max(1, cores // world)


def check_compiler() -> None:
    """Check that `--compile` can work.

    Raises:
        ChorusError: there is no C++ compiler, which `torch.compile` needs on CPUs and GPUs.
    """
    from chorus.train.compiling import has_compiler  # imports torch, which other commands do not need

    if not has_compiler():
        raise ChorusError(
            "--compile needs a C++ compiler (g++ or clang++), and none is installed. Install one, or drop --compile."
        )


def _num_gpus() -> int:
    """GPUs that PyTorch can use. A CPU-only build has none, so it is not imported."""
    if version("torch").endswith("+cpu"):
        return 0
    import torch

    return torch.cuda.device_count()


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Lock a run's directory, so that two commands cannot train into it at once.

    Raises:
        ChorusError: another command has locked it.
    """
    (directory / "training").mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(directory / "training" / "lock", wait=False))
        except BlockingIOError:
            raise ChorusError(
                f"another chorus command is training in {directory}. "
                "Wait for it, or stop it (it writes a checkpoint), then run this again."
            ) from None
        yield


def disk_error_message(error: OSError, directory: Path) -> str:
    """The message for a file that could not be written or read."""
    return (
        f"writing to {error.filename or directory} failed ({error.strerror or error}). Members finished so far stay usable. "
        "Free some space and run the same command again to continue."
    )


def _describe_failure(process: "subprocess.Popen[str]") -> str:
    status = process.wait()
    if status == -signal.SIGKILL:
        return (
            "a training process was killed (SIGKILL), most likely because memory ran out. Members finished so far stay usable. "
            "Run the same command again to continue, or train smaller members into a new --out."
        )
    return (
        f"a training process failed with status {status}; its message is above. Run the same command again to continue."
    )
