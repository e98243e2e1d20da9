"""The chart's objects: the same under both Helms, valid, restricted, and what its value sets and README say they are."""

import importlib.util
import json
from copy import deepcopy
from typing import Any

import pytest
import yaml

from tests.charts.rendering import (
    CHART,
    ROOT,
    ask_tools,
    complaints_of_models,
    helm3,
    helm4,
    is_custom,
    pick,
    pod_specs,
    render,
    rendered,
    run_helm3,
    value_sets,
)
from tests.charts.restricted import violations

# Objects of each value set: an empty render would pass every other check.
NUM_OBJECTS = {
    "cpu": 18,
    "default": 15,
    "external-redis": 12,
    "gpu": 16,
    "hardened": 18,
    "keda": 18,
    "no-network-policy": 8,
    "two-gpus": 15,
}
SETS = sorted(NUM_OBJECTS)
NUM_CUSTOM = 8  # PodMonitor and PrometheusRule of three value sets, an HTTPRoute, a ScaledObject


def test_every_value_set_is_counted() -> None:
    assert sorted(value_sets()) == SETS


def test_both_helms_find_nothing_to_complain_about() -> None:
    reports = ask_tools("lint", values=list(value_sets().values()))
    for name, report in zip(value_sets(), reports, strict=True):
        complaints = [each for each in report["messages"] if "icon is recommended" not in each["error"]]
        assert (report["total_charts_linted"], complaints, report["errors"]) == (1, [], []), name
    for name in SETS:
        done = run_helm3("lint", "--strict", str(CHART), "-f", str(CHART / "ci" / f"{name}-values.yaml"))
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", SETS)
def test_both_helms_render_the_same_objects(name: str) -> None:
    objects = rendered(name)
    assert len(objects) == NUM_OBJECTS[name]
    assert helm3(value_sets()[name]) == objects


@pytest.mark.parametrize("version", ["1.29", "1.32"])
def test_kubernetes_knows_every_field_of_every_object(version: str) -> None:
    own = [each for name in SETS for each in rendered(name) if not is_custom(each)]
    assert len(own) == sum(NUM_OBJECTS.values()) - NUM_CUSTOM
    assert ask_tools("validate", version=version, objects=own) == []


def test_the_published_models_know_every_field_of_every_custom_resource() -> None:
    custom = [each for name in SETS for each in rendered(name) if is_custom(each)]
    kinds = sorted({each["kind"] for each in custom})
    assert kinds == ["HTTPRoute", "PodMonitor", "PrometheusRule", "ScaledObject"]
    assert len(custom) == NUM_CUSTOM
    assert complaints_of_models(custom) == []


