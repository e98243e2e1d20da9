"""The beginning of a request's input as a chain of hashes: requests that share a prefix share the beginning of the chain."""

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

_MIN_CHUNK_BYTES = 128
"""About two blocks of an engine's KV cache, in text."""
_CHUNK_SHARE = 1 / 16
"""Of what comes before it: a chunk's least size, so that a chain is short for a long input too."""
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, eq=False, kw_only=True)
class Prefix:
    """What decides which KV cache serves a request."""

    keys: tuple[str, ...] = ()
    """What the client gives to keep requests together or apart: `prompt_cache_key`, `user`, `cache_salt`, a session header."""
    parts: tuple[object, ...] = ()
    """Texts, token ids and messages, as JSON values, in the order in which an engine reads them."""

    def hashes(self) -> Iterator[tuple[bytes, bool]]:
        """The chain: one hash per key, then one per chunk, each with whether it is complete; only the last chunk may not be."""
        link = b""
        for key in self.keys:
            link = _hash(link, key.encode(errors="replace"))
            yield link, True
        text, begin = bytearray(), 0
        for part in self.parts:
            if len(text) < _MAX_BYTES:
                text += _bytes(part)[:_MAX_BYTES]
        while begin < len(text):
            size = max(_MIN_CHUNK_BYTES, int(begin * _CHUNK_SHARE))
            link = _hash(link, text[begin : begin + size])
            yield link, begin + size <= len(text)
            begin += size


def _hash(link: bytes, chunk: bytes | bytearray) -> bytes:
    return blake2b(chunk, digest_size=8, key=link).digest()


def _bytes(part: object) -> bytes:
    """Bytes that begin alike for inputs that begin alike."""
    if isinstance(part, str):
        return part.encode(errors="replace")
    if isinstance(part, list) and part and all(type(each) is int and 0 <= each < 2**32 for each in part):
        return array("I", part).tobytes()
    return json.dumps(part).encode()
