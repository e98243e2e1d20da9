"""Traces, as a collector receives them: OTLP over HTTP on a local port."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from chorus.population.manifest import Population
from tests.live import wait_for
from tests.serve.gateway.conftest import gateway_before
from tests.serve.gateway.scripted import DONE, USAGE, ScriptedEngine, event

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Address of a collector, and the spans that it got."""
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    finally:
        server.shutdown()
        server.server_close()


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def test_a_request_is_a_span_below_its_clients_and_above_the_engines(
    tiny: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    engine = ScriptedEngine([event("a"), 0.1, event("b"), USAGE, DONE])
    with collector() as (endpoint, spans), gateway_before(engine, tiny, otlp_traces_endpoint=endpoint) as pair:
        body = {"prompt": "a secret", "stream": True, "budget": "standard", "latency_budget_ms": 9000}
        httpx.post(f"{pair.url}/v1/completions", json=body, headers={"traceparent": PARENT, "x-request-id": "mine"})
        wait_for("the span", lambda: [each for each in spans if each.name == "POST /v1/completions"], timeout_s=10)
        (span,) = [each for each in spans if each.name == "POST /v1/completions"]
        sent = engine.headers[-1]["traceparent"]
    assert span.trace_id.hex() == PARENT.split("-")[1]
    assert span.parent_span_id.hex() == PARENT.split("-")[2]
    assert sent == f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01"
    expected = {
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.usage.output_tokens": 3,
        "chorus.tier_served": "standard",
        "chorus.deadline_met": True,
        "chorus.request_id": "mine",
    }
    assert attributes(span).items() >= expected.items()
    (first,) = span.events
    assert span.start_time_unix_nano < first.time_unix_nano < span.end_time_unix_nano - 50_000_000
    assert "secret" not in str(span)


def test_a_failure_is_an_error_and_what_is_left_is_sent_at_the_end(tiny: Population) -> None:
    engine = ScriptedEngine([event("a")], then_break=True)
    with collector() as (endpoint, spans):
        with gateway_before(engine, tiny, otlp_traces_endpoint=endpoint) as pair:
            answer = httpx.post(f"{pair.url}/v1/completions", json={"prompt": "a", "stream": True})
            assert "stream_broken" in answer.text
        broken = [each for each in spans if each.name == "POST /v1/completions"]
        assert [each.status.code for each in broken] == [2]
        assert attributes(broken[0])["chorus.broken"] is True


def test_a_collector_that_is_away_harms_nothing(tiny: Population, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    engine = ScriptedEngine([event("a"), USAGE, DONE])
    with gateway_before(engine, tiny, otlp_traces_endpoint="http://127.0.0.1:9/v1/traces") as pair:
        answer = httpx.post(f"{pair.url}/v1/completions", json={"prompt": "a", "stream": True})
        assert answer.text.endswith("[DONE]\n\n")


def test_without_the_flag_a_traceparent_passes_as_it_is(tiny: Population) -> None:
    engine = ScriptedEngine([event("a"), USAGE, DONE])
    with gateway_before(engine, tiny) as pair:
        httpx.post(f"{pair.url}/v1/completions", json={"prompt": "a", "stream": True}, headers={"traceparent": PARENT})
        assert engine.headers[-1]["traceparent"] == PARENT
