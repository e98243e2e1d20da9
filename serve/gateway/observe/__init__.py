"""Observability: a record of each request, metrics, traces, drift."""
