"""Redis clients for the ways in which Redis is run: one server, a primary that Sentinel chooses, or a cluster.

    redis://[USER:PASSWORD@]HOST:PORT[/DB]                                    unix:///PATH for a socket
    redis+sentinel://[USER:PASSWORD@]HOST:PORT[,HOST:PORT ...]/PRIMARY[/DB]   the hosts are those of the sentinels
    redis+cluster://[USER:PASSWORD@]HOST:PORT[,HOST:PORT ...]                 the hosts are some of the cluster's nodes

`rediss` instead of `redis` is TLS. The query takes redis-py's options of a connection, such as `?ssl_ca_certs=/etc/ca.crt`, and
`sentinel_password`.
"""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlencode

from redis.asyncio import BlockingConnectionPool, Redis, Sentinel
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from chorus.population.errors import ChorusError

_PLAIN = ("redis://", "rediss://", "unix://")
_MAX_CONNECTIONS = 32
_SENTINEL_PORT, _PORT = 26379, 6379
_URL = re.compile(
    r"(?P<tls>rediss?)\+(?P<kind>sentinel|cluster)://(?:(?P<user>[^/@]*)@)?(?P<hosts>[^/?@]+)"
    r"(?:/(?P<path>[^?]*))?(?:\?(?P<query>.*))?"
)
_HOST = re.compile(r"(?P<host>\[[0-9a-fA-F:]+\]|[^:\[\]]+)(?::(?P<port>\d{1,5}))?")


@dataclass(frozen=True, kw_only=True)
class _Address:
    kind: str
    hosts: list[tuple[str, int]]
    primary: str
    """Sentinel's name of the primary."""
    options: dict[str, Any]
    """Of a connection to a server that holds data."""
    sentinel_options: dict[str, Any]


def check_address(url: str) -> None:
    """Raise ChorusError if `url` has none of the forms above."""
    if url.startswith(_PLAIN):
        _options(url)
    else:
        _parse(url)


def connect(url: str, **options: Any) -> tuple[Redis | RedisCluster, Callable[[], Awaitable[None]]]:
    """A client, and what closes all its connections; none is opened yet. `options` are redis-py's for every connection, such as
    `socket_timeout` in seconds.

    Raises:
        ChorusError: `url` has none of the forms above.
    """
    if url.startswith(_PLAIN):
        timeout_s = options.get("socket_timeout")
        pool = BlockingConnectionPool.from_url(url, max_connections=_MAX_CONNECTIONS, timeout=timeout_s, **options)
        server: Redis = Redis.from_pool(pool)
        return server, server.aclose
    address = _parse(url)
    if address.kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in address.hosts]
        cluster = RedisCluster(startup_nodes=nodes, retry=Retry(NoBackoff(), 1), **address.options, **options)
        return cluster, cluster.aclose
    timeouts = {name: value for name, value in options.items() if name.startswith("socket_")}
    sentinels = Sentinel(  # type: ignore[no-untyped-call]
        address.hosts, sentinel_kwargs={**address.sentinel_options, **timeouts}, **address.options, **options
    )
    primary: Redis = sentinels.master_for(address.primary)

    async def close() -> None:
        for client in (primary, *sentinels.sentinels):
            await client.aclose()

    return primary, close


def _parse(url: str) -> _Address:
    match = _URL.fullmatch(url)
    hosts = [_HOST.fullmatch(host) for host in match["hosts"].split(",")] if match else []
    primary, _, database = (match["path"] or "" if match else "").partition("/")
    is_cluster = match is not None and match["kind"] == "cluster"
    if match is None or not all(hosts) or bool(primary) is is_cluster or not (database or "0").isdecimal():
        raise _refusal(url)
    query = parse_qs(match["query"] or "")
    sentinel_password = query.pop("sentinel_password", [None])[0]
    user = f"{match['user']}@" if match["user"] else ""
    options = _options(f"{match['tls']}://{user}host/{database or 0}?{urlencode(query, doseq=True)}")
    options.pop("host", None)
    tls: dict[str, Any] = {name: value for name, value in options.items() if name.startswith("ssl_")}
    if options.pop("connection_class", None) is SSLConnection:
        options["ssl"] = tls["ssl"] = True
    if is_cluster:
        options.pop("db", None)
    port = _PORT if is_cluster else _SENTINEL_PORT
    return _Address(
        kind=match["kind"],
        hosts=[(each["host"].strip("[]"), int(each["port"] or port)) for each in hosts if each],
        primary=primary,
        options=options,
        sentinel_options={**tls, **({"password": sentinel_password} if sentinel_password else {})},
    )


def _options(url: str) -> dict[str, Any]:
    """redis-py's options for one server."""
    try:
        return dict(parse_url(url))
    except ValueError as error:
        raise _refusal(url, f" ({error})") from None


def _refusal(url: str, reason: str = "") -> ChorusError:
    return ChorusError(
        f"--redis {_without_password(url)!r} is not an address of Redis{reason}. Use redis://HOST:6379/0, rediss://... for TLS, "
        "redis+sentinel://HOST:26379,HOST:26379/PRIMARY or redis+cluster://HOST:6379,HOST:6379."
    )


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//...@", url)
