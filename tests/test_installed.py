"""The wheel, installed in an environment of its own and run in a folder where every file has the name of a module."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest

from tests.live import ENGINE_ARGUMENTS, chorus_serve
from tests.worlds import make_population

ROOT = Path(__file__).parents[1]
_NAMES = ("train", "serve", "prior", "population", "chorus", "types", "torch", "vllm", "numpy", "json", "worker")
_COMMANDS = ("train", "distil", "average", "prior", "serve", "engine", "bench", "population")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, capture_output=True, timeout=120)
    return next(directory.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command `chorus` of an environment that holds the wheel, and sees this environment's packages but not its checkout."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    install = ["--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True, timeout=120)
    packages = next((environment / "lib").glob("python*/site-packages"))
    # A path in a .pth file is only that: the .pth file of the editable install there is not read.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = "import chorus.population; print(chorus.population.__file__)"
    found = subprocess.run([python, "-P", "-c", where], check=True, capture_output=True, text=True).stdout
    assert found.startswith(str(packages))
    return environment / "bin" / "chorus"


@pytest.fixture
def traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: whatever imports from it fails."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in _NAMES:
        (folder / f"{name}.py").write_text(f"raise ImportError('the user\\'s {name}.py was imported')\n")
    for name in ("serve", "tests"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('the user\\'s folder was imported')\n")
    monkeypatch.chdir(folder)
    return folder


def run(chorus: Path, *arguments: str) -> str:
    finished = subprocess.run([chorus, *arguments], capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_the_wheel_has_one_top_level_name(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        tops = {Path(name).parts[0] for name in archive.namelist()}
        names = archive.namelist()
    assert {top for top in tops if not top.endswith(".dist-info")} == {"chorus"}
    rooms = ("population", "train", "prior", "serve")
    shipped = {name for name in names if name.startswith("chorus/") and name.endswith(".py")}
    assert shipped - {"chorus/__init__.py", "chorus/__main__.py"} == {
        f"chorus/{path.relative_to(ROOT)}" for room in rooms for path in (ROOT / room).rglob("*.py")
    }


@pytest.mark.usefixtures("traps")
@pytest.mark.parametrize("command", _COMMANDS)
def test_every_command_starts_in_a_folder_of_traps(installed: Path, command: str) -> None:
    assert "Usage: chorus" in run(installed, command, "--help")


@pytest.mark.usefixtures("traps")
def test_training_and_fitting_work_in_a_folder_of_traps(installed: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    shape = ["--layers", "1", "--width", "32", "--heads", "1", "--vocab-size", "300", "--context-length", "64"]
    length = ["--trajectories", "2", "--cycles", "2", "--epochs-per-cycle", "1", "--max-bytes", "60000"]
    run(installed, "train", "stdlib", "--out", out, *shape, *length, "--batch-tokens", "1024")
    run(installed, "prior", "fit", out)
    run(installed, "average", out, "--last", "2")
    run(installed, "distil", out)
    assert "t1-c01" in run(installed, "population", "show", "--verify", out)


@pytest.mark.usefixtures("traps")
def test_serving_works_in_a_folder_of_traps(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    population = tmp_path / "population"
    make_population(population)
    monkeypatch.setenv("PATH", f"{installed.parent}{os.pathsep}{os.environ['PATH']}")
    with chorus_serve(population, tmp_path / "serve.log", "--", *ENGINE_ARGUMENTS, chorus=installed) as server:
        server.wait_until_ready()
        body = {"prompt": "def", "max_tokens": 4}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
