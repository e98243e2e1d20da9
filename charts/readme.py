"""Writes charts/chorus/README.md: every value with its default, and what values.yaml says about it."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "chorus"
_KEY = re.compile(r"^(\s*)([A-Za-z0-9]+):")
_HEAD = """\
# chorus, the chart

Installs gateways and engines for one population, with autoscaling, alerts, a dashboard and network policies. For sizing and
operation, see [docs/operations.md](../../docs/operations.md). `make charts` generates this page from `values.yaml`.

    kubectl create namespace chorus
    helm install mine charts/chorus -n chorus --set population.pvc.claimName=my-population
    helm test mine -n chorus

Requires Kubernetes 1.29 or newer, and Helm 3.10 or newer or Helm 4. CI renders and checks every value set in `ci/`.

"""


def comments(text: str) -> dict[str, str]:
    """What the `# --` comment above each value says, by the value's path."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    said: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# -- "):
            said = [stripped.removeprefix("# -- ")]
        elif stripped.startswith("# ") and said:
            said.append(stripped.removeprefix("# "))
        elif key := _KEY.match(line):
            indent = len(key[1])
            path = [*(each for each in path if each[0] < indent), (indent, key[2])]
            if said:
                found[".".join(name for _, name in path)] = " ".join(said)
            said = []
        else:
            said = []
    return found


def leaves(values: dict[str, Any], said: dict[str, str], path: str = "") -> list[tuple[str, Any]]:
    """Every value that has a comment of its own, or nothing below it."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        where = f"{path}.{name}" if path else name
        if isinstance(value, dict) and value and where not in said:
            found += leaves(value, said, where)
        else:
            found.append((where, value))
    return found


def readme() -> str:
    """The page.

    Raises:
        SystemExit: a value has no comment.
    """
    text = (CHART / "values.yaml").read_text()
    said = comments(text)
    rows = leaves(yaml.safe_load(text), said)
    if silent := [where for where, _ in rows if where not in said]:
        sys.exit(f"values.yaml says nothing about {', '.join(silent)}: write a `# -- ` comment above each.")
    lines = ["| value | default | |", "|---|---|---|"]
    for where, value in rows:
        lines.append(f"| `{where}` | `{json.dumps(value)}` | {said[where].replace('|', '&#124;')} |")
    return _HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    (CHART / "README.md").write_text(readme())
