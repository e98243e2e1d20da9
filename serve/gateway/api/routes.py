"""The gateway's HTTP routes."""

import re
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse

from chorus.population.assemble import chorus_version
from chorus.serve.gateway.admission.quotas import Bill
from chorus.serve.gateway.api import auxiliary, disagreement, document
from chorus.serve.gateway.api.intake import gateway_of, offer_for, read
from chorus.serve.gateway.engines import upstream
from chorus.serve.gateway.relay.relay import Relay
from chorus.serve.gateway.request.call import Kind
from chorus.serve.gateway.request.errors import MESSAGES, ApiError, unavailable
from chorus.serve.gateway.request.size import NO_USAGE, Usage
from chorus.serve.gateway.request.tiers import tiers_between


class _Direct(APIRoute):
    """A route that calls its function with the raw request, without FastAPI's dependency resolution and validation."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


relays = APIRouter(route_class=_Direct)
router = APIRouter()


_ENGINE_ERRORS = (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 502, 503, 504)
_TOKEN_ERRORS = (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 502, 503, 504)
_COUNT = re.compile(rb'"count"\s*:\s*(\d{1,15})')
"""The number of tokens in an engine's /tokenize answer."""


async def _relay(path: str, request: Request, kind: Kind) -> Response:
    call, context = await read(request, kind)
    return Relay(
        context, path=path, call=call, tiers=tiers_between(context.offer.population, call.floor, call.choice.tier)
    )


async def _forward(path: str, request: Request) -> Response:
    call, context = await read(request, "tokens", is_auxiliary=True)
    tokens = round(context.pool.prompt_tokens(call.size))

    async def work(bill: Bill) -> Response:
        engine = context.pool.candidates()[0]
        bill.used = None
        try:
            body = await upstream.fetch(
                context.session, engine, path, call.body(), context.headers, limit_s=context.stall_timeout_s
            )
        except ApiError:
            bill.used = NO_USAGE
            raise
        count = _COUNT.search(body)
        bill.used = Usage(prompt_tokens=int(count[1]) if count else tokens, completion_tokens=0)
        return Response(body, media_type="application/json")

    return await auxiliary.serve(request.receive, gateway_of(request).slots, context, tokens, work)


@relays.post(
    "/v1/completions",
    openapi_extra=document.request_body(
        {"prompt": document.PROMPT}, required="prompt", engines=document.COMPLETION_FIELDS
    ),
    responses=document.responses(document.ANSWER, *_ENGINE_ERRORS, streams=True),
    tags=["OpenAI"],
)
async def complete(request: Request) -> Response:
    """Complete a prompt with the mixture of the request's tier."""
    return await _relay("/v1/completions", request, "completion")


@relays.post(
    "/v1/chat/completions",
    openapi_extra=document.request_body(
        {"messages": document.MESSAGES}, required="messages", engines=document.CHAT_FIELDS
    ),
    responses=document.responses(document.ANSWER, *_ENGINE_ERRORS, streams=True),
    tags=["OpenAI"],
)
async def chat(request: Request) -> Response:
    """Answer a conversation with the mixture of the request's tier."""
    return await _relay("/v1/chat/completions", request, "chat")


@relays.post(
    "/v1/responses",
    openapi_extra=document.request_body({"input": document.INPUT}, required="input", engines=document.RESPONSE_FIELDS),
    responses=document.responses(document.RESPONSE, *_ENGINE_ERRORS, streams=True),
    tags=["OpenAI"],
)
async def respond(request: Request) -> Response:
    """Answer in the format of OpenAI's Responses. Nothing is stored: send the whole conversation each time."""
    return await _relay("/v1/responses", request, "responses")


@relays.post(
    MESSAGES,
    openapi_extra=document.request_body(
        {"messages": document.MESSAGES}, required="messages", engines=document.MESSAGE_FIELDS
    ),
    responses=document.responses(document.MESSAGE, *_ENGINE_ERRORS, streams=True, error=document.ANTHROPIC_ERROR),
    tags=["Anthropic"],
)
async def message(request: Request) -> Response:
    """Answer in the format of Anthropic's Messages."""
    return await _relay(MESSAGES, request, "messages")


