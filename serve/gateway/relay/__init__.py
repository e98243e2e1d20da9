"""Sending a request to an engine and its answer to the client, with the gateway's additions."""
