"""The command as a user meets it: quick help, populations from checkpoints, one sentence for what went wrong."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from chorus.population import manifest
from chorus.population.command import population as command
from chorus.population.errors import ChorusError


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "chorus", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from chorus.population.cli import cli; cli(['--help'], standalone_mode=False); print(sorted(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    help_text, _, modules = output.rpartition("[")
    assert all(name in help_text for name in ("train", "prior", "serve", "population"))
    assert not {f"'{name}'" for name in ("torch", "transformers", "vllm", "numpy", "rich")} & set(modules.split(", "))


@pytest.mark.parametrize("name", ["train", "prior", "serve", "population"])
def test_the_help_of_a_command_needs_no_torch(name: str) -> None:
    code = f"import sys; from chorus.population import cli; cli.cli.main(['{name}', '--help'], standalone_mode=False)"
    code += "; assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_errors_are_one_sentence_and_status_2(tmp_path: Path) -> None:
    finished = run("population", "show", str(tmp_path))
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: ")
    assert "Traceback" not in finished.stderr
    assert run("population", "dance").returncode == 2


def test_show_prints_members_and_tiers(tiny_population: Path) -> None:
    result = CliRunner().invoke(command, ["show", str(tiny_population), "--verify"])
    assert result.exit_code == 0, result.output
    for text in ("tiny", "t0-c03", "economy", "standard", "4.00x", "all digests match"):
        assert text in " ".join(result.output.split())


def test_a_member_of_weight_zero_neither_runs_nor_costs(tiny_population: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_population, tmp_path / "zero"))
    raw = json.loads((directory / manifest.MANIFEST).read_text())
    assert (raw["tiers"][-1]["relative_cost"], len(raw["tiers"][-1]["members"])) == (4, 4)
    raw["tiers"][-1]["weights"] = [0.5, 0.0, 0.25, 0.25]
    (directory / manifest.MANIFEST).write_text(json.dumps(raw))
    tier = manifest.load(directory).tier("max")
    assert (tier.members, tier.weights) == (("t0-c00", "t0-c02", "t0-c03"), (0.5, 0.25, 0.25))
    assert (tier.budget, tier.relative_cost) == (3, 3)
    shown = CliRunner().invoke(command, ["show", str(directory)]).output
    assert "3.00x" in shown
    assert "4.00x" not in shown


@pytest.fixture
def checkpoints(tiny_population: Path, tmp_path: Path) -> list[Path]:
    """Three plain checkpoints with tokenizers, as fine-tunes of one base lie around."""
    found = []
    for idx in range(3):
        checkpoint = tmp_path / f"tune-{idx}"
        shutil.copytree(tiny_population / f"members/t0-c0{idx}", checkpoint)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tiny_population / name, checkpoint / name)
        found.append(checkpoint)
    return found


def test_checkpoints_become_a_population(checkpoints: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "mine"
    result = CliRunner().invoke(command, ["init", *map(str, checkpoints), "--out", str(out)])
    assert result.exit_code == 0, result.output
    made = manifest.load(out)
    manifest.verify(made, out)
    assert [member.name for member in made.members] == ["tune-0", "tune-1", "tune-2"]
    assert made.tier("max").weights == (1 / 3, 1 / 3, 1 / 3)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["PopulationForCausalLM"]


def test_commands_for_what_comes_next_can_be_pasted(checkpoints: list[Path], tmp_path: Path) -> None:
    out = tmp_path / ("it's a long way [bold] " * 6).strip()
    result = CliRunner().invoke(command, ["init", *map(str, checkpoints), "--out", str(out)])
    assert result.exit_code == 0, result.output
    *_, fit, serve = result.output.splitlines()
    assert shlex.split(fit) == ["chorus", "prior", "fit", str(out), "--corpus", "TEXT"]
    assert shlex.split(serve) == ["chorus", "serve", str(out)]


def test_checkpoints_that_cannot_be_mixed_are_refused_and_nothing_is_written(
    checkpoints: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "mine"

    def refused(match: str) -> None:
        result = CliRunner().invoke(command, ["init", *map(str, checkpoints), "--out", str(out)])
        assert isinstance(result.exception, ChorusError), result.output
        assert match in str(result.exception)
        assert not out.exists()

    tokenizer = checkpoints[2] / "tokenizer.json"
    original = tokenizer.read_text()
    tokenizer.write_text(original.replace('"merges"', '"merges_"', 1))
    refused("different tokenizers")
    tokenizer.write_text(original)
    config = checkpoints[1] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 600}))
    refused("different vocabularies")
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 512}))
    (checkpoints[0] / "model.safetensors").rename(checkpoints[0] / "pytorch_model.bin")
    refused("safetensors")


def test_an_output_that_holds_something_is_left_alone(checkpoints: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "precious").write_text("keep")
    result = CliRunner().invoke(command, ["init", *map(str, checkpoints), "--out", str(out)])
    assert "not empty" in str(result.exception)
    assert (out / "precious").read_text() == "keep"


def test_a_checkpoint_cut_short_is_refused(checkpoints: list[Path], tmp_path: Path) -> None:
    weights = checkpoints[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:4])
    result = CliRunner().invoke(command, ["init", *map(str, checkpoints), "--out", str(tmp_path / "mine")])
    assert "not a safetensors file" in str(result.exception)
    assert not (tmp_path / "mine").exists()
    assert not list(tmp_path.glob(".mine*"))
