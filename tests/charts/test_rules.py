"""The chart's rules, as promtool judges them: sound, and each alert fires when it should and not before."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.rendering import CHART, NAMESPACE, RELEASE, ROOT, Object, pick, render

RUNBOOKS = ROOT / "docs" / "runbooks"
STORIES = yaml.safe_load(Path(__file__).with_name("alerts.yaml").read_text())
WHERE = {"namespace": NAMESPACE, "job": RELEASE}


@pytest.fixture(scope="module")
def rules() -> Object:
    """With two engines at least."""
    spec: Object = pick(render(metrics={"rules": True}, engine={"replicas": {"min": 2, "max": 2}}), "PrometheusRule")[
        "spec"
    ]
    return spec


def alerts_of(rules: Object) -> dict[str, Object]:
    return {rule["alert"]: rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule}


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_finds_the_rules_sound(rules: Object, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    count = sum(len(group["rules"]) for group in rules["groups"])
    assert f"{count} rules found" in promtool("check", "rules", str(tmp_path / "rules.yaml"))


def series(story: list[Any]) -> list[dict[str, str]]:
    def selector(name: str, labels: dict[str, str]) -> str:
        pairs = ",".join(f'{key}="{value}"' for key, value in (WHERE | labels).items())
        return f"{name}{{{pairs}}}"

    return [{"series": selector(name, labels), "values": values} for name, labels, values in story]


def expectation(alert: Object, fires: Object) -> Object:
    annotations = alert["annotations"] | {"description": fires["description"]}
    return {"exp_labels": WHERE | alert["labels"] | fires.get("labels", {}), "exp_annotations": annotations}


def test_every_alert_fires_in_its_story_and_not_before(rules: Object, tmp_path: Path) -> None:
    alerts = alerts_of(rules)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    tests = []
    for story in STORIES["stories"]:
        name, cases = story["alert"], []
        if fires := story.get("fires"):
            cases.append(
                {"eval_time": fires["at"], "alertname": name, "exp_alerts": [expectation(alerts[name], fires)]}
            )
        if "quiet" in story:
            cases.append({"eval_time": story["quiet"], "alertname": name, "exp_alerts": []})
        assert cases, f"a story of {name} without an end"
        tests.append({"interval": "1m", "input_series": series(story["series"]), "alert_rule_test": cases})
    fine = [
        {"eval_time": at, "alertname": name, "exp_alerts": []} for name in alerts for at in ("5m", "1h", "4h", "8h")
    ]
    tests.append({"interval": "1m", "input_series": series(STORIES["healthy"]), "alert_rule_test": fine})
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", str(file))
    fired = {story["alert"] for story in STORIES["stories"] if "fires" in story}
    assert fired == set(alerts), "an alert without a story in which it fires"


def test_a_story_with_another_end_fails(rules: Object, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    story = next(story for story in STORIES["stories"] if story["alert"] == "ChorusNoEngine")
    case = {"eval_time": story["fires"]["at"], "alertname": "ChorusNoEngine", "exp_alerts": []}
    test = {"interval": "1m", "input_series": series(story["series"]), "alert_rule_test": [case]}
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]}))
    with pytest.raises(AssertionError, match="FAILED"):
        promtool("test", "rules", str(file))


def test_every_alert_has_a_runbook_and_every_runbook_an_alert(rules: Object) -> None:
    alerts = alerts_of(rules)
    for name, alert in alerts.items():
        assert alert["annotations"]["runbook_url"] == f"docs/runbooks/{name}.md"
        assert alert["labels"]["severity"] in ("critical", "warning")
        text = (RUNBOOKS / f"{name}.md").read_text()
        assert re.match(rf"# {name}\n", text)
        for heading in ("What it means", "Look", "Do"):
            assert f"\n## {heading}\n" in text, f"{name}: {heading}"
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == set(alerts)


def test_what_runbooks_point_at_is_there() -> None:
    board = json.loads((CHART / "files" / "dashboard.json").read_text())
    titles = {panel["title"] for panel in board["panels"]}
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    pages = [*RUNBOOKS.glob("*.md"), ROOT / "docs" / "operations.md"]
    for page in pages:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for title in re.findall(r"(?<![*\w])\*([A-Z][^*\n]+)\*(?!\*)", text):
            assert title in titles, f"{page.name}: no panel {title!r}"
        for path in re.findall(r"`([a-zA-Z]+\.[A-Za-z.]+)`", text):
            place = values
            for name in path.split(".") if path.split(".")[0] in values and not path.endswith(".json") else ():
                assert name in place, f"{page.name}: no value {path}"
                place = place[name]


def test_no_rule_looks_at_another_release(rules: Object) -> None:
    text = yaml.safe_dump(rules)
    assert "@" not in re.sub(r"@[a-z]", "", text)
    for group in rules["groups"]:
        for rule in group["rules"]:
            selectors = re.findall(r"[a-z:_0-9]*\{[^}]*\}", rule["expr"])
            assert selectors
            assert all(f'namespace="{NAMESPACE}",job="{RELEASE}"' in each for each in selectors), rule
