"""The engines behind a gateway, and their order of preference for a request: by health, load and cached prefixes."""

import random
from collections import OrderedDict
from collections.abc import Container, Sequence

from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.request.call import Call
from chorus.serve.gateway.request.errors import unavailable
from chorus.serve.gateway.request.size import Size

_MAX_PREFIXES = 4096
_PREFIX_BYTES = 256
_AFFINITY_ROWS = 8.0
"""How many more member rows an engine may run than another and still be preferred for its prefix cache."""


class Pool:
    """All engines. `engines` may change at any time; removed engines finish their requests."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self._prefix_engines: OrderedDict[tuple[bytes, bytes], Engine] = OrderedDict()

    def candidates(self, call: Call | None = None, avoid: Container[Engine] = ()) -> Sequence[Engine]:
        """Engines that may serve the call, best first.

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
        preferred = self._prefix_engines.get(_key(call)) if call is not None else None
        # Break ties at random: otherwise all gateways would crowd the first engine.
        return sorted(
            available,
            key=lambda engine: (engine.traffic.load().rows - _AFFINITY_ROWS * (engine is preferred), random.random()),
        )

    def note_sent(self, call: Call, engine: Engine) -> None:
        """The engine got the call: its prefix cache will hold the beginning of the prompt."""
        if len(self.engines) > 1:
            key = _key(call)
            self._prefix_engines[key] = engine
            self._prefix_engines.move_to_end(key)
            if len(self._prefix_engines) > _MAX_PREFIXES:
                self._prefix_engines.popitem(last=False)

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

    def _unavailable(self) -> Exception:
        retry_after_s = min((engine.retry_after_s() for engine in self.engines), default=3)
        many = len(self.engines) != 1
        message = "no engine is available" if many else "the engine is starting"
        return unavailable(f"{message}; try again in about {retry_after_s} s.", retry_after_s=retry_after_s)


def _key(call: Call) -> tuple[bytes, bytes]:
    # Members that do not run leave nothing in the cache, so a cached prefix serves its own tier best.
    return call.choice.tier.name.encode(), call.affinity[:_PREFIX_BYTES]
