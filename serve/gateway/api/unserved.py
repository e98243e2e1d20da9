"""Routes of OpenAI, Anthropic and vLLM that the gateway does not serve: the reason, and what to use instead."""

_POOLING = (
    "the members' next-token distributions can be mixed, but not their vectors or scores. Run a separate engine for this: "
    "`vllm serve MODEL --runner pooling`."
)
_AUDIO = "the members read and write text only. Use a separate server for speech and send text here."
_IMAGES = "the members write text only. Use a separate server for images."
_STORED = (
    "conversations are not stored. Send the whole conversation: as `input` of /v1/responses or `messages` of "
    "/v1/chat/completions."
)
_FILES = (
    "no files are stored and no jobs run in the background. Send requests to /v1/completions or /v1/chat/completions."
)
_ADAPTERS = "members cannot change while a population is served. Merge the adapter into its checkpoint and add that as a member."
_ENGINE = "it is the engine's own route, which bypasses budgets, keys and queues. Use /v1/completions or /v1/chat/completions."

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
    "/v1/fine_tuning": "train with `chorus train` and fit weights with `chorus prior fit`.",
    "/v1/load_lora_adapter": _ADAPTERS,
    "/v1/unload_lora_adapter": _ADAPTERS,
    "/v1/systemone": _ENGINE,
    "/cohere/v2/chat": _ENGINE,
    "/inference/v1/generate": _ENGINE,
    "/invocations": _ENGINE,
    "/generate": _ENGINE,
    "/api": "it belongs to another server's API. OpenAI's API is under /v1; set that as the client's base URL.",
}


def unserved_reason(path: str) -> str | None:
    """Why the gateway does not serve `path`, and what to use instead; None for an unknown path."""
    parts = path.rstrip("/").split("/")
    candidates = ("/".join(parts[:length]) for length in range(len(parts), 1, -1))
    return next((_REASONS[each] for each in candidates if each in _REASONS), None)
