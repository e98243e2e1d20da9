"""A process between the gateway and its engine, so that no engine outlives its gateway, however the gateway ends.

It runs a command as its child in a process group of its own, and ends the whole group when the child ends (an engine is several
processes and needs them all) or when its input pipe closes, whose other end only the gateway holds: the gateway closed it or was
killed. If the guard is killed, the kernel kills the child, and the gateway, on seeing the guard end, kills the rest of the group.
Usage: python -m chorus.serve.gateway.engines.guard STOP_TIMEOUT_S COMMAND [ARGUMENT...], with the pipe as standard input.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_NICENESS = 10


def main(stop_timeout_s: float, command: list[str]) -> None:
    """Run `command` until it ends or standard input closes, then kill the whole group, this process included."""
    if os.getpgrp() != os.getpid():
        os.setsid()
    _lower_priority()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
    threading.Thread(target=_stop_when_input_closes, args=(child, stop_timeout_s), daemon=True).start()
    status = child.wait()
    print(f"engine process ended with status {status}", flush=True)
    os.killpg(0, signal.SIGKILL)


def _lower_priority() -> None:
    """Lower the engine's priority: the gateway needs little processor time, but needs it at once.

    An engine on CPUs keeps all of them busy even while it waits (OpenMP's threads spin). A gateway beside it waited milliseconds
    for each event, and most of the throughput was lost (bench/LOG.md). Where sessions are scheduled as groups, niceness counts
    only within a group, and the group has a niceness of its own.
    """
    os.nice(_NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(_NICENESS))


def _stop_when_input_closes(child: "subprocess.Popen[bytes]", stop_timeout_s: float) -> None:
    sys.stdin.buffer.read()
    child.terminate()
    try:
        child.wait(stop_timeout_s)
    except subprocess.TimeoutExpired:
        print(f"engine process did not stop within {stop_timeout_s:g} s; killing it", flush=True)
    os.killpg(0, signal.SIGKILL)


def _die_with_parent() -> None:
    """Have the kernel kill this process with its parent. Linux only; elsewhere the pipe and the process group must suffice."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
