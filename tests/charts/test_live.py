"""The rendered chart, running, watched by a real Prometheus with its rules."""

import json
import math
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml

from tests.charts.cluster import GATEWAYS, Cluster, ask
from tests.charts.pods import can_isolate
from tests.charts.rendering import NAMESPACE, RELEASE, pick
from tests.live import free_port, wait_for

pytestmark = [
    pytest.mark.skipif(not can_isolate(), reason="pods need a mount namespace: run as root"),
    pytest.mark.timeout(900),
]


def test_every_probe_passes_under_the_rendered_security_context(cluster: Cluster) -> None:
    for pod in cluster.pods.values():
        probes = [probe for probe in ("startupProbe", "readinessProbe", "livenessProbe") if probe in pod.container]
        assert len(probes) >= 2
        assert all(pod.passes(probe) for probe in probes), pod.name
        status = pod.status()
        assert set(status["Uid"].split()) == {"10001"}
        assert {status["CapEff"], status["CapBnd"], status["CapPrm"]} == {"0" * 16}
        assert status["NoNewPrivs"] == "1"
        tried = pod.run(["bash", "-c", "touch /usr/x; touch /population/x; touch /tmp/fine"], timeout_s=20)
        assert tried.returncode == 0
        assert tried.stderr.count("Read-only file system") >= 1
        assert not (cluster.network.hosts.parent / "population" / "x").exists()


def test_the_charts_own_test_asks_every_tier(cluster: Cluster) -> None:
    (container,) = pick(cluster.objects, "Pod", "test")["spec"]["containers"]
    environment = [f"{each['name']}={each['value']}" for each in container["env"] if "value" in each]
    words = [*container["command"], *container["args"]]
    service = pick(cluster.objects, "Service", "gateway")["spec"]["ports"][0]
    assert f"CHORUS_URL=http://{GATEWAYS}:{service['port']}" in environment
    # Without kube-proxy the service's port is the container's.
    done = cluster.pods["gateway-0"].run(
        ["env", *environment, f"CHORUS_URL=http://{GATEWAYS}:8000", *words], timeout_s=60
    )
    assert done.returncode == 0, done.stderr
    for tier in ("economy", "standard", "max"):
        assert f"tiny:{tier}: tier {tier}, 2 tokens" in done.stdout


def test_traffic_reaches_both_engines(cluster: Cluster) -> None:
    threads = [threading.Thread(target=ask, args=(cluster.url,), kwargs={"max_tokens": 24}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name in ("engine-0", "engine-1"):
        text = httpx.get(f"http://{cluster.pods[name].address}:8000/metrics").text
        assert "chorus_engine_steps_total" in text, f"{name} ran nothing"


@pytest.fixture(scope="module")
def prometheus(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Configured from the PodMonitor and the PrometheusRule, as the operator would."""
    directory = tmp_path_factory.mktemp("prometheus")
    monitor = pick(cluster.objects, "PodMonitor")["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    (relabeling,) = endpoint["relabelings"]
    (components,) = monitor["selector"]["matchExpressions"]
    assert monitor["jobLabel"] == "app.kubernetes.io/instance"
    targets = []
    for name, pod in cluster.pods.items():
        component = name.partition("-")[0]
        if component in components["values"]:
            labels = {"namespace": NAMESPACE, "job": RELEASE, "pod": name, relabeling["targetLabel"]: component}
            targets.append({"targets": [f"{pod.address}:8000"], "labels": labels})
    assert len(targets) == 3
    (directory / "rules.yaml").write_text(yaml.safe_dump(pick(cluster.objects, "PrometheusRule")["spec"]))
    scrape = {"job_name": "pods", "metrics_path": endpoint["path"], "static_configs": targets}
    interval = {"scrape_interval": endpoint["interval"], "evaluation_interval": "1s"}
    config = {"global": interval, "rule_files": ["rules.yaml"], "scrape_configs": [scrape]}
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
    url = f"127.0.0.1:{free_port()}"
    with (directory / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={directory / 'prometheus.yaml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={url}",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for("Prometheus", lambda: process.poll() is None and is_up(f"http://{url}/-/ready"), timeout_s=30)
        yield f"http://{url}"
    finally:
        process.terminate()
        process.wait(20)


def is_up(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def query(url: str, expression: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{url}/api/v1/query", params={"query": expression}, timeout=20).json()
    assert answer["status"] == "success", f"{expression}: {answer}"
    found: list[dict[str, Any]] = answer["data"]["result"]
    return [each for each in found if not math.isnan(float(each["value"][1]))]


def some_of_everything(url: str) -> None:
    """Requests of every kind that the dashboard counts."""
    for tier in ("economy", "standard", "max"):
        assert ask(url, model=f"tiny:{tier}", stream=True).status_code == 200
        assert ask(url, model=f"tiny:{tier}", latency_budget_ms=30_000).status_code == 200
    # Late, in whole and in part; a smaller tier than was asked for; members that leave on the way.
    assert ask(url, latency_budget_ms=1, max_tokens=32).status_code == 200
    assert ask(url, latency_budget_ms=60, max_tokens=64).status_code == 200
    assert ask(url, latency_budget_ms=60, max_tokens=64, on_deadline="truncate").status_code == 200
    assert ask(url, model="no-such-model").status_code == 404


def expressions(cluster: Cluster) -> list[tuple[str, str]]:
    """Title and expression of every query of the dashboard, its variables filled in."""
    board = json.loads(pick(cluster.objects, "ConfigMap", "dashboard")["data"]["chorus.json"])
    fill = {"$namespace": NAMESPACE, "$release": RELEASE, "$__rate_interval": "30s"}
    found = []
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for variable, value in fill.items():
                expression = expression.replace(variable, value)
            assert "$" not in expression, expression
            found.append((panel["title"], expression))
    return found


def test_every_query_of_the_dashboard_gives_data(cluster: Cluster, prometheus: str) -> None:
    asked = expressions(cluster)
    assert len(asked) >= 40
    assert {title for title, _ in asked} >= {"Engines up", "Deadlines", "Rows by member"}
    deadline = time.monotonic() + 60
    missing = asked
    while missing and time.monotonic() < deadline:  # rates need two scrapes with something between them
        some_of_everything(cluster.url)
        time.sleep(2)
        missing = [(title, expression) for title, expression in asked if not query(prometheus, expression)]
    assert missing == []


def test_the_rules_see_what_happens(cluster: Cluster, prometheus: str) -> None:
    rules = pick(cluster.objects, "PrometheusRule")["spec"]
    records = [rule["record"] for group in rules["groups"] for rule in group["rules"] if "record" in rule]

    def unseen() -> list[str]:
        return [record for record in records if not record.startswith("job_tier") and not query(prometheus, record)]

    wait_for("all records", lambda: not unseen(), timeout_s=30)
    (engines,) = query(prometheus, "job:chorus_engines_up:count")
    assert float(engines["value"][1]) == 2
    firing = query(prometheus, 'ALERTS{alertstate="firing"}')
    # Deadlines were missed on purpose.
    assert {each["metric"]["alertname"] for each in firing} <= {"ChorusDeadlinesBurnFast", "ChorusDeadlinesBurnSlowly"}
