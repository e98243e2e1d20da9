"""The chart as both Helms render it, and what judges the objects that come out."""

import json
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "chorus"
TOOLS = ROOT / "build" / "charts"
RELEASE, NAMESPACE = "demo", "answers"
CUSTOM = ("monitoring.coreos.com/", "keda.sh/", "gateway.networking.k8s.io/")


def value_sets() -> dict[str, dict[str, Any]]:
    """The chart's own value sets, by name."""
    files = sorted((CHART / "ci").glob("*-values.yaml"))
    return {file.name.removesuffix("-values.yaml"): yaml.safe_load(file.read_text()) for file in files}


def ask_tools(do: str, **request: Any) -> Any:
    """What tests/charts/in_tools_environment.py answers."""
    program = TOOLS / "venv" / "bin" / "python"
    assert program.is_file(), "the chart's tools are missing: `make charts` and `make test` set them up"
    script = Path(__file__).with_name("in_tools_environment.py")
    body = json.dumps({"do": do, "chart": str(CHART), **request})
    done = subprocess.run([program, script], input=body, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def helm4(*values: dict[str, Any]) -> list[list[Object] | str]:
    """For each value set: the objects, or Helm 4's refusal."""
    answers = ask_tools("render", values=list(values))
    return [answer.get("error") or objects_in(*manifests(answer["files"])) for answer in answers]


def manifests(files: dict[str, str]) -> list[str]:
    """Without the notes."""
    return [text for name, text in files.items() if name.endswith(".yaml")]


def helm3(values: dict[str, Any], *command: str) -> list[Object] | str:
    """The objects, or Helm 3's refusal."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        done = run_helm3("template", RELEASE, str(CHART), "-n", NAMESPACE, "-f", file.name, "--kube-version", "1.32.0")
    return objects_in(done.stdout) if done.returncode == 0 else done.stderr


def run_helm3(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Helm 3 as a command."""
    program = TOOLS / "node_modules" / ".bin" / "helm"
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)


def objects_in(*texts: str) -> list[Object]:
    """All objects, sorted by kind and name, which are unique."""
    found = [each for text in texts for each in yaml.safe_load_all(text) if each]
    found.sort(key=_key)
    assert len({_key(each) for each in found}) == len(found), "two objects of one kind share a name"
    return found


def _key(each: Object) -> tuple[str, str]:
    return each["kind"], each["metadata"]["name"]


@cache
def rendered(name: str) -> list[Object]:
    """The objects of one of the chart's own value sets, by Helm 4."""
    (found,) = helm4(value_sets()[name])
    assert not isinstance(found, str), found
    return found


def render(**values: Any) -> list[Object]:
    """The objects under these values, by Helm 4."""
    (found,) = helm4(values)
    assert not isinstance(found, str), found
    return found


def pick(objects: list[Object], kind: str, suffix: str = "") -> Object:
    """The one object of that kind whose name ends so."""
    (found,) = (each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(suffix))
    return found


def is_custom(each: Object) -> bool:
    """Whether Kubernetes itself does not know it."""
    return str(each["apiVersion"]).startswith(CUSTOM)


def pod_specs(objects: list[Object]) -> dict[str, Object]:
    """The specs of all pods that the objects make, by the object's kind and name."""
    found = {}
    for each in objects:
        if each["kind"] == "Pod":
            found[f"Pod {each['metadata']['name']}"] = each["spec"]
        elif "template" in each.get("spec", {}) and "spec" in each["spec"]["template"]:
            found[f"{each['kind']} {each['metadata']['name']}"] = each["spec"]["template"]["spec"]
    return found


def complaints_of_models(objects: list[Object]) -> list[str]:
    """What the published models of custom resources have against the objects."""
    script = Path(__file__).with_name("models.mjs")
    done = subprocess.run(
        ["node", str(script)],
        input=json.dumps(objects),
        capture_output=True,
        text=True,
        cwd=TOOLS,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found
