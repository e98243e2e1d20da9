"""Kubernetes' pod security profile "restricted", as the standard words it (pod-security-standards, v1.32), and one rule of our own.

Written from the standard's table of controls: each function below is a row or two of it.
"""

from collections.abc import Iterator
from typing import Any

Spec = dict[str, Any]

_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def violations(spec: Spec) -> list[str]:
    """What in a pod's spec the profile forbids."""
    found = list(_pod(spec))
    containers = [*spec.get("initContainers", ()), *spec.get("containers", ()), *spec.get("ephemeralContainers", ())]
    for container in containers:
        found += [f"{container['name']}: {what}" for what in _container(container, spec)]
    return found


def _pod(spec: Spec) -> Iterator[str]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield f"{name} shares the node's namespace"
    security = spec.get("securityContext", {})
    if security.get("sysctls"):
        yield "sysctls are set"
    if security.get("windowsOptions", {}).get("hostProcess"):
        yield "hostProcess"
    if security.get("runAsUser") == 0:
        yield "runs as root"
    for volume in spec.get("volumes", ()):
        kinds = set(volume) - {"name"}
        if not kinds <= _VOLUMES:
            yield f"volume {volume['name']} is of kind {sorted(kinds - _VOLUMES)}"


def _container(container: Spec, spec: Spec) -> Iterator[str]:
    security, pod = container.get("securityContext", {}), spec.get("securityContext", {})
    if security.get("privileged"):
        yield "privileged"
    if security.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if "ALL" not in security.get("capabilities", {}).get("drop", ()):
        yield "does not drop ALL capabilities"
    if set(security.get("capabilities", {}).get("add", ())) - {"NET_BIND_SERVICE"}:
        yield "adds capabilities"
    if security.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot is not true"
    if security.get("runAsUser") == 0:
        yield "runs as root"
    seccomp = security.get("seccompProfile", pod.get("seccompProfile", {})).get("type")
    if seccomp not in ("RuntimeDefault", "Localhost"):
        yield f"seccomp profile is {seccomp}"
    if security.get("procMount", "Default") != "Default":
        yield "procMount"
    if any("hostPort" in port for port in container.get("ports", ())):
        yield "host ports"
    # Not in the profile, but promised by the chart.
    if security.get("readOnlyRootFilesystem") is not True:
        yield "root file system is not read-only"
