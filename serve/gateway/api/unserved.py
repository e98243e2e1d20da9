"""Routes of OpenAI, Anthropic and vLLM that the gateway does not serve: the reason, and what to use instead."""

_POOLING = (
    "a population's members are mixed in their next-token distributions, and the vectors or scores of several models have no such "
    "mixture. Run an engine for it beside this one, `vllm serve MODEL --runner pooling`."
)
_AUDIO = "the members read and write text only. Transcribe or speak with a server of its own, and send text here."
_IMAGES = "the members write text only. Use a server for images."
_STORED = (
    "nothing of a request is kept after its answer. Send the conversation itself: `input` of /v1/responses, or `messages` of "
    "/v1/chat/completions."
)
_FILES = (
    "nothing is stored and nothing runs in the background. Send requests to /v1/completions or /v1/chat/completions."
)
_ADAPTERS = "members are fixed while a population is served. Merge an adapter into its checkpoint and make it a member."
_ENGINE = "it is the engine's own route, past budgets, keys and queues. Use /v1/completions or /v1/chat/completions."

_REASONS = {
    "/v1/embeddings": _POOLING,
    "/v2/embed": _POOLING,
    "/embed": _POOLING,
    "/pooling": _POOLING,
    "/classify": _POOLING,
    "/score": _POOLING,
    "/v1/score": _POOLING,
    "/generative_scoring": _POOLING,
    "/rerank": _POOLING,
    "/v1/rerank": _POOLING,
    "/v2/rerank": _POOLING,
    "/v1/moderations": _POOLING,
    "/v1/audio": _AUDIO,
    "/v1/realtime": _AUDIO,
    "/v1/images": _IMAGES,
    "/v1/videos": _IMAGES,
    "/v1/responses": _STORED,
    "/v1/conversations": _STORED,
    "/v1/chat/completions": _ENGINE,
    "/v1/completions": _ENGINE,
    "/v1/messages/batches": _FILES,
    "/v1/messages": _ENGINE,
    "/v1/assistants": _STORED,
    "/v1/threads": _STORED,
    "/v1/files": _FILES,
    "/v1/uploads": _FILES,
    "/v1/batches": _FILES,
    "/v1/vector_stores": _FILES,
    "/v1/fine_tuning": "training is `chorus train`, and fitting is `chorus prior fit`.",
    "/v1/load_lora_adapter": _ADAPTERS,
    "/v1/unload_lora_adapter": _ADAPTERS,
    "/v1/systemone": _ENGINE,
    "/cohere/v2/chat": _ENGINE,
    "/inference/v1/generate": _ENGINE,
    "/invocations": _ENGINE,
    "/generate": _ENGINE,
    "/api": "it belongs to another server's API. OpenAI's is under /v1, and most clients take that as their base URL.",
}


def unserved_reason(path: str) -> str | None:
    """Why the gateway does not serve `path`, and what to use instead; None for an unknown path."""
    parts = path.rstrip("/").split("/")
    candidates = ("/".join(parts[:length]) for length in range(len(parts), 1, -1))
    return next((_REASONS[each] for each in candidates if each in _REASONS), None)
