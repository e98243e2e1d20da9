"""Reading a request: its tenant, the offer to that tenant, and the call in its body.

Routes call these functions directly. As FastAPI dependencies they took longer to resolve than to run.
"""

from fastapi import Request

from chorus.serve.gateway.admission import quotas
from chorus.serve.gateway.gateway import Gateway
from chorus.serve.gateway.observe.record import REQUEST_ID, Record
from chorus.serve.gateway.relay.context import RequestContext
from chorus.serve.gateway.request.call import Call, Kind, read_call
from chorus.serve.gateway.request.errors import ApiError
from chorus.serve.gateway.request.keys import Tenant
from chorus.serve.gateway.request.offer import Offer, offer_to

_FORWARDED = ("traceparent", "tracestate")
SESSION = "x-session-id"
"""Header with a client's name for a series of requests, which are best served by one engine."""


def gateway_of(request: Request) -> Gateway:
    """The gateway that serves the request."""
    gateway = request.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway


def offer_for(request: Request) -> Offer:
    """The offer to the request's tenant.

    Raises:
        ApiError: 401 or 403, for its key.
    """
    gateway = gateway_of(request)
    return offer_to(_tenant(request, gateway), gateway.offer)


async def read(request: Request, kind: Kind, *, is_auxiliary: bool = False) -> tuple[Call, RequestContext]:
    """The checked call in a request's body, and what the relay needs. The key and its rate are checked before the body is read.

    The body of an auxiliary request, whose work grows with its length, is bounded by what a context holds.

    Raises:
        ApiError: for the key, the rate, the body's length, or what the client must change.
    """
    gateway = gateway_of(request)
    tenant = _tenant(request, gateway)
    context = _context(request, gateway, tenant, offer_to(tenant, gateway.offer))
    await quotas.take_request(gateway.store, tenant)
    body = await gateway.bodies.read(request, gateway.settings.max_auxiliary_bytes if is_auxiliary else None)
    call = _read_call(body, kind, context, gateway.offer, request.headers.get(SESSION))
    if call.is_served_by_a_tier:
        context.record.tier_asked = call.choice.requested
    return call, context


def _record(request: Request) -> Record:
    record = request.state.record
    assert isinstance(record, Record)
    return record


def _authorization(request: Request) -> str | None:
    """The key as OpenAI's clients send it; Anthropic's have a header of their own."""
    if (given := request.headers.get("authorization")) is None and "x-api-key" in request.headers:
        return f"Bearer {request.headers['x-api-key']}"
    return given


def _tenant(request: Request, gateway: Gateway) -> Tenant:
    tenant = gateway.keys.tenant(_authorization(request))
    _record(request).tenant = tenant.name
    return tenant


def _context(request: Request, gateway: Gateway, tenant: Tenant, offer: Offer) -> RequestContext:
    record = _record(request)
    forwarded = {name: request.headers[name] for name in _FORWARDED if name in request.headers}
    if record.trace is not None:
        forwarded |= record.trace.headers()
    if not gateway.keys.are_needed and (authorization := _authorization(request)) is not None:
        forwarded["authorization"] = authorization  # for the engine's own --api-key
    return RequestContext(
        session=gateway.session,
        pool=gateway.pool,
        admission=gateway.admission,
        store=gateway.store,
        drift=gateway.drift,
        offer=offer,
        tenant=tenant,
        headers={**forwarded, REQUEST_ID: record.request_id, "Content-Type": "application/json"},
        record=record,
        stall_timeout_s=gateway.settings.stall_timeout_s,
    )


def _read_call(body: bytes, kind: Kind, context: RequestContext, full: Offer, session: str | None) -> Call:
    offer, tenant = context.offer, context.tenant
    try:
        return read_call(
            *(body, kind, offer.population, offer.default_tier),
            tenant_floor=tenant.floor,
            allow_constraints=tenant.structured_outputs,
            session=session,
        )
    except ApiError as error:
        if error.status == 404 and offer is not full and _is_on_offer(body, kind, full):
            names = ", ".join(tier.name for tier in offer.population.tiers)
            message = f"this API key may not use that tier; choose from {names}."
            raise ApiError(403, message, code="tier_not_allowed", param=error.param) from None
        raise  # it does not exist at all: this error names only the tiers of this key


def _is_on_offer(body: bytes, kind: Kind, full: Offer) -> bool:
    try:
        read_call(body, kind, full.population, full.default_tier)
    except ApiError:
        return False
    return True
