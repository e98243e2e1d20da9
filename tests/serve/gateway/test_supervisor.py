"""Engine processes that die, in every way, under a gateway that must not lose its head, nor leave a process behind."""

import asyncio
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import psutil
import pytest

from chorus.population.errors import ChorusError
from chorus.population.manifest import Population
from chorus.serve.gateway import gateway as gateway_module
from chorus.serve.gateway.app import create_app
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.supervisor import Supervision, engine_command, tail
from chorus.serve.gateway.gateway import Gateway
from chorus.serve.gateway.settings import Settings
from tests.live import serving, wait_for

SCRIPTED = str(Path(__file__).with_name("scripted.py"))
BODY = {"prompt": "a", "stream": True}


class Watched:
    """A gateway that runs the scripted engine as its child."""

    def __init__(self, url: str, gateway: Gateway, failures: list[str], log: Path) -> None:
        self.url = url
        self.gateway = gateway
        self.failures = failures
        self.log = log

    def ready(self) -> bool:
        return httpx.get(f"{self.url}/ready").status_code == 200

    def engine_processes(self) -> list[psutil.Process]:
        """Guard and engine: whatever has the engine's script in its command."""
        mine = psutil.Process().children(recursive=True)
        return [process for process in mine if SCRIPTED in _command(process)]

    def engine(self) -> psutil.Process:
        """The engine itself, the innermost of them."""
        return self.engine_processes()[-1]


def _mine() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def watching(
    population: Population,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    script: str = SCRIPTED,
    watch: dict[str, float] | None = None,
    **options: Any,
) -> Iterator[Watched]:
    log = directory / "engine.log"
    supervision = Supervision(directory=directory, log=log, stop_timeout_s=3, **options)

    def command(name: str, engine: Supervision, port: int) -> list[str]:
        return [sys.executable, script, str(port)]

    monkeypatch.setattr(gateway_module, "engine_command", command)
    failures: list[str] = []
    settings = Settings(
        population=population, engine=supervision, probe_interval_s=0.1, calibrates=False, **watch or {}
    )
    gateway = Gateway(settings, on_failure=failures.append)
    with serving(create_app(gateway)) as server:
        yield Watched(server.url, gateway, failures, log)