def test_the_validators_see_what_is_wrong() -> None:
    wrong = deepcopy(pick(rendered("cpu"), "Deployment", "gateway"))
    wrong["spec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    assert len(ask_tools("validate", version="1.32", objects=[wrong])) == 1
    monitor = deepcopy(pick(rendered("cpu"), "PodMonitor"))
    monitor["spec"]["podMetricsEndpoints"][0]["intervall"] = "15s"
    scaled = deepcopy(pick(rendered("keda"), "ScaledObject"))
    scaled["spec"]["minReplicaCount"] = "one"
    complaints = "\n".join(complaints_of_models([monitor, scaled]))
    assert "intervall" in complaints
    assert "minReplicaCount must be integer" in complaints


@pytest.mark.parametrize("name", SETS)
def test_every_pod_keeps_to_the_restricted_profile(name: str) -> None:
    specs = pod_specs(rendered(name))
    assert len(specs) == (4 if name in ("cpu", "default", "gpu", "hardened", "keda", "two-gpus") else 3)
    for where, spec in specs.items():
        assert violations(spec) == [], where
        assert spec["automountServiceAccountToken"] is False


def test_the_restricted_profile_is_really_checked() -> None:
    (spec,) = (spec for name, spec in pod_specs(rendered("default")).items() if name.startswith("StatefulSet"))
    for path, value, says in (
        (("hostNetwork",), True, "namespace"),
        (("securityContext", "runAsNonRoot"), False, "runAsNonRoot"),
        (("securityContext", "seccompProfile"), {"type": "Unconfined"}, "seccomp"),
        (("containers", 0, "securityContext", "capabilities"), {"drop": ["NET_RAW"]}, "capabilities"),
        (("containers", 0, "securityContext", "allowPrivilegeEscalation"), True, "Escalation"),
        (("volumes", 0), {"name": "x", "hostPath": {"path": "/"}}, "hostPath"),
    ):
        loose: Any = deepcopy(spec)
        *parents, last = path
        place: Any = loose
        for step in parents:
            place = place[step]
        place[last] = value
        assert any(says in each for each in violations(loose)), path


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"gatway": {}}, "gatway"),
    ({"gateway": {"replicaCount": 2}}, "replicaCount"),
    ({"gateway": {"replicas": 2}}, "replicas"),
    ({"gateway": {"replicas": {"min": 0, "max": 2}}}, "min"),
    ({"gateway": {"image": {"digest": "sha256:abc"}}}, "digest"),
    ({"gateway": {"image": {"pullPolicy": "Sometimes"}}}, "pullPolicy"),
    ({"gateway": {"maxQueue": -1}}, "maxQueue"),
    ({"gateway": {"echoPart": 1.5}}, "echoPart"),
    ({"gateway": {"tracesEndpoint": "collector:4318"}}, "tracesEndpoint"),
    ({"gateway": {"extraArgs": ["--port=80"]}}, "extraArgs"),
    ({"gateway": {"existingKeysSecret": "Not A Name"}}, "existingKeysSecret"),
    ({"gateway": {"resources": {"requests": {"memory": "a lot"}}}}, "memory"),
    ({"gateway": {"extraEnv": [{"value": "nameless"}]}}, "extraEnv"),
    ({"gateway": {"extraEnv": [{"name": "N", "value": 5}]}}, "extraEnv"),
    ({"engine": {"device": "tpu"}}, "device"),
    ({"engine": {"gpus": 0}}, "gpus"),
    ({"engine": {"gpus": "two"}}, "gpus"),
    ({"engine": {"gpuResource": "gpu"}}, "gpuResource"),
    ({"engine": {"args": ["--served-model-name=other"]}}, "args"),
    ({"engine": {"args": "--dtype float32"}}, "args"),
    ({"engine": {"shmGiB": 0.5}}, "shmGiB"),
    ({"engine": {"startupSeconds": "10m"}}, "startupSeconds"),
    ({"population": {"source": "s3"}}, "source"),
    ({"population": {"source": "image"}}, "reference"),
    ({"population": {"source": "url", "url": {"address": "https://x/p.tar"}}}, "sha256"),
    ({"population": {"source": "url", "url": {"address": "s3://x/p.tar", "sha256": "0" * 64}}}, "address"),
    ({"population": {"pvc": {"claimName": ""}}}, "claimName"),
    ({"population": {"pvc": {"subPath": "../other"}}}, "subPath"),
    ({"population": {"gib": 0}}, "gib"),
    ({"redis": {"mode": "cluster"}}, "mode"),
    ({"redis": {"mode": "external"}}, "existingSecret"),
    ({"runAsUser": 0}, "runAsUser"),
    ({"longestRequestSeconds": 0}, "longestRequestSeconds"),
    ({"ingress": {"tlsSecret": "tls"}}, "host"),
    ({"httpRoute": {"enabled": True}}, "parentRefs"),
    ({"networkPolicy": {"enabled": "yes"}}, "enabled"),
    ({"alerts": {"deadlineObjective": 95}}, "deadlineObjective"),
    ({"service": {"type": "ExternalName"}}, "type"),
    ({"service": {"port": 70000}}, "port"),
    ({"extraObjects": [{"kind": "ConfigMap"}]}, "extraObjects"),
]


def test_the_schema_refuses_what_is_wrong_and_says_where() -> None:
    assert len(WRONG) >= 20
    for (values, where), refusal in zip(WRONG, helm4(*(values for values, _ in WRONG)), strict=True):
        assert isinstance(refusal, str), f"Helm 4 took {values}"
        assert where in refusal, refusal
        refusal = helm3(values)
        assert isinstance(refusal, str), f"Helm 3 took {values}"
        assert where in refusal, refusal


def test_what_the_schema_cannot_see_is_refused_by_the_templates() -> None:
    contradictions: list[tuple[dict[str, Any], str]] = [
        ({"engine": {"replicas": {"min": 1, "max": 4}}}, "autoscaling.prometheus is needed"),
        ({"gateway": {"replicas": {"min": 4, "max": 1}}}, "at most 1, fewer than 4"),
    ]
    for (_, says), refusal in zip(contradictions, helm4(*(values for values, _ in contradictions)), strict=True):
        assert isinstance(refusal, str)
        assert says in refusal


def test_the_schema_knows_every_value_and_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def check(values: Any, part: dict[str, Any], where: str) -> None:
        assert part.get("additionalProperties") is False, where
        assert set(part["properties"]) - {"global"} == set(values), where
        for name, value in values.items():
            if isinstance(value, dict) and value and "properties" in part["properties"][name]:
                check(value, part["properties"][name], f"{where}.{name}")

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for component in ("gateway", "engine", "redis"):  # where what is set is free
        values[component]["resources"] = {"requests": {}, "limits": {}}
    check(values, schema, "values")


def test_the_readme_is_made_from_the_values() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "charts" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (CHART / "README.md").read_text() == module.readme(), "run `make charts`"


def test_grace_periods_outlast_the_longest_request() -> None:
    for longest in (20, 300):
        objects = render(longestRequestSeconds=longest)
        for kind, suffix in (("Deployment", "gateway"), ("StatefulSet", "engine")):
            spec = pick(objects, kind, suffix)["spec"]["template"]["spec"]
            container = spec["containers"][0]
            words = [
                *container["args"],
                *container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ()),
            ]
            options = dict(
                word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word
            )
            delay = float(options.get("drain-delay", options.get("after", "nan")))
            timeout = float(options.get("drain-timeout", options.get("timeout", "nan")))
            assert timeout >= longest
            assert spec["terminationGracePeriodSeconds"] > delay + timeout


