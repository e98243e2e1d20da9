"""`chorus engine`: what it becomes, and how it waits for requests to end. The live engine is asked in tests/charts."""

import http.server
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from chorus.population.errors import ChorusError
from chorus.serve.engine.command import engine


def run(*arguments: str) -> Any:
    return CliRunner().invoke(engine, list(arguments), catch_exceptions=False)


def test_it_becomes_vllm_under_the_populations_name(tiny_population: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(os, "execv", lambda program, command: became.append(command))
    run("serve", str(tiny_population), "--host", "0.0.0.0", "--port", "8100", "--", "--dtype", "float32")
    (command,) = became
    assert command[0] == sys.executable
    assert command[command.index("--served-model-name") + 1] == "tiny"
    assert command[command.index("--host") + 1 : command.index("--port") + 2] == ["0.0.0.0", "--port", "8100"]
    assert command[-2:] == ["--dtype", "float32"]
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"


def test_what_it_sets_itself_is_refused(tiny_population: Path) -> None:
    with pytest.raises(ChorusError, match="--served-model-name"):
        run("serve", str(tiny_population), "--", "--served-model-name=other")
    with pytest.raises(ChorusError, match="is not a population"):
        run("serve", str(tiny_population / "members"))


class Engine:
    """What of an engine `drain` looks at."""

    def __init__(self) -> None:
        self.running = 0.0
        self.shown = True
        """Whether a step has ended since the latest request came: until then the metrics do not show it."""
        self.asked: list[str] = []
        self.url = ""


@pytest.fixture
def busy() -> Iterator[Engine]:
    state = Engine()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self._answer(b'{"data": [{"id": "tiny"}]}')
                return
            lines = [
                "# TYPE vllm:num_requests_running gauge",
                f'vllm:num_requests_running{{engine="0",model_name="tiny"}} {state.running if state.shown else 0.0}',
                'vllm:num_requests_waiting{engine="0",model_name="tiny"} 0.0',
                'vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 5.0',
            ]
            self._answer("\n".join(lines).encode())

        def do_POST(self) -> None:
            state.asked.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            state.shown = True
            self._answer(b"{}")

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_draining_waits_for_the_last_request(busy: Engine) -> None:
    busy.running = 1.0
    began = time.monotonic()
    threading.Timer(1.5, lambda: setattr(busy, "running", 0.0)).start()
    result = run("drain", busy.url, "--after", "0", "--timeout", "20")
    assert result.exit_code == 0
    assert 1.5 < time.monotonic() - began < 10
    assert json.loads(busy.asked[-1]) == {"model": "tiny", "prompt": [0], "max_tokens": 1}


def test_a_request_in_its_first_step_is_waited_for_though_no_metric_shows_it_yet(busy: Engine) -> None:
    busy.running, busy.shown = 1.0, False
    began = time.monotonic()
    threading.Timer(2.0, lambda: setattr(busy, "running", 0.0)).start()
    assert run("drain", busy.url, "--after", "0", "--timeout", "20").exit_code == 0
    assert time.monotonic() - began > 2.0


def test_draining_gives_up_after_its_time_and_says_so(busy: Engine) -> None:
    busy.running = 2.0
    result = run("drain", busy.url, "--after", "0", "--timeout", "0.5")
    assert result.exit_code == 1
    assert "requests are still running" in result.output


def test_an_engine_that_is_gone_needs_no_wait() -> None:
    assert run("drain", "http://127.0.0.1:9", "--after", "0").exit_code == 0
