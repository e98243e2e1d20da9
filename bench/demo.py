"""Demo of the whole workflow: trains a population, fits its prior, serves it and requests a completion from every tier.

    python bench/demo.py [OUT]        (`make demo` sets up the environment first; OUT is build/demo by default)

Results of earlier runs are reused. Prints a table and writes the same figures to OUT/figures.json.
"""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import APIConnectionError, APIStatusError, OpenAI
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chorus.population import manifest

CHORUS = Path(sys.executable).with_name("chorus")
PROMPT = "def read_file("
MAX_TOKENS = 64
console = Console()


def main(out: Path) -> None:
    """Run every stage that has not run yet, then request completions and report."""
    directory, started = out / "population", time.monotonic()
    announce("Train", "a population on the source of Python's standard library")
    run("train", "stdlib", "--out", str(directory))
    if not manifest.load(directory).prior_version:
        announce("Fit", "members and weights for every budget, on held-out text")
        run("prior", "fit", str(directory))
    announce("Serve", "all members in one engine, behind an OpenAI API")
    with served(directory, out / "serve.log") as url:
        rows = complete_with_every_tier(directory, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
    figures = summarise(directory, rows, seconds=time.monotonic() - started)
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    report(figures, out)


def complete_with_every_tier(directory: Path, client: OpenAI) -> list[dict[str, Any]]:
    """One completion per tier, with the same seed, and its tokens per second."""
    population = manifest.load(directory)
    rows = []
    for tier in population.tiers:
        model = f"{population.name}:{tier.name}"
        arguments: dict[str, Any] = {"model": model, "prompt": PROMPT, "temperature": 0.7, "seed": 7}
        client.completions.create(**arguments, max_tokens=2)  # warm-up
        start = time.perf_counter()
        completion = client.completions.create(**arguments, max_tokens=MAX_TOKENS)
        seconds = time.perf_counter() - start
        assert completion.usage is not None
        rows.append(
            {
                "tier": tier.name,
                "members": list(tier.members),
                "test_loss_nats": tier.test_loss.nats if tier.test_loss else None,
                "tokens_per_s": round(completion.usage.completion_tokens / seconds, 1),
                "sample": completion.choices[0].text,
                "served": (completion.model_extra or {}).get("population"),
            }
        )
    return rows


def summarise(directory: Path, rows: list[dict[str, Any]], *, seconds: float) -> dict[str, Any]:
    """The figures of the table, and the best single member."""
    population = manifest.load(directory)
    losses = {member.name: member.test_loss.nats for member in population.members if member.test_loss}
    best = min(losses, key=losses.__getitem__)
    return {
        "seconds": round(seconds, 1),
        "num_members": len(population.members),
        "num_trajectories": len({member.trajectory for member in population.members}),
        "best_single": {"member": best, "test_loss_nats": losses[best]},
        "tiers": rows,
    }


def report(figures: dict[str, Any], out: Path) -> None:
    """Print the table."""
    table = Table("tier", title=f"\nOne prompt, every budget: {escape(repr(PROMPT))}", title_justify="left", box=None)
    for heading in ("members", "test loss, nats", "tokens/s"):
        table.add_column(heading, justify="right")
    table.add_column("sample", no_wrap=True)
    for row in figures["tiers"]:
        loss = "-" if row["test_loss_nats"] is None else f"{row['test_loss_nats']:.4f}"
        sample = escape(textwrap.shorten(row["sample"], 40, placeholder=" ..."))
        table.add_row(row["tier"], str(len(row["members"])), loss, f"{row['tokens_per_s']:.0f}", sample)
    console.print(table)
    best = figures["best_single"]
    console.print(
        f"\nBest single member of {figures['num_members']} ({best['member']}): {best['test_loss_nats']:.4f} nats. "
        f"Figures: [bold]{out / 'figures.json'}[/]. {figures['seconds']:.0f} s in total.\n"
        f"Now try [bold]chorus serve {out / 'population'}[/] and [bold]chorus population show {out / 'population'}[/].",
        highlight=False,
    )


def announce(stage: str, description: str) -> None:
    """Print a heading for a stage."""
    console.print(f"\n[bold cyan]{stage}[/] {description}")


def run(*arguments: str) -> None:
    """Run a chorus command; exit with its status if it fails."""
    console.print(f"[dim]$ chorus {' '.join(arguments)}[/]")
    status = subprocess.run([CHORUS, *arguments], check=False).returncode
    if status:
        sys.exit(status)


@contextmanager
def served(directory: Path, log: Path) -> Iterator[str]:
    """Run `chorus serve` on a free local port. Yields its address once it is ready, and stops it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    console.print(f"[dim]$ chorus serve {directory} --port {port}[/]")
    with log.open("w") as output:
        process = subprocess.Popen([CHORUS, "serve", str(directory), "--port", str(port)], stdout=output, stderr=output)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path, timeout_s: float = 300) -> None:
    """Poll /ready. Exits with the server's output if the server stops or `timeout_s` passes."""
    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    deadline = time.monotonic() + timeout_s
    with console.status("waiting for the engine"):
        while process.poll() is None and time.monotonic() < deadline:
            try:
                client.get("/ready", cast_to=object)
                return
            except (APIStatusError, APIConnectionError):
                time.sleep(0.5)
    sys.exit(f"chorus serve did not become ready. Its output:\n{log.read_text()[-3000:]}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build/demo"))
