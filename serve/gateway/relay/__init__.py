"""Sends a request to an engine, and its answer, with the gateway's additions, to the client."""
