"""Run by the Python of build/charts: Helm 4 and kubernetes-validate, which the project's own environment does not have.

A request on stdin, an answer on stdout, both JSON.
"""

import json
import sys
from typing import Any

import kubernetes_validate
from helm_python.chart import Chart, lint
from helm_python.errors import HelmError

RELEASE, NAMESPACE = "demo", "answers"


def render(request: dict[str, Any]) -> list[dict[str, Any]]:
    """For each value set: the files, or why there are none."""
    answers = []
    with Chart.load(request["chart"]) as chart:
        for values in request["values"]:
            try:
                answers.append({"files": chart.render(values=values, name=RELEASE, namespace=NAMESPACE)})
            except HelmError as error:
                answers.append({"error": str(error)})
    return answers


def lint_all(request: dict[str, Any]) -> list[dict[str, Any]]:
    """For each value set: Helm's report."""
    return [
        lint(request["chart"], values, strict=True, namespace=NAMESPACE, kube_version="v1.32.0")
        for values in request["values"]
    ]


def validate(request: dict[str, Any]) -> list[str]:
    """What is wrong with the objects, in strict mode: fields that the version does not know count."""
    wrong = []
    for each in request["objects"]:
        try:
            kubernetes_validate.validate(each, request["version"], strict=True)
        except kubernetes_validate.ValidationError as error:
            where = ".".join(map(str, error.path))
            wrong.append(f"{each['kind']} {each['metadata']['name']}: {where}: {error.message[:300]}")
    return wrong


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    json.dump({"render": render, "lint": lint_all, "validate": validate}[asked["do"]](asked), sys.stdout)
