"""The main job on real input, as a user would do it: train a population, fit its prior, serve it, ask every tier for a completion.

    python bench/demo.py [OUT]        (`make demo` sets up the environment first; OUT is build/demo by default)

What is already there is reused. Ends with a table, and writes the same figures to OUT/figures.json.
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
    """Run every stage that has not run yet, then ask and report."""
    directory, started = out / "population", time.monotonic()
    say("Train", "a population on the source of Python's standard library")
    run("train", "stdlib", "--out", str(directory))
    if not manifest.load(directory).prior_version:
        say("Fit", "members and weights for every budget, on held-out text")
        run("prior", "fit", str(directory))
    say("Serve", "all members in one engine, behind an OpenAI API")
    with served(directory, out / "serve.log") as url:
        rows = ask_every_tier(directory, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
    figures = summarise(directory, rows, seconds=time.monotonic() - started)
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    report(figures, out)


def ask_every_tier(directory: Path, client: OpenAI) -> list[dict[str, Any]]:
    """One completion for each tier, from the same seed, and how fast its tokens came."""
    population = manifest.load(directory)
    rows = []
    for tier in population.tiers:
        model = f"{population.name}:{tier.name}"
        arguments: dict[str, Any] = {"model": model, "prompt": PROMPT, "temperature": 0.7, "seed": 7}
        client.completions.create(**arguments, max_tokens=2)  # the first request of a tier pays for warming up
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
    """Everything the table shows, and the best single member beside it."""
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
        f"\nThe best of {figures['num_members']} members alone ({best['member']}): {best['test_loss_nats']:.4f} nats. "
        f"Figures: [bold]{out / 'figures.json'}[/]. {figures['seconds']:.0f} s in all.\n"
        f"Now try [bold]chorus serve {out / 'population'}[/] and [bold]chorus population show {out / 'population'}[/].",
        highlight=False,
    )


def say(stage: str, what: str) -> None:
    """Announce a stage."""
    console.print(f"\n[bold cyan]{stage}[/] {what}")


def run(*arguments: str) -> None:
    """Run a chorus command; end the demo with its status if it fails."""
    console.print(f"[dim]$ chorus {' '.join(arguments)}[/]")
    status = subprocess.run([CHORUS, *arguments], check=False).returncode
    if status:
        sys.exit(status)


@contextmanager
def served(directory: Path, log: Path) -> Iterator[str]:
    """`chorus serve` on a free port of this machine: yields its address once it is ready, and stops it afterwards."""
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
    """Poll /ready. Ends the demo with the server's own words if it stops or takes too long."""
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
