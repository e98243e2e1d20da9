"""The FastAPI app of a `Gateway`. Its lifespan starts and stops the gateway."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from chorus.population.assemble import chorus_version
from chorus.serve.gateway.api import document, failures, playground, routes
from chorus.serve.gateway.gateway import Gateway
from chorus.serve.gateway.observe.record import REQUEST_ID, RecordMiddleware
from chorus.serve.gateway.relay.reply import TIER_HEADER


def create_app(gateway: Gateway) -> FastAPI:
    """The app that serves `gateway`'s engines."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with gateway.running():
            yield

    app = FastAPI(
        title=f"chorus: {gateway.population_name}",
        version=chorus_version(),
        description="An OpenAI API whose answers are mixtures of a population's members, with a budget per request.",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would follow the client's Host header and leave TLS
        docs_url=None,  # FastAPI's pages load scripts from other hosts; `playground` serves ours
        redoc_url=None,
    )
    app.state.gateway = gateway
    if origins := gateway.settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID, TIER_HEADER.decode(), "retry-after"),
            max_age=3600,
        )
    app.add_middleware(
        RecordMiddleware,
        begin=gateway.metrics.begin,
        observe=gateway.metrics.observe,
        is_draining=lambda: gateway.is_draining,
        begin_trace=None if gateway.tracing is None else gateway.tracing.begin,
    )
    failures.add_handlers(app)
    app.include_router(routes.relays)
    app.include_router(routes.router)
    app.include_router(playground.router)
    document.describe(app, lambda: gateway.offer, keys_are_needed=gateway.keys.are_needed)
    return app
