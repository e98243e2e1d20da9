"""`chorus serve`: serve a population behind an OpenAI API. Heavy modules are imported only when the command runs."""

from pathlib import Path

import click


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 for a free one.")
@click.option(
    "--engine",
    "engine_urls",
    metavar="URL",
    multiple=True,
    help="Address of a running engine to use instead of starting one; repeatable. dns+http://NAME:PORT uses every address of a "
    "DNS name, `redis` the engines that gateways announced in Redis.",
)
@click.option("--default-tier", metavar="NAME", help="Tier of requests that name none; by default the largest.")
@click.option(
    "--keys",
    "keys_path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="File of API keys and their rights (see docs/gateway.md). Default: CHORUS_API_KEYS; without it no key is needed.",
)
@click.option(
    "--redis",
    envvar="CHORUS_REDIS",
    show_envvar=True,
    metavar="URL",
    help="Redis in which gateways share engines, learned times, quotas and the prior: redis://, redis+sentinel:// or "
    "redis+cluster:// (rediss for TLS), see docs/gateway.md.",
)
@click.option(
    "--max-sequences",
    type=click.IntRange(1),
    help="Maximum number of sequences per engine; more wait in the gateway. Default: --max-num-seqs after --, else 64.",
)
@click.option(
    "--max-queue",
    default=256,
    show_default=True,
    type=click.IntRange(0),
    help="Maximum number of waiting requests; more get 429.",
)
@click.option(
    "--stall-timeout",
    default=60.0,
    show_default=True,
    type=click.FloatRange(1),
    help="Seconds without output, progress or processor use after which an engine with work counts as frozen; the gateway's own "
    "engine is then restarted. A step that is computing may take ten times as long.",
)
@click.option(
    "--drain-delay",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds after SIGTERM during which requests are still accepted while /ready returns 503.",
)
@click.option(
    "--drain-timeout",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Maximum seconds to finish running requests when the server stops.",
)
@click.option(
    "--max-body-mib",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0, 1024, min_open=True),
    help="Maximum size of a request body; parsing a large one delays all other requests.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1),
    help="Maximum number of client connections. Default: 4096, or half the limit on open files if that is less.",
)
@click.option(
    "--max-connections-per-address",
    type=click.IntRange(1),
    help="Maximum number of connections from one IPv4 address or IPv6 /64 network. Default: a quarter of all.",
)
@click.option(
    "--idle-timeout",
    default=75,
    show_default=True,
    type=click.IntRange(1),
    help="Seconds after which an idle connection is closed. A load balancer's idle timeout must be shorter.",
)
@click.option(
    "--trusted-proxy",
    "trusted_proxies",
    metavar="ADDRESS",
    multiple=True,
    help="Address or network whose X-Forwarded-For and X-Forwarded-Proto are trusted and whose connections are not limited; "
    "repeatable.",
)
@click.option(
    "--allow-origin",
    "allow_origins",
    metavar="ORIGIN",
    multiple=True,
    help="Origin (https://app.example.com, or * for all) whose web pages may call the API; repeatable.",
)
@click.option("--verbose", is_flag=True, help="Log every request and show the engine's output.")
@click.option(
    "--log-format",
    default="text",
    show_default=True,
    type=click.Choice(["text", "json"]),
    help="Log as text, or as JSON with one object per request.",
)
@click.option(
    "--otlp-traces-endpoint",
    metavar="URL",
    help="Where to send OpenTelemetry traces, in OTLP over HTTP: http://collector:4318/v1/traces.",
)
@click.option(
    "--echo-part",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Fraction of requests whose prompt's loss is measured on an idle engine, to show drift in the metrics.",
)
@click.argument("engine_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- ENGINE_ARGUMENT...]")
def serve(
    directory: Path,
    host: str,
    port: int,
    engine_urls: tuple[str, ...],
    default_tier: str | None,
    keys_path: Path | None,
    redis: str | None,
    max_sequences: int | None,
    max_queue: int,
    stall_timeout: float,
    drain_delay: float,
    drain_timeout: float,
    max_body_mib: float,
    max_connections: int | None,
    max_connections_per_address: int | None,
    idle_timeout: int,
    trusted_proxies: tuple[str, ...],
    allow_origins: tuple[str, ...],
    verbose: bool,
    log_format: str,
    otlp_traces_endpoint: str | None,
    echo_part: float,
    engine_arguments: tuple[str, ...],
) -> None:
    """Serve the population in DIRECTORY over HTTP, with a budget per request.

    Starts an engine (vLLM) for all members and an OpenAI API in front of it. What follows `--` goes to the engine as
    `vllm serve` takes it: `chorus serve DIR -- --dtype float32`.
    """
    from chorus.serve.gateway import launch
    from chorus.serve.gateway.admission.admission import Limits
    from chorus.serve.gateway.transport.connections import ConnectionLimits

    if engine_urls and engine_arguments:
        raise click.UsageError(
            "engine arguments after -- cannot be used with --engine, which starts no engine; remove one of them."
        )
    max_body_bytes = max(1, round(max_body_mib * 2**20))
    launch.serve(
        directory,
        host=host,
        port=port,
        engine_urls=engine_urls,
        default_tier_name=default_tier,
        is_verbose=verbose,
        engine_arguments=engine_arguments,
        keys_path=keys_path,
        redis=redis,
        logs_json=log_format == "json",
        otlp_traces_endpoint=otlp_traces_endpoint,
        echo_part=echo_part,
        limits=Limits(
            max_sequences=max_sequences or launch.max_num_seqs(engine_arguments) or Limits.max_sequences,
            max_queue=max_queue,
        ),
        stall_timeout_s=stall_timeout,
        drain=launch.Drain(delay_s=drain_delay, timeout_s=drain_timeout),
        connections=ConnectionLimits(
            max_connections=max_connections,
            max_per_address=max_connections_per_address,
            idle_timeout_s=idle_timeout,
            max_discarded_bytes=max_body_bytes,
            trusted_proxies=trusted_proxies,
        ),
        max_body_bytes=max_body_bytes,
        allow_origins=allow_origins,
    )
