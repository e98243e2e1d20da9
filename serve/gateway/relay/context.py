"""What a request needs on its way to an engine and back."""

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
    """One request's share of the gateway."""

    session: aiohttp.ClientSession
    pool: Pool
    admission: Admission
    store: Store
    drift: DriftSampler
    offer: Offer
    tenant: Tenant
    headers: dict[str, str]
    """For the engine."""
    record: Record
    stall_timeout_s: float
    """Longest silence in the middle of a stream."""
