"""Serving a population directory: checks the population, builds the gateway, and runs the server until a signal stops it."""

import argparse
import contextlib
import gc
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from rich.console import Console

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.live import LiveManifest
from chorus.population.manifest import Population
from chorus.serve.gateway import logs
from chorus.serve.gateway.admission.admission import Limits
from chorus.serve.gateway.app import create_app
from chorus.serve.gateway.console import print_example, print_offer, print_ready
from chorus.serve.gateway.engines.supervisor import Supervision
from chorus.serve.gateway.gateway import Gateway
from chorus.serve.gateway.request.keys import Keys
from chorus.serve.gateway.settings import Settings
from chorus.serve.gateway.transport.connections import ConnectionLimits, server_options


@dataclass(frozen=True, kw_only=True)
class Drain:
    """How the server stops after SIGTERM."""

    delay_s: float = 0.0
    """Seconds for which it goes on serving while /ready fails, so that load balancers have time to notice."""
    timeout_s: float = 30.0
    """Most seconds, after that delay, for the requests still being answered."""


def serve(
    directory: Path,
    *,
    host: str,
    port: int,
    engine_urls: tuple[str, ...],
    default_tier_name: str | None,
    is_verbose: bool,
    engine_arguments: tuple[str, ...],
    keys_path: Path | None = None,
    redis: str | None = None,
    limits: Limits | None = None,
    stall_timeout_s: float = 60.0,
    drain: "Drain | None" = None,
    logs_json: bool = False,
    otlp_traces_endpoint: str | None = None,
    echo_part: float = 0.0,
    connections: ConnectionLimits | None = None,
    max_body_bytes: int = Settings.max_body_bytes,
    allow_origins: tuple[str, ...] = (),
) -> None:
    """Serve until SIGINT or SIGTERM, then finish the running requests and stop the engine.

    Raises:
        ChorusError: the population, an option or the address cannot be used, or the engine cannot be kept running.
    """
    population = load(directory, with_weights=not engine_urls)
    log = None if is_verbose or engine_urls else _new_log(population)
    logs.configure(as_json=logs_json, is_verbose=is_verbose)
    try:
        settings = Settings(
            population=population,
            manifest=LiveManifest(directory),
            default_tier_name=default_tier_name,
            directory=directory,
            engine=engine_urls or Supervision(directory=directory, arguments=engine_arguments, log=log),
            keys=Keys(path=keys_path, text=os.environ.get("CHORUS_API_KEYS") if keys_path is None else None),
            redis=redis,
            otlp_traces_endpoint=otlp_traces_endpoint,
            echo_part=echo_part,
            limits=limits or Limits(),
            stall_timeout_s=stall_timeout_s,
            max_body_bytes=max_body_bytes,
            allow_origins=allow_origins,
        )
        http = server_options(connections or ConnectionLimits(max_discarded_bytes=max_body_bytes))
        with _listen(host, port) as listener:
            run = Run(settings=settings, listener=listener, console=Console(), drain=drain or Drain(), http=http)
            run.run()
    except ChorusError:
        if log is not None and log.stat().st_size == 0:
            log.unlink()  # a log with content shows why the engine failed
        raise
    if log is not None and not run.num_restarts:
        log.unlink()


def load(directory: Path, *, with_weights: bool = True) -> Population:
    """The population, each file checked before anything starts; with uniform tiers if none were fitted.

    Without `with_weights` only the manifest is checked: engines that others run check their own files when they load them.

    Raises:
        ChorusError: it cannot be served.
    """
    population = manifest.load(directory)
    if with_weights:
        manifest.verify(population, directory)
    return population if population.tiers else population.with_uniform_tiers()


def max_num_seqs(engine_arguments: Sequence[str]) -> int | None:
    """How many sequences an engine with these arguments runs at once; None if the arguments do not set it."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--max-num-seqs", "--max_num_seqs", type=int)
    try:
        found: int | None = parser.parse_known_args(engine_arguments)[0].max_num_seqs
    except argparse.ArgumentError:
        return None  # the engine reports the error
    return found


class Run:
    """One run of the server and its console output."""

    def __init__(
        self,
        *,
        settings: Settings,
        listener: socket.socket,
        console: Console,
        drain: "Drain",
        http: dict[str, Any],
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._console = console
        self._failure: str | None = None
        self._was_up = False
        self._gateway = gateway = Gateway(settings, on_up=self._on_up, on_failure=self._on_failure)
        self._server = _Server(
            gateway,
            drain,
            uvicorn.Config(
                create_app(gateway),
                **http,
                lifespan="on",
                timeout_graceful_shutdown=round(drain.timeout_s),
            ),
        )

    def run(self) -> None:
        """Serve until stopped.

        Raises:
            ChorusError: the engine cannot be kept running.
        """
        settings = self._settings
        print_offer(self._console, settings.population, settings.default_tier)
        if not isinstance(settings.engine, Supervision):
            waiting = f"waiting for the engine at {', '.join(settings.sources)}"
        else:
            where = f", log {settings.engine.log}" if settings.engine.log else ""
            waiting = f"starting the engine{where}"
        self._console.print(f"\n[dim]{waiting}[/]", highlight=False, soft_wrap=True)
        _freeze_garbage_collector()
        self._server.run(sockets=[self._listener])
        if self._failure:
            raise ChorusError(self._failure)
        self._console.print("stopped")
        if self.num_restarts and isinstance(settings.engine, Supervision) and settings.engine.log is not None:
            why = f"the engine had ended by itself before; its log is kept: {settings.engine.log}"
            self._console.print(why, highlight=False, soft_wrap=True)

    @property
    def num_restarts(self) -> int:
        """How often our own engine exited while it should have been serving."""
        return sum(engine.num_restarts for engine in self._gateway.pool.engines)

    def _on_up(self, engine_url: str, start_s: float | None) -> None:
        host, port = self._listener.getsockname()[:2]
        shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
        url = f"http://{shown}:{port}"
        print_ready(self._console, url, engine_url, start_s)
        if not self._was_up:
            self._was_up = True
            print_example(self._console, url, self._settings.population, self._settings.default_tier)

    def _on_failure(self, message: str) -> None:
        self._failure = message
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """A server that exits normally after a signal. uvicorn raises the signal again, so that SIGTERM would look like a crash."""

    def __init__(self, gateway: Gateway, drain: Drain, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM waits for the drain delay; SIGINT or a second signal does not."""
        if sig != signal.SIGTERM or self._gateway.is_draining or not self._drain.delay_s:
            self._gateway.is_draining = True
            super().handle_exit(sig, frame)
            return
        self._gateway.is_draining = True
        timer = threading.Timer(self._drain.delay_s, lambda: setattr(self, "should_exit", True))
        timer.daemon = True
        timer.start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        previous = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)


def _freeze_garbage_collector() -> None:
    """Freeze what is loaded now, so that the garbage collector scans only what requests create.

    Scanning all modules again and again took a tenth of a busy gateway's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ChorusError(
            f"cannot listen on {host} port {port}: {error.strerror}. Give another --port or --host."
        ) from None


def _new_log(population: Population) -> Path:
    handle, name = tempfile.mkstemp(prefix=f"chorus-{population.name}-", suffix=".log")
    os.close(handle)
    return Path(name)
