"""What routes ask for, as annotated types: the gateway, the request's notes, and a checked call.

All are coroutines: FastAPI would send plain functions through a pool of threads, which costs more than they do.
"""

from typing import Annotated

from fastapi import Depends, Request

from serve.gateway.calls import Call, Kind, read_call
from serve.gateway.errors import ApiError
from serve.gateway.gateway import Gateway
from serve.gateway.offer import Offer
from serve.gateway.proxy import Passage
from serve.gateway.records import REQUEST_ID, Record
from serve.gateway.rights import offer_to
from serve.gateway.tenants import Tenant

_PASSED_ON = ("traceparent", "tracestate")


async def _gateway(request: Request) -> Gateway:
    gateway = request.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway


async def _record(request: Request) -> Record:
    record = request.state.record
    assert isinstance(record, Record)
    return record


async def _body(request: Request, gateway: "TheGateway") -> bytes:
    """The request's body, refused as soon as it is known to be too long."""
    limit = gateway.settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    too_long = ApiError(413, f"the body is longer than {limit} bytes, the most that is accepted.", code="body_too_long")
    if declared.isdecimal() and int(declared) > limit:
        raise too_long
    parts, length = [], 0
    async for part in request.stream():
        length += len(part)
        if length > limit:
            raise too_long
        parts.append(part)
    return b"".join(parts)


async def _tenant(request: Request, gateway: "TheGateway", record: "TheRecord") -> Tenant:
    tenant = gateway.keys.tenant(request.headers.get("authorization"))
    record.tenant = tenant.name
    return tenant


async def _offer(gateway: "TheGateway", tenant: "TheTenant") -> Offer:
    return offer_to(tenant, gateway.offer)


async def _passage(
    request: Request, gateway: "TheGateway", record: "TheRecord", tenant: "TheTenant", offer: "TheOffer"
) -> Passage:
    passed_on = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
    if record.trace is not None:
        passed_on |= record.trace.headers()
    if not gateway.keys.are_needed and "authorization" in request.headers:
        passed_on["authorization"] = request.headers["authorization"]  # for the engine's own --api-key
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


def _read(body: bytes, kind: Kind, passage: Passage, gateway: Gateway) -> Call:
    offer, floor = passage.offer, passage.tenant.floor
    try:
        call = read_call(body, kind, offer.population, offer.default_tier, tenant_floor=floor)
    except ApiError as error:
        if error.status == 404 and offer is not gateway.offer:
            full = gateway.offer
            read_call(body, kind, full.population, full.default_tier)  # unless it does not exist at all
            names = ", ".join(tier.name for tier in offer.population.tiers)
            message = f"this API key may not use that tier; it may use {names}."
            raise ApiError(403, message, code="tier_not_allowed", param=error.param) from None
        raise
    if call.is_served_by_a_tier:
        passage.record.tier_asked = call.choice.asked
    return call


async def _completion_call(passage: "ThePassage", gateway: "TheGateway", body: "Body") -> Call:
    return _read(body, "completion", passage, gateway)


async def _chat_call(passage: "ThePassage", gateway: "TheGateway", body: "Body") -> Call:
    return _read(body, "chat", passage, gateway)


async def _token_call(passage: "ThePassage", gateway: "TheGateway", body: "Body") -> Call:
    return _read(body, "tokens", passage, gateway)


TheGateway = Annotated[Gateway, Depends(_gateway)]
TheRecord = Annotated[Record, Depends(_record)]
Body = Annotated[bytes, Depends(_body)]
TheTenant = Annotated[Tenant, Depends(_tenant)]
TheOffer = Annotated[Offer, Depends(_offer)]
ThePassage = Annotated[Passage, Depends(_passage)]
CompletionCall = Annotated[Call, Depends(_completion_call)]
TokenCall = Annotated[Call, Depends(_token_call)]
ChatCall = Annotated[Call, Depends(_chat_call)]
