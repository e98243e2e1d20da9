"""OpenTelemetry traces: one span per request, the parent of the engine's spans.

Attributes follow OpenTelemetry's conventions for HTTP and generative AI; `chorus.*` is for what these lack.
"""

import time
from collections.abc import Mapping
from typing import Any

from chorus.population.errors import ChorusError
from chorus.serve.gateway.observe.record import Record, Trace

_OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}


class Tracing:
    """Creates spans and sends them to a collector, in batches from a background thread.

    `OTEL_TRACES_SAMPLER`, `OTEL_BSP_*` and similar variables apply.
    """

    def __init__(self, endpoint: str, *, population: str) -> None:
        """`endpoint` is the full address for traces in OTLP over HTTP, such as http://collector:4318/v1/traces.

        Raises:
            ChorusError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ChorusError(
                f"traces need OpenTelemetry, but {error.name} is not installed: pip install "
                "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http."
            ) from None
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "chorus-gateway", "chorus.population": population})
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("chorus.serve.gateway")

    def begin(self, method: str, headers: Mapping[str, str]) -> Trace:
        """A span for a request, a child of the span in its headers if there is one."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        span = self._tracer.start_span(method, context=propagator.extract(dict(headers)), kind=SpanKind.SERVER)
        return _Span(span, propagator)

    def close(self) -> None:
        """Send the remaining spans; may take some seconds."""
        self._provider.shutdown()


class _Span:
    """One request's span."""

    def __init__(self, span: Any, propagator: Any) -> None:
        self._span = span
        self._propagator = propagator

    def headers(self) -> dict[str, str]:
        """See `Trace`."""
        from opentelemetry.trace import set_span_in_context

        found: dict[str, str] = {}
        self._propagator.inject(found, context=set_span_in_context(self._span))
        return found

    def end(self, method: str, record: Record) -> None:
        """See `Trace`."""
        from opentelemetry.trace import StatusCode

        self._span.update_name(f"{method} {record.route}")
        usage = record.usage
        known: dict[str, object] = {
            "http.request.method": method,
            "http.route": record.route,
            "http.response.status_code": record.status,
            "gen_ai.operation.name": _OPERATIONS.get(record.route),
            "gen_ai.usage.input_tokens": None if usage is None else usage.prompt_tokens,
            "gen_ai.usage.output_tokens": None if usage is None else usage.completion_tokens,
            **{
                f"chorus.{name}": value
                for name, value in record.fields(method).items()
                if name not in ("method", "route", "status", "prompt_tokens", "completion_tokens", "duration_ms")
            },
        }
        self._span.set_attributes({name: value for name, value in known.items() if value is not None})
        if record.first_token_s is not None:
            ended_ns = time.time_ns()
            first_ns = ended_ns - round(1e9 * (record.duration_s - record.first_token_s))
            self._span.add_event("first token", timestamp=first_ns)
        if record.status >= 500 or record.is_broken:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()
