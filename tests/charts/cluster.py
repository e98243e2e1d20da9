"""The rendered chart, running: Redis, two engines and a gateway as its pods would."""

import itertools
import re
from pathlib import Path
from typing import Any

import httpx

from tests.charts.pods import Network, Pod
from tests.charts.rendering import NAMESPACE, RELEASE, Object, pick, render
from tests.live import ENGINE_ARGUMENTS

VALUES: dict[str, Any] = {
    "longestRequestSeconds": 60,
    "gateway": {"replicas": {"min": 1, "max": 1}, "drainSeconds": 3, "echoPart": 1},
    "engine": {
        "replicas": {"min": 2, "max": 2},
        "kvCacheGiB": 1,
        "startupSeconds": 600,
        "drainSeconds": 8,  # gateways look every 5 s
        "args": list(ENGINE_ARGUMENTS),
        "extraEnv": [
            {"name": "OMP_NUM_THREADS", "value": "1"},
            {"name": "TORCH_COMPILE_DISABLE", "value": "1"},  # each pod would compile anew what counts ranks: 20 s
        ],
    },
    "metrics": {"podMonitor": True, "rules": True, "intervalSeconds": 1},
}
ENGINES = f"{RELEASE}-chorus-engine.{NAMESPACE}.svc"
GATEWAYS = f"{RELEASE}-chorus-gateway.{NAMESPACE}.svc"
REDIS = f"{RELEASE}-chorus-redis.{NAMESPACE}.svc"


class Cluster:
    """The pods of the chart that run, behind the names of their services."""

    def __init__(self, directory: Path, population: Path) -> None:
        self.objects = render(**VALUES)
        self.network = Network(directory)
        self.pods: dict[str, Pod] = {}
        self._directory = directory
        self._claims = {"chorus-population": population}
        self._count = itertools.count()

    def spec(self, kind: str, component: str) -> Object:
        found: Object = pick(self.objects, kind, component)["spec"]["template"]["spec"]
        return found

    def start(self, name: str, kind: str, component: str) -> Pod:
        """A new pod; it is not behind its service yet."""
        directory = self._directory / f"{name}-{next(self._count)}"
        pod = Pod(
            name=name, spec=self.spec(kind, component), network=self.network, directory=directory, claims=self._claims
        )
        self.pods[name] = pod
        pod.start()
        return pod

    @property
    def url(self) -> str:
        """A gateway that is ready."""
        return f"http://{self.network.ready(GATEWAYS)[0]}:8000"

    def start_behind(self, service: str, name: str, kind: str, component: str) -> Pod:
        """A new pod, behind its service as soon as it is ready."""
        pod = self.start(name, kind, component)
        pod.wait_until_ready()
        self.network.add(service, pod.address)
        return pod

    def start_engine(self, name: str) -> Pod:
        """One of the StatefulSet's."""
        return self.start_behind(ENGINES, name, "StatefulSet", "engine")

    def take_out(self, service: str, name: str) -> Pod:
        """What Kubernetes does first when a pod is to end, or is no longer ready."""
        pod = self.pods[name]
        self.network.remove(service, pod.address)
        return pod

    def stop(self) -> None:
        for pod in self.pods.values():
            pod.kill()


def num_engines_up(url: str) -> int:
    return len(re.findall(r"^chorus_gateway_engine_up\{.*\} 1\.0$", httpx.get(f"{url}/metrics").text, re.MULTILINE))


def ask(url: str, **fields: Any) -> httpx.Response:
    body = {"prompt": "def main(", "max_tokens": 8, "ignore_eos": True, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)
