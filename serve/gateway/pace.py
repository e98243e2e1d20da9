"""How many tokens come in one event of a stream: more than one only where they come faster than anybody reads.

Each event costs processor time in the engine's server, here and at the client, which an engine of small members on the same cores
misses (bench/LOG.md). The first token and the last ones never wait (vLLM's `stream_interval`).
"""

EVENT_S = 1 / 30
"""Longest that a token waits for others, as things were expected when the request began."""
_MOST = 16


def tokens_per_event(token_s: float) -> int:
    """Tokens for each event of a stream whose tokens are expected to take `token_s` seconds; 1 while that is not known."""
    return max(1, min(_MOST, int(EVENT_S / token_s))) if token_s > 0 else 1
