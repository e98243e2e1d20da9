"""Which requests belong on the same engine, because its KV cache holds their common prefix.

Requests that share a prefix get the same key, so that one engine serves them. A prefix with more traffic than one engine's share (a
system prompt of most conversations) is split: each of its continuations gets a key of its own. The rule needs only the traffic
itself, so gateways that see the same kind of traffic choose the same keys without exchanging anything.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

_HORIZON = 256
"""Requests over which traffic is averaged."""
_MIN_CONTINUATIONS = 3
"""Of a prefix that is split: a conversation that is edited or sampled again has fewer."""
_MIN_REQUESTS = 8
_MAX_PREFIXES = 65_536


@dataclass(kw_only=True, slots=True)
class _Node:
    """One prefix."""

    requests: float = 0.0
    """With this prefix, weighted by age."""
    counted_at: int = 0
    continuations: set[bytes] = field(default_factory=set)
    """At most `_MIN_CONTINUATIONS`."""
    is_split: bool = False


class Prefixes:
    """The prefixes of recent requests, by the last hash of their chain (see `request.prefix`)."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[bytes, _Node] = OrderedDict()
        self._count = 0
        self._total = 0.0

    def key(self, hashes: Iterable[tuple[bytes, bool]], num_engines: int) -> bytes:
        """The key of a request with this chain, which is counted.

        It is the prefix that continues the longest split one.
        """
        self._count += 1
        self._total = self._total * math.exp(-1 / _HORIZON) + 1
        key, parent = b"", None
        for link, is_complete in hashes:
            if not key or (parent is not None and parent.is_split):
                key = link
            if not is_complete:
                break
            if parent is not None and len(parent.continuations) < _MIN_CONTINUATIONS:
                parent.continuations.add(link)
            parent = self._counted(link, num_engines)
        while len(self._nodes) > _MAX_PREFIXES:
            self._nodes.popitem(last=False)
        return key

    def _counted(self, link: bytes, num_engines: int) -> _Node:
        node = self._nodes.get(link)
        if node is None:
            node = self._nodes[link] = _Node()
        self._nodes.move_to_end(link)
        node.requests = node.requests * math.exp((node.counted_at - self._count) / _HORIZON) + 1
        node.counted_at = self._count
        # It stays split, so that its continuations keep their engines when traffic varies.
        node.is_split = node.is_split or (
            len(node.continuations) >= _MIN_CONTINUATIONS
            and node.requests >= _MIN_REQUESTS
            and node.requests * num_engines > self._total
        )
        return node
