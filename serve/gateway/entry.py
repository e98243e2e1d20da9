"""A request's way in: who sends it, what that key may have, and the call in its body.

Called by the routes, not declared as FastAPI's dependencies: to resolve those took longer than what they do.
"""

from fastapi import Request

from chorus.serve.gateway import quotas
from chorus.serve.gateway.calls import Call, Kind, read_call
from chorus.serve.gateway.errors import ApiError
from chorus.serve.gateway.gateway import Gateway
from chorus.serve.gateway.offer import Offer
from chorus.serve.gateway.proxy import Passage
from chorus.serve.gateway.records import REQUEST_ID, Record
from chorus.serve.gateway.rights import offer_to
from chorus.serve.gateway.tenants import Tenant

_PASSED_ON = ("traceparent", "tracestate")


def gateway_of(request: Request) -> Gateway:
    """Whose request it is."""
    gateway = request.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway


def offer_for(request: Request) -> Offer:
    """What its sender may have of what is on offer now.

    Raises:
        ApiError: 401 or 403, for its key.
    """
    gateway = gateway_of(request)
    return offer_to(_tenant(request, gateway), gateway.offer)


async def read(request: Request, kind: Kind, *, is_aside: bool = False) -> tuple[Call, Passage]:
    """The call in a request's body, checked, and what it needs on its way. The body is read only for a known key within its rate.

    One `is_aside` whose work grows with its body, though no member runs for it, or all do: it is bounded by what fits a context.

    Raises:
        ApiError: its key, its rate, its length, or what the client must change.
    """
    gateway = gateway_of(request)
    tenant = _tenant(request, gateway)
    passage = _passage(request, gateway, tenant, offer_to(tenant, gateway.offer))
    await quotas.take_request(gateway.store, tenant)
    body = await gateway.bodies.read(request, gateway.settings.max_aside_bytes if is_aside else None)
    call = _read_call(body, kind, passage, gateway.offer)
    if call.is_served_by_a_tier:
        passage.record.tier_asked = call.choice.asked
    return call, passage


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


def _passage(request: Request, gateway: Gateway, tenant: Tenant, offer: Offer) -> Passage:
    record = _record(request)
    passed_on = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
    if record.trace is not None:
        passed_on |= record.trace.headers()
    if not gateway.keys.are_needed and (authorization := _authorization(request)) is not None:
        passed_on["authorization"] = authorization  # for the engine's own --api-key
    headers = {**passed_on, REQUEST_ID: record.request_id, "Content-Type": "application/json"}
    return Passage(
        session=gateway.session,
        pool=gateway.pool,
        admission=gateway.admission,
        store=gateway.store,
        echoes=gateway.echoes,
        offer=offer,
        tenant=tenant,
        headers=headers,
        record=record,
        stall_timeout_s=gateway.settings.stall_timeout_s,
    )


def _read_call(body: bytes, kind: Kind, passage: Passage, full: Offer) -> Call:
    offer, tenant = passage.offer, passage.tenant
    try:
        return read_call(
            *(body, kind, offer.population, offer.default_tier),
            tenant_floor=tenant.floor,
            may_constrain=tenant.structured_outputs,
        )
    except ApiError as error:
        if error.status == 404 and offer is not full:
            try:
                read_call(body, kind, full.population, full.default_tier)
            except (
                ApiError
            ):  # it does not exist at all: only the offer's own error names nothing but what this key may use
                raise error from None
            names = ", ".join(tier.name for tier in offer.population.tiers)
            message = f"this API key may not use that tier; it may use {names}."
            raise ApiError(403, message, code="tier_not_allowed", param=error.param) from None
        raise
