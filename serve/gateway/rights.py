"""What a tenant may see and ask for of what is on offer."""

from chorus.serve.gateway.errors import ApiError
from chorus.serve.gateway.offer import Offer
from chorus.serve.gateway.tenants import Tenant


def offer_to(tenant: Tenant, offer: Offer) -> Offer:
    """The offer without the tiers that the tenant may not have.

    Raises:
        ApiError: 403, if nothing is left.
    """
    if tenant.tiers is None:
        return offer
    names = tuple(tier.name for tier in offer.population.tiers if tier.name in tenant.tiers)
    if not names:
        raise ApiError(403, "this API key may use none of the tiers on offer now.", code="tier_not_allowed")
    return offer.restricted(names)
