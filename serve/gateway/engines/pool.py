"""The engines behind a gateway, and their order of preference for a request: by health, cached prefixes and load."""

import math
import random
from collections.abc import Container, Sequence
from hashlib import blake2b
from weakref import WeakKeyDictionary

from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.prefixes import Prefixes
from chorus.serve.gateway.request.call import Call
from chorus.serve.gateway.request.errors import unavailable
from chorus.serve.gateway.request.prefix import Prefix
from chorus.serve.gateway.request.size import Size

_MAX_DEVIATIONS = 2.0
"""Standard deviations above the mean up to which an engine's load is put down to chance, and the engine is preferred."""


class Pool:
    """All engines. `engines` may change at any time; removed engines finish their requests."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self._prefixes = Prefixes()
        self._keys: WeakKeyDictionary[Prefix, bytes] = WeakKeyDictionary()

    def candidates(self, call: Call | None = None, avoid: Container[Engine] = ()) -> Sequence[Engine]:
        """Engines that may serve the call, best first.

        Calls with the same prefix key (see `prefixes`) prefer the engines in the same order, by rendezvous hashing (Thaler and
        Ravishankar 1998): in every gateway, and hardly changed by an engine that comes or goes. The first of them whose load is
        bounded goes first (Mirrokni, Thorup and Zadimoghaddam 2018); then the others, by load.

        Raises:
            ApiError: 503 if there is none, with the time after which one should answer.
        """
        available = [engine for engine in self.engines if engine.is_up and engine not in avoid]
        if not available:
            raise self._unavailable()
        # If all breakers are open, try their engines anyway rather than none.
        available = [engine for engine in available if engine.breaker.allows_request()] or available
        if len(available) == 1:
            return available
        rows = {engine: engine.traffic.load().rows for engine in available}
        # Break ties at random: otherwise all gateways would crowd the first engine.
        by_load = sorted(available, key=lambda engine: (rows[engine], random.random()))
        if call is None:
            return by_load
        own_rows = len(call.choice.tier.members) * call.size.num_sequences
        mean = sum(rows.values()) / len(available)
        # Of requests like this one, placed at random, an engine has a number with mean and variance `mean / own_rows`.
        limit = mean + _MAX_DEVIATIONS * math.sqrt(mean * own_rows) + own_rows
        key = self._key(call.prefix)
        within = [engine for engine in available if rows[engine] <= limit]
        preferred = max(within, key=lambda engine: _weight(key, engine), default=by_load[0])
        return [preferred, *(engine for engine in by_load if engine is not preferred)]

    def prompt_tokens(self, size: Size) -> float:
        """Expected prompt length in tokens, by the model with the most prompts observed: all engines share one tokenizer."""
        if not self.engines:
            return size.prompt_tokens + 0.5 * size.prompt_characters
        model = max((engine.model for engine in self.engines), key=lambda model: model.num_prompts)
        return model.prompt_tokens(tokens=size.prompt_tokens, characters=size.prompt_characters)

    @property
    def context_length(self) -> int | None:
        """The shortest context length that engines report; None if none does."""
        return min((engine.context_length for engine in self.engines if engine.context_length), default=None)

    @property
    def is_ready(self) -> bool:
        """Whether any engine is up."""
        return any(engine.is_up for engine in self.engines)

    def _key(self, prefix: Prefix) -> bytes:
        """The prefix key, computed once: a waiting call is placed many times."""
        if (key := self._keys.get(prefix)) is None:
            key = self._keys[prefix] = self._prefixes.key(prefix.hashes(), len(self.engines))
        return key

    def _unavailable(self) -> Exception:
        retry_after_s = min((engine.retry_after_s() for engine in self.engines), default=3)
        many = len(self.engines) != 1
        message = "no engine is available" if many else "the engine is starting"
        return unavailable(f"{message}; try again in about {retry_after_s} s.", retry_after_s=retry_after_s)


def _weight(key: bytes, engine: Engine) -> bytes:
    return blake2b(engine.url.encode(), digest_size=8, key=key).digest()
