"""Live servers for tests: `chorus serve` as a user starts it, and any ASGI app behind uvicorn in a thread."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

# What makes an engine start soon on two cores, and its arithmetic exact enough to compare.
ENGINE_ARGUMENTS = (
    *("--dtype", "float32", "--enforce-eager", "--distributed-executor-backend", "uni"),
    *("--block-size", "32", "--max-num-seqs", "16", "--max-logprobs", "-1"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)


def wait_for(what: str, condition: Callable[[], Any], *, timeout_s: float) -> Any:
    """Wait until `condition` gives something true, and return it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise TimeoutError(f"{what}: not within {timeout_s} s")


class ChorusServe:
    """A running `chorus serve`."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, output: Path) -> None:
        self.process = process
        self.url = url
        self._output = output

    @property
    def output(self) -> str:
        """What it printed so far."""
        return self._output.read_text()

    @property
    def engine_url(self) -> str:
        """Where its engine listens since its latest start."""
        return re.findall(r"engine (http://\S+)", self.output)[-1]

    def is_ready(self) -> bool:
        """Whether it serves requests."""
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_until_ready(self, timeout_s: float = 300) -> None:
        """Return when it serves requests."""

        def ready_or_ended() -> bool:
            assert self.process.poll() is None, f"chorus serve ended:\n{self.output}"
            return self.is_ready()

        wait_for("ready", ready_or_ended, timeout_s=timeout_s)

    def stop(self) -> int:
        """Interrupt it as Ctrl-C does, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


@contextmanager
def chorus_serve(directory: Path, output: Path, *arguments: str, chorus: Path | None = None) -> Iterator[ChorusServe]:
    """`chorus serve DIRECTORY ARGUMENTS` on a free port; listening, perhaps not ready. `chorus`: another environment's command."""
    port = free_port()
    program = [str(chorus)] if chorus else [sys.executable, "-m", "chorus"]
    command = [*program, "serve", str(directory), "--port", str(port), *arguments]
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    server = ChorusServe(process, f"http://127.0.0.1:{port}", output)
    try:
        yield server
    finally:
        server.stop()


@dataclass(frozen=True, kw_only=True)
class Served:
    """An ASGI app that is being served."""

    url: str
    server: uvicorn.Server

    def begin_to_stop(self) -> None:
        """As a signal would: what runs gets another second, then it is cancelled."""
        self.server.should_exit = True


@contextmanager
def serving(app: Any, **options: Any) -> Iterator[Served]:
    """Serve an ASGI app from a thread; `options` are uvicorn's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, **{"log_config": None, "timeout_graceful_shutdown": 1, **options}))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            wait_for("server", lambda: server.started, timeout_s=20)
            yield Served(url=f"http://127.0.0.1:{listener.getsockname()[1]}", server=server)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
