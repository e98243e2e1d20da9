"""Find engines: in a fixed list, behind a DNS name, or among those that gateways announced in the shared store."""

import asyncio
import logging
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from chorus.serve.gateway.shared.store import Store

logger = logging.getLogger(__name__)

DNS = "dns+"
SHARED = "redis"
_LOOKUP_TIMEOUT_S = 30.0


def can_change(sources: Sequence[str]) -> bool:
    """Whether the engines of these sources can change while the gateway runs."""
    return any(source == SHARED or source.startswith(DNS) for source in sources)


class Discovery:
    """Looks up engines repeatedly. A source that fails keeps the engines found there before and does not affect other sources."""

    def __init__(self, sources: Sequence[str], store: Store) -> None:
        self._sources = sources
        self._store = store
        self._known: dict[str, list[str]] = {}
        self._failing: set[str] = set()

    async def find(self) -> list[str]:
        """Addresses of all engines, without duplicates and in a stable order."""
        for source in self._sources:
            self._known[source] = await self._find_at(source)
        return list(dict.fromkeys(url for source in self._sources for url in self._known[source]))

    async def _find_at(self, source: str) -> list[str]:
        if source == SHARED:
            return sorted(await self._store.engines())
        if not source.startswith(DNS):
            return [source.rstrip("/")]
        try:
            found = await _resolve(source.removeprefix(DNS))
        except (OSError, ValueError) as error:  # no answer, or not a valid name
            if source not in self._failing:
                logger.warning("cannot resolve %s; keeping the engines found before: %s", source, error)
            self._failing.add(source)
            return self._known.get(source, [])
        if source in self._failing:
            logger.warning("resolved %s again", source)
            self._failing.remove(source)
        return found


async def _resolve(url: str) -> list[str]:
    """The URL once for each address of its host name. A headless Kubernetes service has one address per pod.

    Raises:
        OSError, ValueError: the name cannot be resolved.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    async with asyncio.timeout(_LOOKUP_TIMEOUT_S):
        found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    hosts = sorted({str(address[0]) for *_, address in found})
    return [f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}" for host in hosts]
