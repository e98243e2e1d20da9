"""The gateway's routes."""

from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse

from population.assemble import chorus_version
from serve.gateway import disagreement, document, upstream
from serve.gateway.calls import Call
from serve.gateway.dependencies import ChatCall, CompletionCall, TheGateway, TheOffer, ThePassage, TokenCall
from serve.gateway.errors import ApiError, unavailable
from serve.gateway.proxy import Passage, Relay
from serve.gateway.tiers import tiers_between

router = APIRouter()


_ENGINE_ERRORS = (400, 401, 403, 404, 413, 422, 429, 500, 503, 504)
_TOKEN_ERRORS = (400, 401, 403, 404, 413, 422, 500, 503)


def _relay(path: str, call: Call, passage: Passage) -> Response:
    return Relay(
        passage, path=path, call=call, tiers=tiers_between(passage.offer.population, call.floor, call.choice.tier)
    )


async def _forward(path: str, call: Call, passage: Passage) -> Response:
    engine = passage.pool.candidates()[0]
    body = await upstream.fetch(passage.session, engine, path, call.body(), passage.headers)
    return Response(body, media_type="application/json")


@router.post(
    "/v1/completions",
    openapi_extra=document.takes({"prompt": document.PROMPT}, required="prompt", engines=document.COMPLETION_FIELDS),
    responses=document.answers(document.ANSWER, *_ENGINE_ERRORS, streams=True),
    tags=["OpenAI"],
)
async def complete(call: CompletionCall, passage: ThePassage) -> Response:
    """Complete a prompt with the mixture of the request's tier."""
    return _relay("/v1/completions", call, passage)


@router.post(
    "/v1/chat/completions",
    openapi_extra=document.takes({"messages": document.MESSAGES}, required="messages", engines=document.CHAT_FIELDS),
    responses=document.answers(document.ANSWER, *_ENGINE_ERRORS, streams=True),
    tags=["OpenAI"],
)
async def chat(call: ChatCall, passage: ThePassage) -> Response:
    """Answer a conversation with the mixture of the request's tier."""
    return _relay("/v1/chat/completions", call, passage)


@router.post(
    "/v1/population/disagreement",
    openapi_extra=document.takes({"prompt": document.TOKEN_IDS}, required="prompt"),
    responses=document.answers(document.DISAGREEMENT, *_ENGINE_ERRORS),
    tags=["population"],
)
async def show_disagreement(call: CompletionCall, passage: ThePassage) -> dict[str, Any]:
    """How much the members of a tier disagree about each token of a text, given as token ids."""
    return await disagreement.find(call, passage)


@router.post(
    "/tokenize",
    openapi_extra=document.takes(
        {"prompt": {"type": "string"}, "messages": {"description": "A conversation, where there is no prompt."}}
    ),
    responses=document.answers(document.TOKENS, *_TOKEN_ERRORS),
    tags=["tokens"],
)
async def tokenize(call: TokenCall, passage: ThePassage) -> Response:
    """Cut a text or a conversation into the tokens that all members share."""
    return await _forward("/tokenize", call, passage)


@router.post(
    "/detokenize",
    openapi_extra=document.takes({"tokens": {"type": "array"}}, required="tokens"),
    responses=document.answers(document.TEXT, *_TOKEN_ERRORS),
    tags=["tokens"],
)
async def detokenize(call: TokenCall, passage: ThePassage) -> Response:
    """Join tokens into text."""
    return await _forward("/detokenize", call, passage)


@router.get("/v1/models", responses=document.answers(document.MODELS, 401, 403), tags=["OpenAI"])
async def list_models(offer: TheOffer) -> dict[str, Any]:
    """The population under its own name, and each of its tiers."""
    return {"object": "list", "data": list(offer.cards.values())}


@router.get("/v1/models/{model}", responses=document.answers(document.MODEL, 401, 403, 404, 422), tags=["OpenAI"])
async def show_model(model: str, offer: TheOffer) -> dict[str, Any]:
    """One of them."""
    cards = offer.cards
    if model not in cards:
        raise ApiError(
            404,
            f"there is no model {model!r}; there are {', '.join(cards)}.",
            code="model_not_found",
            param="model",
        )
    return cards[model]


@router.get("/health", tags=["operation"])
async def health() -> dict[str, str]:
    """Whether this process lives."""
    return {"status": "ok"}


@router.get("/ready", responses=document.answers({"type": "object"}, 503), tags=["operation"])
async def ready(gateway: TheGateway) -> dict[str, str]:
    """Whether requests should come here: 503 while no engine answers, and from when the gateway was told to stop."""
    if gateway.is_draining:
        raise unavailable("this gateway is about to stop; another should be asked.", retry_after_s=1)
    gateway.pool.candidates()
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse, tags=["operation"])
async def metrics(gateway: TheGateway) -> Response:
    """The gateway's metrics, for Prometheus."""
    return Response(gateway.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version", tags=["operation"])
async def version(gateway: TheGateway) -> dict[str, str | int]:
    """What runs here."""
    return {
        "version": chorus_version(),
        "population": gateway.population_name,
        "prior_version": gateway.offer.population.prior_version,
    }
