"""A checked request: its call, tier, size and tenant, and the errors it can end with."""
