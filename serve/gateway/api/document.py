"""The OpenAPI document: what routes accept and return, with the model and tier names of the population on offer.

Routes read bodies as bytes, so FastAPI cannot derive their schemas; they are defined here. Constraints beyond JSON Schema (a
model's name and a budget must name the same tier, a prompt must fit the context) are in docs/gateway.md.
"""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from chorus.serve.gateway.request.call import CallFields
from chorus.serve.gateway.request.offer import Offer

Schema = dict[str, Any]

_ERROR: Schema = {"$ref": "#/components/schemas/Error"}
_POPULATION: Schema = {"$ref": "#/components/schemas/Population"}
_MODEL: Schema = {"$ref": "#/components/schemas/Model"}
_USAGE: Schema = {"$ref": "#/components/schemas/Usage"}
TOKEN_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_NAMES: dict[str, Schema] = {
    "model": {"anyOf": [{"$ref": "#/components/schemas/ModelName"}, {"type": "null"}]},
    "budget": {"$ref": "#/components/schemas/Budget"},
    "min_budget": {"$ref": "#/components/schemas/Budget"},
}
_SAMPLING = {
    "max_tokens": "Maximum number of tokens of each choice.",
    "n": "Number of choices.",
    "temperature": "Sampling temperature of the mixture; 0 always takes the most likely token.",
    "top_p": "Nucleus sampling threshold, applied to the mixture.",
    "stop": "One or more strings at which the answer ends.",
    "seed": "Seed for reproducible sampling.",
    "presence_penalty": "Applied to the mixture's log-probabilities.",
    "frequency_penalty": "Applied to the mixture's log-probabilities.",
    "logit_bias": "Bias per token id.",
    "logprobs": "Whether to return the mixture's log-probabilities, or for how many tokens at each position.",
    "response_format": "Structured output: `json_object` or `json_schema`.",
    "user": "Ignored.",
}
COMPLETION_FIELDS = {**_SAMPLING, "echo": "Whether to return the prompt before the answer.", "suffix": "Not supported."}
CHAT_FIELDS = {
    **_SAMPLING,
    "max_completion_tokens": "Like `max_tokens`, and takes precedence over it.",
    "top_logprobs": "Number of most likely tokens to return at each position.",
    "tools": "Functions that the model may call.",
    "tool_choice": "Which function to call.",
}
RESPONSE_FIELDS = {
    **{name: _SAMPLING[name] for name in ("temperature", "top_p", "stop", "seed", "logit_bias", "user")},
    "instructions": "Prepended to the input.",
    "max_output_tokens": "Maximum number of tokens of the answer.",
    "tools": "Functions that the model may call.",
    "tool_choice": "Which function to call.",
    "text": "Structured output: `format`.",
    "store": "Ignored: answers are not stored.",
}
MESSAGE_FIELDS = {
    **{name: _SAMPLING[name] for name in ("max_tokens", "temperature", "top_p")},
    "system": "Prepended to the messages.",
    "stop_sequences": "Strings at which the answer ends.",
    "tools": "Functions that the model may call.",
    "tool_choice": "Which function to call.",
}
_CAUSES = {
    400: "A field is invalid, or the engine refused the request.",
    401: "The API key is missing or unknown.",
    403: "This API key may not use the tier or structured output.",
    404: "The model, tier or route does not exist.",
    405: "The route does not allow this method.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body's content-encoding is not supported.",
    422: "The body is not valid JSON.",
    429: "The engines are overloaded, or the API key exceeded its limits.",
    500: "The engine failed on this request.",
    502: "The engine sent an invalid response.",
    503: "No engine is available.",
    504: "The answer would miss its time budget (`on_deadline` is `fail`), or an engine timed out.",
}
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
"""A server-sent event, whose data is a part of the answer as JSON, or `[DONE]`."""
_RETRY: Schema = {
    "Retry-After": {"description": "Seconds to wait before trying again.", "schema": {"type": "integer", "minimum": 1}}
}


def responses(
    body: Schema, *statuses: int, streams: bool = False, error: Schema = _ERROR
) -> dict[int | str, dict[str, Any]]:
    """The responses of a route: `body` with 200, else an `error` with one of `statuses`."""
    content: Schema = {"application/json": {"schema": body}}
    if streams:
        content["text/event-stream"] = {"schema": _EVENT}
    found: dict[int | str, dict[str, Any]] = {200: {"description": "Success.", "content": content}}
    for status in statuses:
        found[status] = {"description": _CAUSES[status], "content": {"application/json": {"schema": error}}}
        if status in (429, 503):
            found[status]["headers"] = _RETRY
    return found


