"""Serving a population: the engine (a vLLM plugin) and the gateway in front of it. They meet over HTTP only."""
