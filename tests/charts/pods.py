"""Runs pods of the rendered chart as local processes, as far as a process can be a pod.

Each gets a root of its own in a mount namespace: this machine's directories read-only, the pod's volumes where it mounts them, its
own /etc/hosts; then the user, without capabilities and with no_new_privs, as its security context says. What is missing: seccomp,
limits of memory and processor, and a network of its own. Instead of that each pod has an address in 127.0.0.0/8 on which it listens
where it would have listened on all.
"""

import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.charts.rendering import ROOT

Spec = dict[str, Any]

_SKIPPED = {"tmp", "proc", "sys", "dev", "population", "keys", "lost+found"}


def can_isolate() -> bool:
    """Whether this machine lets us make a root of our own."""
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


class Network:
    """Addresses and names of pods."""

    def __init__(self, directory: Path) -> None:
        self._prefix = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}"
        self._given = 1
        self._names: dict[str, list[str]] = {}
        self.hosts = directory / "hosts"
        self._write()

    def address(self) -> str:
        """A new one."""
        self._given += 1
        return f"{self._prefix}.{self._given}"

    def add(self, name: str, address: str) -> None:
        """The address is ready behind a service's name."""
        self._names.setdefault(name, []).append(address)
        self._write()

    def remove(self, name: str, address: str) -> None:
        """The address is no longer behind a service's name."""
        self._names[name].remove(address)
        self._write()

    def ready(self, name: str) -> list[str]:
        """Addresses behind a service's name."""
        return list(self._names.get(name, ()))

    def _write(self) -> None:
        lines = [f"{address} {name}\n" for name, addresses in self._names.items() for address in addresses]
        self.hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))  # in place: pods have this very file mounted


