"""Run the gateway's own engine: launch it under a guard, wait until it answers, restart it when it dies, never leave it behind."""

import asyncio
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from chorus.population.errors import ChorusError
from chorus.serve.gateway.engines.causes import root_cause
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.life import Processes

logger = logging.getLogger(__name__)

_MAX_PAUSE_S = 30.0
_MAX_LOG_BYTES = 256 * 1024
_PORTS = range(20_000, 32_768)  # Linux assigns 32768 and above to bind(0) and outgoing connections
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the model runner that the engine's plugin supports
}
_DEFAULT_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default vLLM takes half of the machine's memory. No effect on GPUs
}


_GATEWAY_ARGUMENTS = ("--model", "--host", "--port", "--uds", "--served-model-name", "--api-key")


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """How the gateway runs its own engine."""

    directory: Path
    """The population directory, which the engine loads."""
    arguments: tuple[str, ...] = ()
    """Further arguments for the engine, as `vllm serve` takes them."""
    log: Path | None = None
    """File for the engine's output; None passes it through to the gateway's output."""
    start_timeout_s: float = 1800.0
    """Longest time from launch until the engine must answer."""
    stop_timeout_s: float = 10.0
    """Time from the request to stop until the engine is killed."""
    max_quick_failures: int = 5
    """Number of failures in a row, each soon after a start, after which the gateway gives up."""
    steady_after_s: float = 60.0
    """A failure after serving this long does not count as quick."""

    def __post_init__(self) -> None:
        for argument in self.arguments:
            if argument.split("=")[0].replace("_", "-") in _GATEWAY_ARGUMENTS:
                raise ChorusError(
                    f"engine argument {argument!r} is set by the gateway; leave it out. "
                    "To choose it yourself, start the engine with `vllm serve` and pass its address with --engine."
                )


class EngineFailedError(Exception):
    """The engine cannot be kept running. The message gives the cause, or shows the end of its log."""


def engine_command(name: str, engine: Supervision, port: int) -> list[str]:
    """The command that serves the population directory as model `name` on a local port.

    The server behind `vllm serve`, whose front looks up the metadata of a package `vllm` that the CPU build does not have.
    """
    return [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.launchers.api_server.entry"),
        *("--model", str(engine.directory.resolve()), "--served-model-name", name),
        *("--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"),
        *engine.arguments,
    ]


class Supervisor:
    """Keeps one engine process running and records its state in `engine`."""

    def __init__(self, engine: Engine, settings: Supervision, command: Callable[[int], list[str]]) -> None:
        self._engine = engine
        self._settings = settings
        self._command = command
        self._log_begin = 0
        """Offset in the log at which this life begins."""

    async def run(self, on_up: Callable[[float], None]) -> None:
        """Launch the engine and relaunch it whenever it ends, until cancelled; then stop it.

        `on_up` is called with the start time in seconds whenever the engine begins to answer.

        Raises:
            EngineFailedError: the first start failed, or too many lives in a row ended quickly.
        """
        quick_failures, has_served = 0, False
        while True:
            pause_s = 0.0 if quick_failures <= 1 else min(2.0 ** (quick_failures - 2), _MAX_PAUSE_S)
            self._engine.mark_down(launch_in_s=pause_s)
            await asyncio.sleep(pause_s)
            served_s = await self._run_once(on_up)
            has_served = has_served or served_s is not None
            is_steady = served_s is not None and served_s >= self._settings.steady_after_s
            quick_failures = 0 if is_steady else quick_failures + 1
            if not has_served:
                raise EngineFailedError(self._explain("the engine did not start"))
            if quick_failures >= self._settings.max_quick_failures:
                raise EngineFailedError(self._explain(f"the engine failed {quick_failures} times in a row"))
            self._engine.num_restarts += 1
            self._engine.on_restart()
            logger.warning("the engine ended; restarting it, requests get 503 until it is up")

    async def _run_once(self, on_up: Callable[[float], None]) -> float | None:
        """One life of the engine. Returns the seconds that it served, or None if it never answered."""
        launched_at = time.monotonic()
        port = _free_port()
        process = await self._launch(port)
        life = self._engine.begin_life(f"http://127.0.0.1:{port}", Processes(process.pid))
        watch: asyncio.Task[None] | None = None
        try:
            if not await self._wait_until_ready(process):
                return None
            start_s = time.monotonic() - launched_at
            self._engine.mark_up(start_s=start_s)
            on_up(start_s)
            watch = asyncio.create_task(self._engine.watch())
            ends = {asyncio.create_task(process.wait()), asyncio.create_task(life.frozen.wait())}
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for end in ends:
                    end.cancel()
            return time.monotonic() - launched_at - start_s
        finally:
            if watch is not None:
                watch.cancel()
            self._engine.mark_down(launch_in_s=0)
            await self._end(process)

    async def _launch(self, port: int) -> Process:
        environment = {**_DEFAULT_ENVIRONMENT, **os.environ, **_ENVIRONMENT}
        guard = [sys.executable, "-P", "-m", "chorus.serve.gateway.engines.guard", f"{self._settings.stop_timeout_s:g}"]
        log = None if self._settings.log is None else self._settings.log.open("ab")
        self._log_begin = 0 if log is None else log.seek(0, os.SEEK_END)
        try:
            return await asyncio.create_subprocess_exec(
                *guard,
                *self._command(port),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=None if log is None else subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal must reach only the gateway, which drains first
            )
        finally:
            if log is not None:
                log.close()

    async def _wait_until_ready(self, process: Process) -> bool:
        deadline = time.monotonic() + self._settings.start_timeout_s
        while process.returncode is None and time.monotonic() < deadline:
            if await self._engine.answers_probe():
                return True
            await asyncio.sleep(0.2)
        return False

    async def _end(self, process: Process) -> None:
        """Have the guard stop the engine, wait, and kill what is left of the process group."""
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(self._settings.stop_timeout_s + 5):
                await process.wait()
        except TimeoutError:
            logger.warning("the engine did not stop in time; killing it")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _explain(self, what: str) -> str:
        if (log := self._settings.log) is None:
            return f"{what}; see its output above."
        text = _read_end(log, self._log_begin)
        cause = root_cause(text)
        return f"{what}: {cause}\nIts log: {log}" if cause else f"{what}. The end of its log, {log}:\n{tail(text)}"


def tail(log: str, num_lines: int = 15) -> str:
    """The last non-blank lines of a log, indented."""
    return "\n".join([f"  {line}" for line in log.splitlines() if line.strip()][-num_lines:])


def _read_end(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(max(begin, file.seek(0, os.SEEK_END) - _MAX_LOG_BYTES))
        return file.read().decode(errors="replace")


def _free_port() -> int:
    """A free port below the range that operating systems assign themselves.

    The engine binds it seconds later: a port of that range might go to another process first, which could then answer the probe.
    """
    for port in random.sample(_PORTS, len(_PORTS)):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise EngineFailedError(
        f"no free port for the engine from {_PORTS.start} to {_PORTS.stop - 1}; stop other servers on this machine"
    )