def test_probes_wait_for_as_long_as_a_population_takes_to_load() -> None:
    def patience(**values: Any) -> float:
        spec = pick(render(**values), "StatefulSet", "engine")["spec"]["template"]["spec"]
        probe = spec["containers"][0]["startupProbe"]
        return float(probe["periodSeconds"] * probe["failureThreshold"])

    assert patience(population={"gib": 1}) >= 630
    assert patience(population={"gib": 100}) >= 3600
    assert 77 <= patience(engine={"startupSeconds": 77}) < 85


def test_gpus_are_asked_for_and_used() -> None:
    container = pick(rendered("two-gpus"), "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"memory": "96Gi", "nvidia.com/gpu": 2}
    assert "--tensor-parallel-size=2" in container["args"]
    assert '--additional-config={"chorus_member_parallel": true}' in container["args"]
    assert container["image"] == "chorus/engine-cuda:0.1.0"
    cpu = pick(rendered("cpu"), "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    assert "nvidia.com/gpu" not in cpu["resources"]["limits"]
    assert not any("tensor-parallel" in word for word in cpu["args"])


def test_engines_on_cpus_have_threads_for_what_they_request_and_may_be_told_otherwise() -> None:
    def environment(name: str) -> dict[str, Any]:
        container = pick(rendered(name), "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
        names = [each["name"] for each in container["env"]]
        assert len(set(names)) == len(names)
        return {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}

    assert environment("default")["OMP_NUM_THREADS"] == {"resourceFieldRef": {"resource": "requests.cpu"}}
    assert environment("default")["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environment("cpu")["OMP_NUM_THREADS"] == "15"
    assert "OMP_NUM_THREADS" not in environment("gpu")


def test_network_policies_select_every_pod_and_open_no_engine() -> None:
    objects = rendered("default")
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    selected = [each["spec"]["podSelector"]["matchLabels"] for each in policies]
    for kind in ("Deployment", "StatefulSet"):
        for each in objects:
            if each["kind"] == kind:
                assert each["spec"]["selector"]["matchLabels"] in selected
    engine = pick(objects, "NetworkPolicy", "engine")["spec"]
    assert engine["egress"] == []
    (rule,) = engine["ingress"]
    gateways, monitoring = rule["from"]
    assert gateways["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"
    assert "namespaceSelector" in monitoring
    assert not any(each["kind"] == "NetworkPolicy" for each in rendered("no-network-policy"))


def test_the_fetching_pods_reach_the_object_store_and_gateways_keep_the_manifest_only() -> None:
    objects = rendered("cpu")
    for kind, suffix, only in (("Deployment", "gateway", True), ("StatefulSet", "engine", False)):
        (init,) = pick(objects, kind, suffix)["spec"]["template"]["spec"]["initContainers"]
        assert init["command"] == ["chorus", "population", "fetch"]
        assert ("--only-manifest" in init["args"]) is only
        assert int(init["args"][init["args"].index("--max-bytes") + 1]) >= 2 << 30
        ports = [port for rule in pick(objects, "NetworkPolicy", suffix)["spec"]["egress"] for port in rule["ports"]]
        assert {"port": 9000, "protocol": "TCP"} in ports


def test_nothing_has_rights_and_no_secret_is_made() -> None:
    kinds = {each["kind"] for name in SETS for each in rendered(name)}
    assert not kinds & {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding", "Secret"}
    assert "ServiceAccount" in kinds


def test_the_builtin_redis_wants_its_password_of_gateways_and_of_its_own_probe() -> None:
    objects = rendered("hardened")
    redis, gateway = (
        pick(objects, "Deployment", suffix)["spec"]["template"]["spec"]["containers"][0]
        for suffix in ("redis", "gateway")
    )
    secret = {"valueFrom": {"secretKeyRef": {"name": "chorus-redis", "key": "password"}}}
    assert redis["args"][-2:] == ["--requirepass", "$(REDISCLI_AUTH)"]
    assert redis["env"] == [{"name": "REDISCLI_AUTH", **secret}]
    names = [each["name"] for each in gateway["env"]]
    assert names.index("REDIS_PASSWORD") < names.index("CHORUS_REDIS")  # else it is not filled in
    env = {each["name"]: each for each in gateway["env"]}
    assert env["REDIS_PASSWORD"] == {"name": "REDIS_PASSWORD", **secret}
    assert env["CHORUS_REDIS"]["value"].startswith("redis://:$(REDIS_PASSWORD)@answers-redis.")
    assert "requirepass" not in str(rendered("default"))


def test_the_notes_say_what_is_missing() -> None:
    (answer,) = ask_tools("render", values=[value_sets()["no-network-policy"]])
    notes = next(text for name, text in answer["files"].items() if name.endswith("NOTES.txt"))
    assert "no API keys" in notes
    assert "without network policies" in notes
    assert "Redis has no password" not in notes  # there is none
    answers = ask_tools("render", values=[value_sets()[name] for name in ("default", "hardened")])
    assert ["Redis has no password" in str(each["files"]) for each in answers] == [True, False]
    assert "alerts are off" in notes
