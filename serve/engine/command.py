"""`chorus engine`: an engine by itself, as a container runs it. Neither torch nor vLLM is loaded before it becomes the engine."""

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
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the model runner that the plugin is made for
}
_DEFAULT_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM would take most of the machine's memory. On GPUs it means nothing
}
_RESERVED_OPTIONS = ("--model", "--host", "--port", "--uds", "--served-model-name")
_NUM_REQUESTS_METRIC = re.compile(rb"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_POLL_S = 0.5


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
        if argument.split("=")[0].replace("_", "-") in _RESERVED_OPTIONS:
            raise ChorusError(
                f"engine argument {argument!r} is set by this command itself; see --help for its options."
            )
    os.environ.update({**_DEFAULT_ENVIRONMENT, **os.environ, **_ENVIRONMENT})
    # `vllm serve` without its front, which the CPU build lacks the metadata for; see docs/gateway.md.
    command = [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.launchers.api_server.entry"),
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
    while True:
        num_requests = _num_requests(url)
        # The engine counts its requests when a step ends: one that came meanwhile shows when a request of our own has gone through.
        if num_requests == 0 and _generate_one_token(url, timeout_s=max(1.0, deadline - time.monotonic())):
            time.sleep(_POLL_S)
            num_requests = _num_requests(url)
            if num_requests == 0:
                click.echo("nothing runs on the engine")
                return
        if num_requests is None:
            click.echo("the engine is gone")
            return
        if time.monotonic() > deadline:
            click.echo(f"requests still run after {timeout_s:g} s", err=True)
            sys.exit(1)
        time.sleep(_POLL_S)


def _num_requests(url: str) -> float | None:
    """Requests that ran or waited on the engine at the end of its latest step; None if it does not answer."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=15) as response:
            return sum(map(float, _NUM_REQUESTS_METRIC.findall(response.read())))
    except (OSError, HTTPException):
        return None


def _generate_one_token(url: str, *, timeout_s: float) -> bool:
    """Have the engine generate one token; whether it did."""
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
