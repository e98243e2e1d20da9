"""State that several gateways share."""
