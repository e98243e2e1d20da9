"""Where engines are: a fixed list, the addresses behind a DNS name, or what gateways announced in the shared store."""

import asyncio
import logging
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from chorus.serve.gateway.store import Store

logger = logging.getLogger(__name__)

DNS = "dns+"
SHARED = "redis"


def changes(sources: Sequence[str]) -> bool:
    """Whether the engines behind these sources can change while the gateway runs."""
    return any(source == SHARED or source.startswith(DNS) for source in sources)


async def discover(sources: Sequence[str], store: Store) -> list[str] | None:
    """Addresses of all engines, in a stable order; None if some source could not be asked, and what was known stays."""
    found: list[str] = []
    for source in sources:
        if source == SHARED:
            found += sorted(await store.engines())
        elif source.startswith(DNS):
            addresses = await _resolve(source.removeprefix(DNS))
            if addresses is None:
                return None
            found += addresses
        else:
            found.append(source.rstrip("/"))
    return list(dict.fromkeys(found))


async def _resolve(url: str) -> list[str] | None:
    """`http://NAME:PORT`, once for each address of the name. A headless service of Kubernetes has one for each pod."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError as error:
        logger.warning("the engines' name %s cannot be resolved: %s", parts.hostname, error)
        return None
    hosts = sorted({str(address[0]) for *_, address in found})
    return [f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}" for host in hosts]
