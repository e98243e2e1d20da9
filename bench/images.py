"""Builds a target of the Dockerfile without a container engine, each stage in its own root directory.

    sudo python -m bench.images gateway /var/tmp/images --mirror MIRROR

debootstrap's build of the same Debian, with its Python 3.11, stands in for the base image. So this tests that every RUN and COPY
works on a clean system and that the image is complete, but not the base image itself. Needs root, debootstrap and a network.
Prints the image's size. With --population it also runs the image's command as its user, with a read-only root, until its health
check passes.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Instruction:
    """One line of a Dockerfile with continuations joined: its keyword and its arguments."""

    word: str
    rest: str


@dataclass
class Stage:
    """The instructions from one FROM to the next."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def last(self, word: str) -> str | None:
        """Arguments of the last instruction with this keyword."""
        matches = [each.rest for each in self.instructions if each.word == word]
        return matches[-1] if matches else None


def parse(text: str) -> dict[str, Stage]:
    """Stages by name, with the ARGs before the first FROM substituted in FROM."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    stages: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    stage: Stage | None = None
    for line in re.sub(r"\\\n\s*", "", lines).splitlines():
        if not line.strip():
            continue
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            for argument, value in arguments.items():
                base = base.replace(f"${{{argument}}}", value)
            stage = stages[name] = Stage(name, base)
        elif stage is None:
            assert word == "ARG", f"{word} before the first FROM"
            name, _, value = rest.partition("=")
            arguments[name] = value
        else:
            stage.instructions.append(Instruction(word, rest))
    return stages


class Build:
    """Builds the roots of stages in a directory. Reuses roots that are already built."""

    def __init__(self, directory: Path, *, mirror: str) -> None:
        self._directory = directory
        self._mirror = mirror
        self.stages = parse((ROOT / "Dockerfile").read_text())

    def stage(self, name: str) -> Path:
        """The root of a stage, built if necessary."""
        root = self._directory / name
        if (root / ".built").exists():
            return root
        stage = self.stages[name]
        parent = self.stage(stage.base) if stage.base in self.stages else self._system()
        shutil.rmtree(root, ignore_errors=True)
        subprocess.run(["cp", "-a", "--reflink=auto", str(parent), str(root)], check=True)
        (root / ".built").unlink(missing_ok=True)
        began = time.monotonic()
        environment, directory = self.environment(name), "/"
        for each in stage.instructions:
            if each.word == "WORKDIR":
                directory = each.rest
                (root / directory.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif each.word == "COPY":
                self._copy(root, directory, each.rest)
            elif each.word == "RUN":
                print(f"{name}: RUN {each.rest[:100]}", flush=True)
                self._run(root, directory, each.rest, environment)
        (root / ".built").touch()
        print(f"{name}: built in {time.monotonic() - began:.0f} s", flush=True)
        return root

    def environment(self, name: str) -> dict[str, str]:
        """Environment set by ENV in a stage and its base stages."""
        stage = self.stages[name]
        environment = (
            self.environment(stage.base)
            if stage.base in self.stages
            else {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
        )
        for each in stage.instructions:
            if each.word == "ENV":
                pairs = (word.split("=", 1) for word in shlex.split(each.rest))
                environment = environment | {key: value.replace("$PATH", environment["PATH"]) for key, value in pairs}
        return environment

    def _system(self) -> Path:
        root = self._directory / "system"
        if not (root / ".built").exists():
            began = time.monotonic()
            packages = "python3,python3-venv,ca-certificates"
            subprocess.run(
                ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(root), self._mirror],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
            # Package sources are those of this machine.
            if (settings := Path.home() / ".config/pip/pip.conf").exists():
                (root / "root/.config/pip").mkdir(parents=True)
                shutil.copy(settings, root / "root/.config/pip")
            for path in ("etc/pip.conf", "etc/resolv.conf", "etc/hosts", "etc/apt/apt.conf.d", "etc/ssl/certs"):
                if (source := Path("/") / path).is_dir():
                    shutil.copytree(source, root / path, dirs_exist_ok=True, symlinks=True)
                elif source.exists():
                    shutil.copy(source, root / path)
            (root / ".built").touch()
            print(f"system: built in {time.monotonic() - began:.0f} s", flush=True)
        return root

    def _copy(self, root: Path, directory: str, rest: str) -> None:
        words = shlex.split(rest)
        source_root = ROOT
        if words[0].startswith("--from="):
            source_root = self.stage(words.pop(0).removeprefix("--from="))
        *sources, target = words
        place = root / target.lstrip("/") if target.startswith("/") else root / directory.lstrip("/") / target
        for source in sources:
            source_path = source_root / source.lstrip("/")
            assert source_path.exists(), f"COPY {source}: no such file"
            if source_path.is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(
                    source_path,
                    place,
                    symlinks=True,
                    dirs_exist_ok=True,
                    ignore=None if source_root != ROOT else ignore,
                )
            else:
                into = place / source_path.name if target.endswith("/") or len(sources) > 1 else place
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source_path, into)

    def _run(self, root: Path, directory: str, rest: str, environment: dict[str, str]) -> None:
        steps = ['mount --rbind /proc "$root/proc"', 'mount --rbind /dev "$root/dev"']
        while rest.startswith("--mount="):
            option, _, rest = rest.partition(" ")
            parts = dict(part.split("=", 1) for part in option.removeprefix("--mount=").split(","))
            source = self.stage(parts["from"]) / parts["source"].lstrip("/")
            place = root / parts["target"].lstrip("/")
            place.mkdir(parents=True, exist_ok=True)
            steps.append(f"mount --bind {shlex.quote(str(source))} {shlex.quote(str(place))}")
        # Settings of pip and proxies come from this machine, all others from the image.
        for name, value in os.environ.items():
            if (
                name.startswith("PIP_")
                or name.lower().endswith("_proxy")
                or name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
            ):
                environment = environment | {name: value}
        settings = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
        )
        for path in sorted(
            set(re.findall(r"(?<![:/\w])(?:file://)?(/(?:opt|etc|usr|var|srv)/[\w./-]+)", settings.stdout))
        ):
            if Path(path).exists() and not (root / path.lstrip("/")).exists():
                steps.append(_bind_in(path))
        words = " ".join(shlex.quote(f"{key}={value}") for key, value in environment.items())
        steps.append(f'exec chroot "$root" env -i {words} sh -euc {shlex.quote(f"cd {directory}; {rest}")}')
        command = ["unshare", "--mount", "--propagation", "private", "bash", "-euc", "\n".join(steps)]
        subprocess.run(command, check=True, env={**os.environ, "root": str(root)})


def _bind_in(path: str) -> str:
    quoted = shlex.quote(path)
    make = (
        f'mkdir -p "$root"{quoted}'
        if Path(path).is_dir()
        else f'mkdir -p "$(dirname "$root"{quoted})"; touch "$root"{quoted}'
    )
    return f'{make}; mount --bind {quoted} "$root"{quoted}'


def size_mib(root: Path) -> float:
    """Size of /opt/chorus: what the image adds to the base system."""
    files = (path for path in (root / "opt/chorus").rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files) / 2**20


def run_until_healthy(build: Build, name: str, population: Path, arguments: list[str], timeout_s: float) -> float:
    """Run the image's entry point like `docker run --read-only --tmpfs /tmp -v POPULATION:/population:ro`, until it is healthy.

    Returns the seconds that took. Raises TimeoutError after `timeout_s`.
    """
    root = build.stage(name)
    stage = build.stages[name]
    user = (stage.last("USER") or "").split(":")[0]
    entry, check = json.loads(stage.last("ENTRYPOINT") or "[]"), stage.last("HEALTHCHECK") or ""
    settings = " ".join(shlex.quote(f"{key}={value}") for key, value in build.environment(name).items())
    become = f"setpriv --reuid={user} --regid={user} --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all"
    (root / "population").mkdir(exist_ok=True)
    steps = [
        'mount --bind "$root" "$root"; cd "$root"',
        "mount --rbind /proc proc; mount --rbind /dev dev; mount -t tmpfs -o mode=1777 none tmp",
        f"mount --bind {shlex.quote(str(population))} population; mount -o remount,bind,ro population",
        'mount -o remount,bind,ro "$root"; cd "$root"',
        f"exec chroot . env -i {settings} {become} {shlex.join([*entry, *arguments])}",
    ]
    command = ["unshare", "--mount", "--propagation", "private", "bash", "-euc", "\n".join(steps)]
    began = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, "root": str(root)})
    health = json.loads(check[check.index("[") :])
    try:
        while time.monotonic() < began + timeout_s:
            assert process.poll() is None, f"{name} ended with status {process.returncode}"
            enter = [
                "nsenter",
                f"--target={process.pid}",
                "--mount",
                "--root",
                "--wd",
                "env",
                "-i",
                *build_words(build, name),
            ]
            if subprocess.run([*enter, *health], capture_output=True, check=False).returncode == 0:
                return time.monotonic() - began
            time.sleep(1)
        raise TimeoutError(f"{name} is not healthy after {timeout_s} s")
    finally:
        process.terminate()
        process.wait(60)


def build_words(build: Build, name: str) -> list[str]:
    """The image's environment as arguments of `env`."""
    return [f"{key}={value}" for key, value in build.environment(name).items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=["gateway", "engine-cpu", "engine-cuda"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--mirror", required=True, help="address of a Debian mirror for debootstrap")
    parser.add_argument("--population", type=Path, help="population to run the image with")
    parser.epilog = "Arguments after -- go to the image's command."
    words = [*sys.argv[1:], "--"]
    at = words.index("--")
    options, image_arguments = parser.parse_args(words[:at]), words[at + 1 : -1]
    if os.geteuid() != 0:
        sys.exit("root is required for debootstrap, chroot and mounts")
    options.directory.mkdir(parents=True, exist_ok=True)
    build = Build(options.directory.resolve(), mirror=options.mirror)
    root = build.stage(options.target)
    print(f"{options.target}: {size_mib(root):.0f} MiB under /opt/chorus")
    if options.population is not None:
        took_s = run_until_healthy(build, options.target, options.population.resolve(), image_arguments, 300)
        print(f"{options.target}: healthy after {took_s:.1f} s, read-only, as its user")


if __name__ == "__main__":
    main()
