"""What is told about each request: metrics that Prometheus takes, and logs that a machine reads."""

import json
import logging
import re

import httpx
import pytest

from chorus.population.manifest import Loss, Population
from chorus.serve.gateway.logs import JsonFormatter
from tests.live import wait_for
from tests.serve.gateway.conftest import Pair, gateway_before
from tests.serve.gateway.scripted import DONE, USAGE, ScriptedEngine, event


def test_a_request_is_logged_as_one_object(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    pair.engine.steps = [event("a"), event("b"), USAGE, DONE]
    with caplog.at_level(logging.INFO, logger="chorus.serve.gateway.observe.record"):
        body = {"prompt": "a secret prompt", "stream": True, "model": "tiny:standard", "latency_budget_ms": 9000}
        httpx.post(f"{pair.url}/v1/completions", json=body, headers={"x-request-id": "mine"})
        httpx.post(f"{pair.url}/v1/completions", content=b"")
        # A line is written when the answer has been sent, in the server's own time.
        wait_for(
            "both lines",
            lambda: sum(each.name == "chorus.serve.gateway.observe.record" for each in caplog.records) == 2,
            timeout_s=10,
        )
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    first, second = (line for line in lines if line["logger"] == "chorus.serve.gateway.observe.record")
    expected = {"request_id": "mine", "route": "/v1/completions", "status": 200, "tier_asked": "standard"}
    expected |= {"tier_served": "standard", "tenant": "anyone", "completion_tokens": 3, "deadline_met": True}
    assert first.items() >= expected.items()
    assert first["first_token_ms"] <= first["duration_ms"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert second["status"] == 422
    assert "tier_served" not in second
    assert "secret" not in caplog.text


def test_an_exception_is_one_line_too() -> None:
    try:
        raise ValueError("x\ny")
    except ValueError as error:
        record = logging.LogRecord(
            "n", logging.ERROR, "f", 1, "failed", None, (type(error), error, error.__traceback__)
        )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert "ValueError" in json.loads(line)["exception"]


def test_metrics_have_names_that_prometheus_takes_and_the_fields_buckets(pair: Pair) -> None:
    pair.engine.steps = [event("a"), 0.05, event("b"), USAGE, DONE]
    httpx.post(f"{pair.url}/v1/completions", json={"prompt": "a", "stream": True})
    text = httpx.get(f"{pair.url}/metrics").text
    names = {line.split(" ")[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert all(re.fullmatch(r"chorus_gateway_[a-z_]+", name) for name in names)
    bounds = re.findall(r'time_per_output_token_seconds_bucket\{le="([^"]+)"', text)
    assert bounds == [
        "0.01",
        "0.025",
        "0.05",
        "0.075",
        "0.1",
        "0.15",
        "0.2",
        "0.3",
        "0.4",
        "0.5",
        "0.75",
        "1.0",
        "2.5",
        "+Inf",
    ]
    assert 'chorus_gateway_time_per_output_token_seconds_count{tier_served="max"} 1.0' in text


def test_each_tier_shows_the_loss_that_it_was_evaluated_at(tiny: Population) -> None:
    loss = Loss(nats=2.5, low=2.4, high=2.6, num_tokens=9)
    tiers = tuple(tier.model_copy(update={"test_loss": loss if tier.name == "max" else None}) for tier in tiny.tiers)
    with gateway_before(ScriptedEngine(), tiny.model_copy(update={"tiers": tiers})) as pair:
        text = httpx.get(f"{pair.url}/metrics").text
    assert 'chorus_gateway_tier_test_loss_nats{tier="max"} 2.5' in text
    assert 'tier="economy"' not in text
    assert "chorus_gateway_redis_up" not in text
