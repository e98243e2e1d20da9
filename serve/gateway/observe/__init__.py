"""What operators see: a record of each request, metrics, traces, drift."""
