"""`chorus engine`: runs an engine without a gateway, as in a container. This process imports neither torch nor vLLM."""

import json
import os
import re
import sys
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path

import click

from chorus.population import manifest
from chorus.population.errors import ChorusError

_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the plugin supports only the V1 model runner
}
_DEFAULT_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default vLLM takes most of the machine's memory. Ignored on GPUs
}
_RESERVED_OPTIONS = ("--model", "--host", "--port", "--uds", "--served-model-name")
_NUM_REQUESTS_METRIC = re.compile(rb"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_POLL_S = 0.5


@click.group()
def engine() -> None:
    """Run an engine without a gateway, for gateways started with --engine."""


@engine.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535), help="Port.")
@click.argument("engine_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- ENGINE_ARGUMENT...]")
def serve(directory: Path, host: str, port: int, engine_arguments: tuple[str, ...]) -> None:
    """Run vLLM's API server for the population in DIRECTORY, under the model name that gateways use.

    It checks no API keys and no budgets: anyone who can reach the port can use every member. Arguments after `--` go to
    `vllm serve`.
    """
    population = manifest.load(directory)
    for argument in engine_arguments:
        if argument.split("=")[0].replace("_", "-") in _RESERVED_OPTIONS:
            raise ChorusError(
                f"engine argument {argument!r} cannot be passed on, since this command sets it; see --help for its own options."
            )
    os.environ.update({**_DEFAULT_ENVIRONMENT, **os.environ, **_ENVIRONMENT})
    # The server behind `vllm serve`, whose command line needs metadata that the CPU build lacks; see docs/gateway.md.
    command = [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.launchers.api_server.entry"),
        *("--model", str(directory.resolve()), "--served-model-name", population.name),
        *("--host", host, "--port", str(port), "--disable-uvicorn-access-log"),
        *engine_arguments,
    ]
    os.execv(command[0], command)  # replace this process, so that signals reach the server directly


@engine.command()
@click.argument("url")
@click.option(
    "--after",
    "after_s",
    default=15.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds to wait first, so that gateways notice that the engine is shutting down.",
)
@click.option(
    "--timeout",
    "timeout_s",
    default=300.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Maximum seconds to wait after that.",
)
def drain(url: str, after_s: float, timeout_s: float) -> None:
    """Wait until the engine at URL has no requests left, for a container's preStop hook.

    Exits with 0 once the engine is idle or gone, with 1 if requests are still running after the timeout.
    """
    time.sleep(after_s)
    deadline = time.monotonic() + timeout_s
    while True:
        num_requests = _num_requests(url)
        # The engine updates its counts when a step ends. Once our own request has completed, they include all that came before.
        if num_requests == 0 and _generate_one_token(url, timeout_s=max(1.0, deadline - time.monotonic())):
            time.sleep(_POLL_S)
            num_requests = _num_requests(url)
            if num_requests == 0:
                click.echo("the engine is idle")
                return
        if num_requests is None:
            click.echo("the engine is gone")
            return
        if time.monotonic() > deadline:
            click.echo(f"requests are still running after {timeout_s:g} s", err=True)
            sys.exit(1)
        time.sleep(_POLL_S)


def _num_requests(url: str) -> float | None:
    """Running and waiting requests at the end of the engine's latest step; None if it does not answer."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=15) as response:
            return sum(map(float, _NUM_REQUESTS_METRIC.findall(response.read())))
    except (OSError, HTTPException):
        return None


def _generate_one_token(url: str, *, timeout_s: float) -> bool:
    """Have the engine generate one token. Returns whether it succeeded."""
    url = url.rstrip("/")
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=15) as response:
            model = json.load(response)["data"][0]["id"]
        body = json.dumps({"model": model, "prompt": [0], "max_tokens": 1}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            response.read()
    except (OSError, HTTPException, ValueError, LookupError):
        return False
    return True
