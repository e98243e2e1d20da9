"""What `chorus serve` prints: the population's tiers, the addresses, and an example request."""

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chorus.population.manifest import Population, Tier


def print_offer(console: Console, population: Population, default: Tier) -> None:
    """Print the tiers that requests can choose from."""
    prior = f"prior version {population.prior_version}" if population.prior_version else "uniform weights"
    console.print(
        f"[bold]{population.name}[/]  {len(population.members)} members, context {population.context_length:,}; {prior}\n",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("tier", no_wrap=True)
    for heading in ("budget", "cost", "test loss, nats"):
        table.add_column(heading, justify="right")
    table.add_column("members", overflow="ellipsis", no_wrap=True)
    for tier in population.tiers:
        is_default = tier.name == default.name
        table.add_row(
            f"[bold]{tier.name}[/] [dim](default)[/]" if is_default else tier.name,
            str(tier.budget),
            f"{tier.relative_cost:.2f}x",
            "-" if tier.test_loss is None else f"{tier.test_loss.nats:.4f}",
            ", ".join(tier.members),
        )
    console.print(table)


def print_ready(console: Console, url: str, engine_url: str, start_s: float | None) -> None:
    """Print that requests are served now, and where. `start_s` is how long our own engine took to start; None for others."""
    ready = "ready" if start_s is None else f"ready in {start_s:.0f} s"
    places = f"[dim]docs {url}/docs   metrics {url}/metrics   engine {engine_url}[/]"
    console.print(f"[bold green]{ready}[/]  [bold]{url}/v1[/]   {places}", highlight=False, soft_wrap=True)


def print_example(console: Console, url: str, population: Population, default: Tier) -> None:
    """Print a request to try."""
    body = json.dumps({"model": population.name, "prompt": "def main(", "max_tokens": 32, "budget": default.name})
    lines = f"\n  curl {url}/v1/completions -H 'Content-Type: application/json' \\\n    -d '{escape(body)}'\n"
    console.print(lines, highlight=False, soft_wrap=True)
