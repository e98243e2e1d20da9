"""How many tokens each event of a stream carries: more than one only where they come faster than a reader could follow.

Each event costs processor time in the engine's server, in the gateway and at the client (bench/LOG.md). The first and the last
tokens of a stream are never held back (vLLM's `stream_interval`).
"""

_EVENT_INTERVAL_S = 1 / 30
"""Longest time for which a token is held back, by the expected time per token when the request began."""
_MAX_TOKENS = 16


def tokens_per_event(token_s: float) -> int:
    """Tokens per event for an expected time per token of `token_s` seconds; 1 if that is 0, which means unknown."""
    return max(1, min(_MAX_TOKENS, int(_EVENT_INTERVAL_S / token_s))) if token_s > 0 else 1
