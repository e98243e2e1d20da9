"""What the relay needs to serve one request."""

from dataclasses import dataclass

import aiohttp

from chorus.serve.gateway.admission.admission import Admission
from chorus.serve.gateway.engines.pool import Pool
from chorus.serve.gateway.observe.drift import DriftSampler
from chorus.serve.gateway.observe.record import Record
from chorus.serve.gateway.request.keys import Tenant
from chorus.serve.gateway.request.offer import Offer
from chorus.serve.gateway.shared.store import Store


@dataclass(frozen=True, kw_only=True)
class RequestContext:
    """The parts of the gateway that one request uses, with its tenant, offer and record."""

    session: aiohttp.ClientSession
    pool: Pool
    admission: Admission
    store: Store
    drift: DriftSampler
    offer: Offer
    tenant: Tenant
    headers: dict[str, str]
    """Headers of the request to the engine."""
    record: Record
    stall_timeout_s: float
    """Longest silence, in seconds, in the middle of a stream."""