def test_requests_before_the_engine_is_up_get_503_with_a_time(
    tiny: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watching(tiny, tmp_path, monkeypatch) as watched:
        answer = httpx.post(f"{watched.url}/v1/completions", json=BODY)
        assert answer.status_code == 503
        assert 1 <= int(answer.headers["retry-after"]) <= 31
        assert answer.json()["error"]["code"] == "engine_unavailable"
        wait_for("ready", watched.ready, timeout_s=30)


def test_the_engine_gives_way_to_its_gateway(tiny: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watching(tiny, tmp_path, monkeypatch) as watched:
        wait_for("ready", watched.ready, timeout_s=30)
        engine = watched.engine()
        assert engine.nice() > psutil.Process().nice()
        group, own = (Path(f"/proc/{pid}/autogroup") for pid in (engine.pid, "self"))
        if own.exists() and own.read_text():  # sessions are scheduled as groups here
            assert int(group.read_text().split()[-1]) > int(own.read_text().split()[-1])


@pytest.mark.parametrize("victim", ["engine", "guard"])
def test_a_killed_engine_turns_ready_red_breaks_its_streams_loudly_and_comes_back(
    tiny: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    with watching(tiny, tmp_path, monkeypatch) as watched:
        wait_for("ready", watched.ready, timeout_s=30)
        with httpx.stream("POST", f"{watched.url}/v1/completions", json=BODY, timeout=30) as stream:
            assert stream.status_code == 200, stream.read()
            lines = stream.iter_lines()
            next(lines)
            before = watched.engine_processes()
            before[-1 if victim == "engine" else 0].kill()
            text = "\n".join(lines)
        assert '"code":"stream_broken"' in text
        assert "[DONE]" not in text

        wait_for("red", lambda: not watched.ready(), timeout_s=2)
        refused = httpx.post(f"{watched.url}/v1/completions", json=BODY)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        wait_for("ready again", watched.ready, timeout_s=30)
        assert httpx.post(f"{watched.url}/v1/completions", json=BODY, timeout=30).text.endswith("[DONE]\n\n")
        assert "chorus_gateway_engine_restarts_total 1.0" in httpx.get(f"{watched.url}/metrics").text
        assert not any(process.is_running() for process in before)
    assert not watched.engine_processes()


def restarts(watched: Watched) -> int:
    found = re.search(r"^chorus_gateway_engine_restarts_total (\S+)", httpx.get(f"{watched.url}/metrics").text, re.M)
    assert found
    return int(float(found[1]))


def slow_engine(directory: Path, *, first_s: float, then_s: float, core: str) -> str:
    """A program whose first answer takes `first_s` and each other `then_s`, with a process behind it that runs `core` for ever."""
    script = directory / "slow.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(Path(SCRIPTED).parent)!r})\n"
        "import scripted, uvicorn\n"
        "if os.fork() == 0:\n"
        f"    while True: {core}\n"
        "class Slow(scripted.ScriptedEngine):\n"
        "    async def _answer(self, send):\n"
        f"        self.steps = [{first_s} if len(self.bodies) == 1 else {then_s}, scripted.WHOLE]\n"
        "        await super()._answer(send)\n"
        "engine = Slow()\n"
        "engine.content_type = 'application/json'\n"
        "uvicorn.run(engine, port=int(sys.argv[1]), log_level='warning')\n"
    )
    return str(script)


STALL = {"stall_timeout_s": 1.5, "probe_timeout_s": 1.0}


def test_a_slow_first_request_does_not_restart_the_engine(
    tiny: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = slow_engine(tmp_path, first_s=4.0, then_s=0.01, core="time.sleep(9)")
    with watching(tiny, tmp_path, monkeypatch, script=script, watch=STALL) as watched:
        for num_before in range(2):
            wait_for("ready", watched.ready, timeout_s=30)
            time.sleep(2 * STALL["stall_timeout_s"])  # what an engine without work does not do says nothing about it
            assert httpx.post(f"{watched.url}/v1/completions", json={"prompt": "a"}, timeout=30).status_code == 200
            assert restarts(watched) == num_before
            next(process for process in _mine() if script in _command(process)).kill()
            wait_for("red", lambda: not watched.ready(), timeout_s=20)


@pytest.mark.parametrize("is_busy", [True, False])
def test_a_step_longer_than_the_stall_timeout_is_waited_for_while_the_core_computes(
    tiny: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_busy: bool
) -> None:
    core = "pass" if is_busy else "time.sleep(9)"
    script = slow_engine(tmp_path, first_s=0.01, then_s=5.0, core=core)
    with watching(tiny, tmp_path, monkeypatch, script=script, watch=STALL) as watched:
        wait_for("ready", watched.ready, timeout_s=30)
        statuses = [
            httpx.post(f"{watched.url}/v1/completions", json={"prompt": "a"}, timeout=30).status_code for _ in range(2)
        ]
        assert statuses == [200, 200 if is_busy else 503]
        wait_for("ready again", watched.ready, timeout_s=30)
        assert restarts(watched) == (0 if is_busy else 1)


def test_a_server_that_was_stopped_is_started_anew(
    tiny: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watching(tiny, tmp_path, monkeypatch, watch=STALL) as watched:
        wait_for("ready", watched.ready, timeout_s=30)
        stopped = watched.engine()
        stopped.suspend()
        wait_for("red", lambda: not watched.ready(), timeout_s=10)
        wait_for("ready again", watched.ready, timeout_s=40)
        assert restarts(watched) == 1
        assert not _lives(stopped)
        assert httpx.post(f"{watched.url}/v1/completions", json=BODY, timeout=30).text.endswith("[DONE]\n\n")


def test_retry_after_is_how_long_the_last_start_took(
    tiny: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text(f"import runpy, time\ntime.sleep(3)\nrunpy.run_path({SCRIPTED!r}, run_name='__main__')\n")
    with watching(tiny, tmp_path, monkeypatch, script=str(slow)) as watched:
        wait_for("ready", watched.ready, timeout_s=30)
        next(process for process in psutil.Process().children(recursive=True) if str(slow) in _command(process)).kill()
        wait_for("red", lambda: not watched.ready(), timeout_s=2)
        promised_s = int(httpx.get(f"{watched.url}/ready").headers["retry-after"])
        down_at = time.monotonic()
        wait_for("ready again", watched.ready, timeout_s=30)
        took_s = time.monotonic() - down_at
    assert 3 <= promised_s <= 15
    assert took_s == pytest.approx(promised_s, abs=3)


def test_retry_after_grows_when_a_start_takes_longer_than_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(Mock(), url="http://engine", is_supervised=True, probe_interval_s=1.0, probe_timeout_s=1.0)
    engine.mark_up(start_s=20.0)

    async def goes_down() -> None:
        engine.mark_down(launch_in_s=2.0)

    asyncio.run(goes_down())
    down_at = time.monotonic()
    for after_s, expected in ((0.5, 22), (15.5, 7), (21.5, 1), (24.0, 1), (61.0, 10), (121.0, 25)):
        monkeypatch.setattr(time, "monotonic", lambda after_s=after_s: down_at + after_s)
        assert engine.retry_after_s() == expected


def test_an_engine_that_never_starts_is_given_up_at_once_with_the_end_of_its_log(
    tiny: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no such weights')\n")
    with watching(tiny, tmp_path, monkeypatch, script=str(broken)) as watched:
        wait_for("failure", lambda: watched.failures, timeout_s=20)
        assert "did not start" in watched.failures[0]
        assert "no such weights" in watched.failures[0]
        assert str(watched.log) in watched.failures[0]


def test_an_engine_that_fails_again_and_again_is_given_up(
    tiny: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watching(tiny, tmp_path, monkeypatch, max_quick_failures=2) as watched:
        for _ in range(2):
            wait_for("ready", watched.ready, timeout_s=30)
            watched.engine().kill()
            wait_for("red", lambda: not watched.ready(), timeout_s=2)
        wait_for("failure", lambda: watched.failures, timeout_s=20)
        assert "failed 2 times in a row" in watched.failures[0]


def test_an_engine_that_ignores_a_stop_signal_is_killed(
    tiny: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubborn = tmp_path / "stubborn.py"
    stubborn.write_text(
        "import http.server, os, signal, sys\n"
        "class Healthy(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200)\n"
        "        self.end_headers()\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork() == 0: signal.pause()\n"
        "http.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Healthy).serve_forever()\n"
    )
    others = psutil.Process().children(recursive=True)  # the server that other tests share
    with watching(tiny, tmp_path, monkeypatch, script=str(stubborn)) as watched:
        wait_for("ready", watched.ready, timeout_s=30)
        processes = [process for process in psutil.Process().children(recursive=True) if process not in others]
        assert len(processes) == 3
    wait_for("all gone", lambda: not any(_lives(process) for process in processes), timeout_s=10)
    assert "did not stop within 3 s" in watched.log.read_text()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_engine_outlives_its_gateway(tmp_path: Path, how: signal.Signals) -> None:
    """The guard's owner dies without a word; the engine has a child of its own that would stay behind."""
    engine = tmp_path / "engine.py"
    engine.write_text("import os, time\nos.fork()\nos.write(1, b'%d\\n' % os.getpid())\ntime.sleep(600)\n")
    owner = tmp_path / "owner.py"
    owner.write_text(
        "import subprocess, sys, time\n"
        "guard = [sys.executable, '-P', '-m', 'chorus.serve.gateway.engines.guard', '2', sys.executable, sys.argv[1]]\n"
        "subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, str(owner), str(engine)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            engines = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
        finally:
            process.send_signal(how)
        wait_for("both ended", lambda: not any(_lives(engine) for engine in engines), timeout_s=10)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("argument", ["--port", "--port=1", "--served-model-name", "--served_model_name=x", "--model"])
def test_engine_arguments_that_the_gateway_sets_are_refused(tmp_path: Path, argument: str) -> None:
    with pytest.raises(ChorusError, match="--engine"):
        Supervision(directory=tmp_path, arguments=(argument,))


def test_the_engine_listens_on_this_machine_only_under_the_populations_name(tmp_path: Path) -> None:
    command = engine_command("tiny", Supervision(directory=tmp_path, arguments=("--dtype", "float32")), 1234)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--served-model-name") + 1] == "tiny"
    assert command[-2:] == ["--dtype", "float32"]


def test_the_tail_of_a_log_leaves_out_blank_lines() -> None:
    log = "".join(f"line {idx}\n\n" for idx in range(10_000))
    assert tail(log, 2) == "  line 9998\n  line 9999"


def test_why_an_engine_did_not_start_is_one_sentence(
    tiny: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def load():\n    raise ValueError('sliding windows are not supported.')\nload()\n")
    with watching(tiny, tmp_path, monkeypatch, script=str(broken)) as watched:
        wait_for("failure", lambda: watched.failures, timeout_s=20)
        assert watched.failures == [
            f"the engine did not start: sliding windows are not supported.\nIts log: {watched.log}"
        ]


def test_why_an_engine_ended_is_looked_for_in_its_last_life(
    tiny: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watching(tiny, tmp_path, monkeypatch, max_quick_failures=2) as watched:
        wait_for("ready", watched.ready, timeout_s=30)
        with watched.log.open("a") as log:
            log.write("ValueError: why life 1 ended\n")
        watched.engine().kill()
        wait_for("red", lambda: not watched.ready(), timeout_s=5)
        wait_for("ready", watched.ready, timeout_s=30)
        watched.engine().kill()
        wait_for("failure", lambda: watched.failures, timeout_s=20)
        assert "life 1" not in watched.failures[0]
        assert "status -9" in watched.failures[0]