@dataclass(kw_only=True)
class Pod:
    """One container of a pod, with the pod's volumes."""

    name: str
    spec: Spec
    network: Network
    directory: Path
    """For its volumes and its output."""
    claims: dict[str, Path]
    """Directories that stand for persistent volume claims."""
    address: str = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.address = self.network.address()
        self.directory.mkdir(parents=True)
        (self.container,) = self.spec["containers"]

    @property
    def output(self) -> Path:
        return self.directory / "output.txt"

    def start(self, *, arguments: tuple[str, ...] = ()) -> None:
        """Begin to run the container; `arguments` are added to its own."""
        words = [*self.container["command"], *self.container.get("args", ()), *arguments]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", "bash", "-euc", self._script(self._local(words))],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def run(self, words: list[str], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, as a hook or a probe."""
        enter = ["nsenter", f"--target={self.process.pid}", "--mount", "--root", "--wd"]
        command = [*enter, "env", "-i", *self._environment(), *self._user(), *self._local(words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)

    def passes(self, probe: str) -> bool:
        """One look of one of its probes."""
        action = self.container[probe]
        if (get := action.get("httpGet")) is not None:
            try:
                url = f"http://{self.address}:{self._port(get['port'])}{get['path']}"
                return 200 <= httpx.get(url, timeout=action.get("timeoutSeconds", 1)).status_code < 400
            except httpx.HTTPError:
                return False
        if "exec" in action:
            return self.run(action["exec"]["command"], timeout_s=30).returncode == 0
        try:
            socket.create_connection((self.address, self._port(action["tcpSocket"]["port"])), timeout=1).close()
        except OSError:
            return False
        return True

    def wait_until_ready(self) -> float:
        """As the kubelet would: first the startup probe, for as long as it allows, then readiness. Seconds that it took."""
        began = time.monotonic()
        startup = self.container.get("startupProbe", {"periodSeconds": 5, "failureThreshold": 24})
        deadline = began + startup["periodSeconds"] * startup["failureThreshold"]
        for probe in ("startupProbe", "readinessProbe"):
            while probe in self.container and not self.passes(probe):
                assert self.process.poll() is None, f"{self.name} ended:\n{self.output.read_text()[-3000:]}"
                assert time.monotonic() < deadline, f"{self.name}: {probe} fails for too long"
                time.sleep(0.3)
        return time.monotonic() - began

    def terminate(self) -> int:
        """As the kubelet would: the hook, then SIGTERM, all within the pod's grace period. Its exit status."""
        deadline = time.monotonic() + self.spec["terminationGracePeriodSeconds"]
        hook = self.container.get("lifecycle", {}).get("preStop")
        if hook is not None:
            self.run(hook["exec"]["command"], timeout_s=deadline - time.monotonic())
        self.process.terminate()
        return self.process.wait(deadline - time.monotonic())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every process of the container at once."""
        first = psutil.Process(self.process.pid)
        for each in (*first.children(recursive=True), first):
            each.send_signal(number)

    def die(self) -> None:
        """As for want of memory."""
        self.signal(signal.SIGKILL)
        self.process.wait(20)

    def kill(self) -> None:
        """The end of a test, however it ended."""
        if hasattr(self, "process") and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)

    def status(self) -> dict[str, str]:
        """What the kernel says of its process."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return dict(line.split(":\t", 1) for line in lines if ":\t" in line)

    def _port(self, port: int | str) -> int:
        if isinstance(port, int):
            return port
        return next(int(each["containerPort"]) for each in self.container["ports"] if each["name"] == port)

    def _local(self, words: list[str]) -> list[str]:
        return [word.replace("0.0.0.0", self.address).replace("127.0.0.1", self.address) for word in words]

    def _environment(self) -> list[str]:
        """The image's, then the pod's."""
        image = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"}
        pod = {each["name"]: each["value"] for each in self.container.get("env", ()) if "value" in each}
        return [f"{name}={value}" for name, value in (image | pod).items()]

    def _user(self) -> list[str]:
        security = self.spec["securityContext"]
        assert self.container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert self.container["securityContext"]["allowPrivilegeEscalation"] is False
        return [
            "setpriv",
            *(f"--reuid={security['runAsUser']}", f"--regid={security['runAsGroup']}", "--clear-groups"),
            *("--no-new-privs", "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"),
        ]

    def _script(self, words: list[str]) -> str:
        """Makes the root and becomes the container."""
        root = self.directory / "root"
        root.mkdir(exist_ok=True)
        steps = [f"root={shlex.quote(str(root))}", 'mount -t tmpfs -o mode=755 none "$root"']

        def bind(source: Path, target: str, *, writable: bool = False) -> None:
            place, kind = f'"$root"{shlex.quote(target)}', "-d" if source.is_dir() else "-f"
            make = f"mkdir -p {place}" if kind == "-d" else f"mkdir -p $(dirname {place}); touch {place}"
            steps.append(f"[ {kind} {place} ] || {{ {make}; }}")
            steps.append(f"mount --bind {shlex.quote(str(source))} {place}")
            if not writable:
                steps.append(f"mount -o remount,bind,ro {place}")

        for entry in sorted(Path("/").iterdir()):
            if entry.is_symlink():
                steps.append(f'ln -s {shlex.quote(str(entry.readlink()))} "$root"/{entry.name}')
            elif entry.is_dir() and entry.name not in _SKIPPED and entry.stat().st_mode & 0o001:
                bind(entry, f"/{entry.name}")
        steps.append('for each in proc sys dev; do mkdir "$root/$each"; mount --rbind "/$each" "$root/$each"; done')
        mounts = sorted(self.container["volumeMounts"], key=lambda each: len(each["mountPath"]))
        volumes = {each["name"]: each for each in self.spec["volumes"]}
        for mount in mounts:
            volume = volumes[mount["name"]]
            if "persistentVolumeClaim" in volume:
                source = self.claims[volume["persistentVolumeClaim"]["claimName"]] / mount.get("subPath", "")
            else:
                source = self.directory / "volumes" / mount["name"]
                source.mkdir(parents=True, exist_ok=True)
                shutil.chown(source, self.spec["securityContext"]["fsGroup"], self.spec["securityContext"]["fsGroup"])
            bind(source, mount["mountPath"], writable=not mount.get("readOnly"))
        # What would be the image's own, wherever it lies on this machine.
        for own in {ROOT, Path(sys.executable).parents[1].resolve(), Path(sys.base_prefix)}:
            bind(own, str(own))
        bind(self.network.hosts, "/etc/hosts")
        if self.container["securityContext"]["readOnlyRootFilesystem"]:
            steps.append('mount -o remount,ro "$root"')
        environment = " ".join(map(shlex.quote, self._environment()))
        become = " ".join(map(shlex.quote, [*self._user(), *words]))
        steps.append(f'cd "$root"; exec chroot "$root" env -i {environment} {become}')
        return "\n".join(steps)
