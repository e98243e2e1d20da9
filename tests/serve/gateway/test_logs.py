"""Log lines: whatever clients and engines send, one record is one record."""

import io
import json
import logging
import sys
from collections.abc import Callable

import httpx
import pytest

from chorus.population.manifest import Population
from chorus.serve.gateway import logs
from chorus.serve.gateway.logs import JsonFormatter, TextFormatter
from tests.serve.gateway.conftest import gateway_before
from tests.serve.gateway.scripted import ScriptedEngine

FORGED = "a\n2026-01-01 00:00:00,000 all is well\r\x1b[2J\x9b31m\u2028\ud800\x00"


def written(formatter: logging.Formatter, log: Callable[[logging.Logger], None]) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.Logger("chorus.test")
    logger.addHandler(handler)
    log(logger)
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode()


def fail(logger: logging.Logger) -> None:
    try:
        raise ValueError(FORGED)
    except ValueError:
        logger.exception("request failed: %s", FORGED)


def has_control(text: str) -> bool:
    return any(not each.isprintable() for each in text.replace("\n", ""))


def test_control_characters_are_escaped_in_text() -> None:
    line = written(TextFormatter(), lambda logger: logger.warning("model %s", FORGED))
    assert line.count("\n") == 1
    assert not has_control(line)
    assert "\\n2026-01-01" in line
    assert "\\x1b[2J\\x9b31m\\u2028\\ud800\\x00" in line
    assert "Grüße 你好" in written(TextFormatter(), lambda logger: logger.warning("Grüße 你好"))


def test_a_tracebacks_lines_cannot_pass_for_records() -> None:
    first, *more = written(TextFormatter(), fail).splitlines()
    assert first[:2] == "20"
    assert more[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") for line in more)
    assert not has_control("".join(more))


def test_json_has_one_line_per_record_whatever_is_in_it() -> None:
    lines = written(JsonFormatter(), fail).splitlines()
    assert len(lines) == 1
    assert not has_control(lines[0])
    assert FORGED in json.loads(lines[0])["message"]


@pytest.mark.parametrize("as_json", [False, True])
def test_what_a_client_sends_reaches_no_log(tiny: Population, as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths, headers, models and keys with line ends in them: a log tells of the route, the tenant and an id that is checked."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(logging.getLogger("httpx"), "disabled", True)  # the client's own log
    handlers, level = logging.root.handlers[:], logging.root.level
    logging.root.handlers.clear()
    try:
        logs.configure(as_json=as_json, is_verbose=True)
        with gateway_before(ScriptedEngine(), tiny) as pair:
            forged = "x%0d%0aFORGED%1b%5b2J"
            httpx.get(f"{pair.url}/{forged}")
            httpx.get(f"{pair.url}/v1/models/{forged}")
            httpx.get(f"{pair.url}/health", headers={"x-request-id": "FORGED id", "user-agent": "FORGED\tagent"})
            httpx.post(f"{pair.url}/v1/completions", json={"prompt": "FORGED", "model": "x\r\nFORGED"})
            httpx.post(f"{pair.url}/v1/completions", content=b"{}", headers={"authorization": "Bearer FORGED"})
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
    found = stream.getvalue()
    assert "/v1/completions" in found
    assert "FORGED" not in found
    assert not has_control(found)
