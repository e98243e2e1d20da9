"""`chorus serve` before any engine starts: what it loads, what it refuses, what it prints."""

import io
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from rich.console import Console

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.manifest import Loss, Population
from chorus.serve.gateway import launch
from chorus.serve.gateway.command import serve
from chorus.serve.gateway.console import print_example, print_offer, print_ready
from chorus.serve.gateway.settings import Settings
from tests.live import chorus_serve, serving, wait_for
from tests.serve.gateway.scripted import ScriptedEngine


@pytest.fixture
def own_copy(tiny_population: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_population, tmp_path / "copy")


def refusal(directory: Path, *arguments: str) -> str:
    """The sentence with which `chorus serve` refuses; nothing was started, or this would not return."""
    result = CliRunner().invoke(serve, [str(directory), "--port", "0", *arguments])
    assert isinstance(result.exception, ChorusError), result.output
    return str(result.exception)


def test_importing_the_gateway_loads_nothing_heavy() -> None:
    program = (
        "import sys, chorus.serve.gateway.launch\n"
        "heavy = {'torch', 'transformers', 'vllm', 'matplotlib', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_importing_the_command_loads_not_even_the_server() -> None:
    program = "import sys, chorus.serve.gateway.command\nassert not {'fastapi', 'uvicorn', 'aiohttp', 'rich'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_what_is_not_a_population_is_refused(tmp_path: Path) -> None:
    assert "is not a population" in refusal(tmp_path)


def test_damaged_weights_are_refused(own_copy: Path) -> None:
    weights = own_copy / "members/t0-c01/model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert "t0-c01" in refusal(own_copy)


def test_a_missing_member_is_refused(own_copy: Path) -> None:
    shutil.rmtree(own_copy / "members/t0-c02")
    assert "'t0-c02' is missing" in refusal(own_copy)


def test_members_of_different_vocabularies_are_refused(own_copy: Path) -> None:
    config = own_copy / "members/t0-c03/config.json"
    config.write_text(config.read_text().replace('"vocab_size": 512', '"vocab_size": 500'))
    assert "500" in refusal(own_copy)


def test_an_unknown_default_tier_is_refused_naming_the_tiers(tiny_population: Path) -> None:
    assert "economy, standard, max" in refusal(tiny_population, "--default-tier", "gold")


def test_an_engine_address_that_is_none_is_refused(tiny_population: Path) -> None:
    assert "http://127.0.0.1:8001" in refusal(tiny_population, "--engine", "localhost:8001")


def test_a_port_that_is_taken_is_refused_before_an_engine_starts(tiny_population: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "--port" in refusal(tiny_population, "--port", str(taken.getsockname()[1]))


def test_engine_arguments_need_an_engine_of_our_own(tiny_population: Path) -> None:
    result = CliRunner().invoke(serve, [str(tiny_population), "--engine", "http://x", "--", "--dtype", "float32"])
    assert result.exit_code == 2
    assert "--engine" in result.output


def test_an_engine_of_our_own_says_how_many_sequences_it_runs() -> None:
    assert launch.max_num_seqs(["--dtype", "float32", "--max-num-seqs", "16"]) == 16
    assert launch.max_num_seqs(["--max_num_seqs=8"]) == 8
    assert launch.max_num_seqs(["--max-num-batched-tokens", "512"]) is None
    assert launch.max_num_seqs(["--max-num-seqs", "many"]) is None


def test_a_population_without_tiers_is_served_under_uniform_ones(own_copy: Path, tiny: Population) -> None:
    manifest.save(tiny.model_copy(update={"tiers": ()}), own_copy)
    loaded = launch.load(own_copy)
    assert [(tier.name, tier.budget) for tier in loaded.tiers] == [("economy", 1), ("max", 4)]
    assert loaded.tiers[1].weights == (0.25,) * 4


def test_before_engines_of_others_the_manifest_alone_is_enough(tiny_population: Path, tmp_path: Path) -> None:
    (tmp_path / manifest.MANIFEST).write_bytes((tiny_population / manifest.MANIFEST).read_bytes())
    assert launch.load(tmp_path, with_weights=False) == manifest.load(tiny_population)
    with pytest.raises(ChorusError, match="tokenizer"):
        launch.load(tmp_path)


def test_the_offer_shows_every_tier_and_a_request_to_copy(tiny: Population) -> None:
    loss = Loss(nats=3.21, low=3.2, high=3.22, num_tokens=100)
    measured = tiny.model_copy(
        update={"tiers": (tiny.tiers[0].model_copy(update={"test_loss": loss}), *tiny.tiers[1:])}
    )
    console = Console(width=80, record=True, file=io.StringIO())
    default = Settings(population=measured, engine="http://x").default_tier
    print_offer(console, measured, default)
    print_ready(console, "http://127.0.0.1:8000", "http://127.0.0.1:9", 12.3)
    print_example(console, "http://127.0.0.1:8000", measured, default)
    shown = console.export_text()
    for expected in ("economy", "standard", "max (default)", "3.2100", "ready in 12 s", "http://127.0.0.1:8000/v1"):
        assert expected in shown
    assert "curl http://127.0.0.1:8000/v1/completions -H" in shown
    assert '"budget": "max"}' in shown


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_quietly(tiny_population: Path, tmp_path: Path, how: signal.Signals) -> None:
    with serving(ScriptedEngine()) as engine:
        arguments = ("--engine", engine.url, "--default-tier", "economy")
        with chorus_serve(tiny_population, tmp_path / "output", *arguments) as server:
            server.wait_until_ready(60)
            server.process.send_signal(how)
            assert server.process.wait(20) == 0
            assert "economy (default)" in server.output
            assert "stopped" in server.output
            assert "Traceback" not in server.output


def test_an_engine_that_cannot_start_ends_the_command_with_one_sentence_and_where_its_log_is(
    tiny_population: Path, tmp_path: Path
) -> None:
    arguments = ("--", "--no-such-option")
    with chorus_serve(tiny_population, tmp_path / "output", *arguments) as server:
        assert server.process.wait(120) == 2
        assert "error: the engine did not start" in server.output
        assert "unrecognized arguments: --no-such-option\nIts log: /" in server.output
        assert "Traceback" not in server.output


def test_a_gateway_that_is_killed_takes_its_engine_along(tiny_population: Path, tmp_path: Path) -> None:
    with chorus_serve(tiny_population, tmp_path / "output") as server:
        gateway = psutil.Process(server.process.pid)
        wait_for("guard and engine", lambda: len(gateway.children(recursive=True)) >= 2, timeout_s=60)
        children = gateway.children(recursive=True)
        server.process.kill()
        wait_for("all ended", lambda: not any(child.is_running() for child in children), timeout_s=20)
