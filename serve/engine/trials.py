"""Runs a function on each input in a process of its own, so that one that hangs, grows or crashes affects nothing else.

A server process, forked early while this one is small and has no threads, prepares what the function needs and forks again for each
job. A job therefore starts with everything loaded, and can be killed.
"""

import asyncio
import gc
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

_PARALLEL = max(1, min(2, (os.cpu_count() or 1) // 4))
_MAX_PENDING = 32
NICENESS = 5
"""Niceness of grammar compilation relative to the engine. At a lower priority, a busy engine would leave it no CPU time."""
_WALL_FACTOR = 3
"""Limit on a job's wall time, as a multiple of its CPU time limit, for busy machines."""


class BusyError(Exception):
    """Too many jobs are waiting, or the server process is gone."""


class Trials:
    """Runs `prepare()(job)` for each job, in a process of its own."""

    def __init__(self, prepare: Callable[[], Callable[[bytes], bytes]], *, cpu_s: float, memory_bytes: int) -> None:
        """Fork the server. A job may use `cpu_s` of CPU time, and `memory_bytes` on top of what was prepared."""
        self._wall_s = _WALL_FACTOR * cpu_s
        self._slots = asyncio.Semaphore(_PARALLEL)
        self._num_pending = 0
        self._control, child_end = socket.socketpair()
        if os.fork() == 0:
            _serve_jobs(child_end, prepare, cpu_s, memory_bytes)
        child_end.close()

    def close(self) -> None:
        """End the server process."""
        self._control.close()

    async def run(self, job: bytes) -> bytes | None:
        """The job's result; None if it exceeded a limit or crashed. Shield this call: cancelling it does not stop the job.

        Raises:
            BusyError: the job was not run.
        """
        if self._num_pending >= _MAX_PENDING:
            raise BusyError
        self._num_pending += 1
        try:
            async with self._slots:
                return await self._run(job)
        except OSError as error:
            raise BusyError from error
        finally:
            self._num_pending -= 1

    async def _run(self, job: bytes) -> bytes | None:
        parent_end, child_end = socket.socketpair()
        with parent_end, child_end:
            socket.send_fds(self._control, [b"."], [child_end.fileno()])
            reader, writer = await asyncio.open_unix_connection(sock=parent_end.dup())
        try:
            writer.write(job)
            writer.write_eof()
            return await reader.read() or None
        finally:
            writer.close()


def _serve_jobs(
    control: socket.socket, prepare: Callable[[], Callable[[bytes], bytes]], cpu_s: float, memory_bytes: int
) -> NoReturn:
    """The server process. Never returns into the parent's code."""
    try:
        _detach(control)
        run = prepare()
        gc.freeze()  # so that garbage collection in children does not copy shared pages
        while (message := socket.recv_fds(control, 1, 1))[0]:
            with socket.socket(fileno=message[1][0]) as connection:
                if os.fork() == 0:
                    _run_job(connection, run, cpu_s, memory_bytes)
    except BaseException:  # noqa: BLE001 - there is no caller to raise to
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


def _detach(control: socket.socket) -> None:
    """Reset what was inherited from the parent: signal handlers, open files (including listening sockets) and priority."""
    signal.set_wakeup_fd(-1)
    for signum in (signal.SIGTERM, signal.SIGALRM, signal.SIGPROF):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end ends this process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    os.closerange(3, control.fileno())
    os.closerange(control.fileno() + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    os.nice(NICENESS)


def _run_job(connection: socket.socket, run: Callable[[bytes], bytes], cpu_s: float, memory_bytes: int) -> NoReturn:
    try:
        _limit(cpu_s, memory_bytes)
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
        connection.sendall(run(b"".join(parts)))
    finally:
        os._exit(0)


def _limit(cpu_s: float, memory_bytes: int) -> None:
    """Have the kernel kill this process at its limits: nothing else stops native code that never returns to Python."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
        Path("/proc/self/oom_score_adj").write_text("1000")
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, _WALL_FACTOR * cpu_s)