def request_body(own: Schema, *, required: str | None = None, engines: dict[str, str] | None = None) -> dict[str, Any]:
    """The request body of a route that reads its bytes itself, to avoid the cost of FastAPI's parsing.

    `own` are the schemas of the route's own fields; `engines` describes the fields that the engine checks, by name. With `engines`
    the gateway's fields are included, else only `model`.
    """
    known = _without_references(CallFields.model_json_schema())["properties"] if engines else {}
    known |= {
        name: {"description": known.get(name, {}).get("description", ""), **names} for name, names in _NAMES.items()
    }
    kept = known if engines else {"model": known["model"]}
    schema = {
        "type": "object",
        "properties": {**kept, **own, **{name: {"description": text} for name, text in (engines or {}).items()}},
        "required": [required] if required else [],
        "additionalProperties": True,
    }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI, offer: Callable[[], Offer], *, keys_are_needed: bool) -> None:
    """Make `app`'s document describe what is on offer at the time of each request."""

    def document() -> dict[str, Any]:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        components = found.setdefault("components", {})
        components["schemas"] = {**_schemas(), **_names(offer())}
        if keys_are_needed:
            components["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
        for path, methods in found["paths"].items():
            for operation in methods.values():
                if keys_are_needed and (path.startswith("/v1/") or path in ("/tokenize", "/detokenize")):
                    operation["security"] = [{"key": []}, {"x-api-key": []}]
                elif not keys_are_needed:
                    operation["responses"].pop("401", None)
        return found

    app.openapi = document  # type: ignore[method-assign]


def _names(offer: Offer) -> dict[str, Schema]:
    tiers = [tier.name for tier in offer.population.tiers]
    sizes = {
        "type": "integer",
        "minimum": min(t.budget for t in offer.population.tiers),
        "maximum": len(offer.population.members),
    }
    return {
        "ModelName": {"type": "string", "enum": list(offer.cards)},
        "Budget": {"anyOf": [{"type": "string", "enum": tiers}, sizes, {"type": "null"}]},
    }


def _schemas() -> dict[str, Schema]:
    text: Schema = {"type": "string"}
    number: Schema = {"type": "number"}
    natural: Schema = {"type": "integer", "minimum": 0}
    return {
        "Error": _object(
            {
                "error": _object(
                    {
                        "message": text,
                        "type": {"type": "string", "enum": ["invalid_request_error", "server_error"]},
                        "param": {"type": ["string", "null"]},
                        "code": {"type": ["string", "null"]},
                    }
                )
            }
        ),
        "Population": _object(
            {
                "tier": text,
                "members": {"type": "array", "items": text},
                "weights": {"type": "array", "items": number},
                "prior_version": natural,
            },
            {
                "tier_asked": text,
                "most_members": natural,
                "latency_budget_ms": number,
                "elapsed_ms": number,
                "deadline": {"type": "string", "enum": ["met", "missed"]},
                "truncated": {"type": "boolean"},
                "members_per_token": {"type": "array", "items": {"type": "array", "items": natural}},
                "drops": {"type": "array", "items": {"type": "object"}},
                "decoding": _object(
                    {"passes_per_token": number, "drafts": natural, "accepted": natural, "caught_up_rows": natural}
                ),
            },
        ),
        "Usage": _object({"prompt_tokens": natural, "total_tokens": natural}, {"completion_tokens": natural}),
        "Model": _object(
            {"id": text, "object": {"type": "string", "const": "model"}, "created": natural, "owned_by": text},
            {
                "root": text,
                "parent": {"type": ["string", "null"]},
                "max_model_len": natural,
                "population": {"type": "object"},
            },
        ),
    }


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def _answer() -> Schema:
    usage = {"anyOf": [_USAGE, {"type": "null"}]}
    choices = {"type": "array", "items": {"type": "object"}}
    return _object(
        {"object": {"type": "string"}, "model": {"type": "string"}, "choices": choices, "population": _POPULATION},
        {"usage": usage},
    )


ANSWER = _answer()
"""A completion or a chat completion."""
MODELS = _object({"object": {"type": "string", "const": "list"}, "data": {"type": "array", "items": _MODEL}})
MODEL = _MODEL
TOKENS = _object({"tokens": {"type": "array", "items": {"type": "integer"}}})
TEXT = _object({"prompt": {"type": "string"}})
_NUMBERS: Schema = {"type": "array", "items": {"type": ["number", "null"]}}
DISAGREEMENT = _object(
    {
        "tier": {"type": "string"},
        "members": {"type": "array", "items": {"type": "string"}},
        "weights": {"type": "array", "items": {"type": "number"}},
        "disagreement_nats": _NUMBERS,
        "logprobs": {"type": "array", "items": _NUMBERS},
    }
)
"""The gain of mixing at each token, and each member's log-probability of it."""
PROMPT: Schema = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        TOKEN_IDS,
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        {"type": "array", "items": TOKEN_IDS, "minItems": 1},
    ]
}
_MESSAGE = _object(
    {"role": {"type": "string"}}, {"content": {"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "null"}]}}
)


MESSAGES: Schema = {"type": "array", "items": _MESSAGE, "minItems": 1}
INPUT: Schema = {
    "anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "object"}, "minItems": 1}]
}
_PARTS: Schema = {"type": "array", "items": {"type": "object"}}
RESPONSE = _object(
    {"id": {"type": "string"}, "model": {"type": "string"}, "output": _PARTS, "population": _POPULATION},
    {"status": {"type": "string"}, "usage": {"type": ["object", "null"]}},
)
MESSAGE = _object(
    {"id": {"type": "string"}, "model": {"type": "string"}, "content": _PARTS, "population": _POPULATION},
    {"stop_reason": {"type": ["string", "null"]}, "usage": {"type": "object"}},
)
COUNT = _object({"input_tokens": {"type": "integer"}})
ANTHROPIC_ERROR = _object(
    {
        "type": {"type": "string", "const": "error"},
        "error": _object({"type": {"type": "string"}, "message": {"type": "string"}}),
    }
)


def _without_references(schema: Any) -> Any:
    """Pydantic's schema with its references replaced by {}: they all stand for any JSON, and would not resolve in the document."""
    if isinstance(schema, list):
        return [_without_references(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if str(schema.get("$ref", "")).startswith("#/$defs/"):
        return {}
    return {key: _without_references(value) for key, value in schema.items() if key != "$defs"}