@relays.post(
    f"{MESSAGES}/count_tokens",
    openapi_extra=document.request_body({"messages": document.MESSAGES}, required="messages"),
    responses=document.responses(document.COUNT, *_TOKEN_ERRORS, error=document.ANTHROPIC_ERROR),
    tags=["Anthropic"],
)
async def count_tokens(request: Request) -> Response:
    """Count the tokens of a conversation."""
    return await _forward(f"{MESSAGES}/count_tokens", request)


@router.post(
    "/v1/population/disagreement",
    openapi_extra=document.request_body({"prompt": document.TOKEN_IDS}, required="prompt"),
    responses=document.responses(document.DISAGREEMENT, *_ENGINE_ERRORS),
    tags=["population"],
)
async def show_disagreement(request: Request) -> dict[str, Any]:
    """How much the members of a tier disagree about each token of a text, given as token ids."""
    call, context = await read(request, "completion", is_auxiliary=True)
    tokens = disagreement.size_of(call).prompt_tokens
    work = partial(disagreement.measure, call, context)
    return await auxiliary.serve(request.receive, gateway_of(request).slots, context, tokens, work)


@router.post(
    "/tokenize",
    openapi_extra=document.request_body(
        {"prompt": {"type": "string"}, "messages": {"description": "A conversation, instead of a prompt."}}
    ),
    responses=document.responses(document.TOKENS, *_TOKEN_ERRORS),
    tags=["tokens"],
)
async def tokenize(request: Request) -> Response:
    """Tokenize a text or a conversation with the tokenizer that all members share."""
    return await _forward("/tokenize", request)


@router.post(
    "/detokenize",
    openapi_extra=document.request_body({"tokens": {"type": "array"}}, required="tokens"),
    responses=document.responses(document.TEXT, *_TOKEN_ERRORS),
    tags=["tokens"],
)
async def detokenize(request: Request) -> Response:
    """Convert token ids to text."""
    return await _forward("/detokenize", request)


@router.get("/v1/models", responses=document.responses(document.MODELS, 401, 403), tags=["OpenAI"])
async def list_models(request: Request) -> dict[str, Any]:
    """The population under its own name, and each of its tiers."""
    return {"object": "list", "data": list(offer_for(request).cards.values())}


@router.get("/v1/models/{model}", responses=document.responses(document.MODEL, 401, 403, 404, 422), tags=["OpenAI"])
async def show_model(model: str, request: Request) -> dict[str, Any]:
    """One model: the population or a tier."""
    cards = offer_for(request).cards
    if model not in cards:
        raise ApiError(
            404,
            f"model {model!r} does not exist; choose from {', '.join(cards)}.",
            code="model_not_found",
            param="model",
        )
    return cards[model]


@router.get("/health", tags=["operation"])
async def health() -> dict[str, str]:
    """Liveness: 200 while the process runs."""
    return {"status": "ok"}


@router.get("/ready", responses=document.responses({"type": "object"}, 503), tags=["operation"])
async def ready(request: Request) -> dict[str, str]:
    """Readiness: 503 while no engine is up, and once the gateway is stopping."""
    gateway = gateway_of(request)
    if gateway.is_draining:
        raise unavailable("this gateway is shutting down; use another one.", retry_after_s=1)
    gateway.pool.candidates()
    return {"status": "ready"}


@router.post("/ping", include_in_schema=False)
@router.get("/ping", responses=document.responses({"type": "object"}, 503), tags=["operation"])
async def ping(request: Request) -> dict[str, str]:
    """The same as /ready, under SageMaker's name for it."""
    return await ready(request)


@router.get("/metrics", response_class=PlainTextResponse, tags=["operation"])
async def metrics(request: Request) -> Response:
    """The gateway's metrics, for Prometheus."""
    return Response(gateway_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version", tags=["operation"])
async def version(request: Request) -> dict[str, str | int]:
    """The versions of chorus and of the prior, and the population's name."""
    gateway = gateway_of(request)
    return {
        "version": chorus_version(),
        "population": gateway.population_name,
        "prior_version": gateway.offer.population.prior_version,
    }
