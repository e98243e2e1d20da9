"""`chorus engine`: an engine by itself, as a container runs it. Neither torch nor vLLM is loaded before it becomes the engine."""

import os
import re
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import click

from population import manifest
from population.errors import ChorusError

_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the model runner that the plugin is made for
}
_DEFAULT_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM would take most of the machine's memory. On GPUs it means nothing
}
_OURS = ("--model", "--host", "--port", "--uds", "--served-model-name")
_BUSY = re.compile(rb"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_POLL_S = 0.5
_QUIET_POLLS = 3
"""Looks in a row at which nothing runs: between two requests of one client an engine is idle for a moment, too."""


@click.group()
def engine() -> None:
    """Run an engine by itself, for gateways that are started with --engine."""


@engine.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535), help="Port.")
@click.argument("engine_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- ENGINE_ARGUMENT...]")
def serve(directory: Path, host: str, port: int, engine_arguments: tuple[str, ...]) -> None:
    """Become vLLM's API server for the population in DIRECTORY, under the name by which gateways ask for it.

    There are no keys and no budgets here: whoever reaches this port may use every member. What follows `--` is taken as
    `vllm serve` takes it.
    """
    population = manifest.load(directory)
    for argument in engine_arguments:
        if argument.split("=")[0].replace("_", "-") in _OURS:
            raise ChorusError(
                f"engine argument {argument!r} is set by this command itself; see --help for its options."
            )
    os.environ.update({**_DEFAULT_ENVIRONMENT, **os.environ, **_ENVIRONMENT})
    # `vllm serve` without its front, which the CPU build lacks the metadata for; see docs/gateway.md.
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"),
        *("--model", str(directory.resolve()), "--served-model-name", population.name),
        *("--host", host, "--port", str(port), "--disable-uvicorn-access-log"),
        *engine_arguments,
    ]
    os.execv(command[0], command)  # so that signals reach it without a middleman


@engine.command()
@click.argument("url")
@click.option(
    "--after",
    "after_s",
    default=15.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds to let pass first: gateways need them to see that the engine is about to leave.",
)
@click.option(
    "--timeout",
    "timeout_s",
    default=300.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Longest time, in seconds, to wait from then on.",
)
def drain(url: str, after_s: float, timeout_s: float) -> None:
    """Wait until nothing runs on the engine at URL any more: for a container's preStop hook.

    Ends with status 0 when the engine is idle or gone, with 1 when requests still run after the time.
    """
    time.sleep(after_s)
    deadline = time.monotonic() + timeout_s
    quiet = 0
    while quiet < _QUIET_POLLS:
        busy = _num_requests(url)
        if busy is None:
            click.echo("the engine is gone")
            return
        quiet = 0 if busy else quiet + 1
        if time.monotonic() > deadline:
            click.echo(f"{busy:g} requests still run after {timeout_s:g} s", err=True)
            sys.exit(1)
        time.sleep(_POLL_S)
    click.echo("nothing runs on the engine")


def _num_requests(url: str) -> float | None:
    """Requests that run or wait on the engine; None if it does not answer."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=15) as answer:
            return sum(map(float, _BUSY.findall(answer.read())))
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None
