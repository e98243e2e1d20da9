"""`chorus bench`: a load test of a gateway. Heavy modules are imported only when the command runs."""

import json
import os
from typing import Any

import click

from chorus.population.errors import ChorusError
from chorus.population.manifest import DECODINGS


def _parse_tiers(text: str) -> tuple[tuple[str | None, float], ...]:
    """Tiers and shares from `economy=1,max=3`, or names alone; `default` stands for no tier."""
    found: list[tuple[str | None, float]] = []
    for part in text.split(","):
        name, _, share = part.partition("=")
        try:
            found.append((None if name == "default" else name, float(share or 1)))
        except ValueError:
            raise click.BadParameter(f"{part!r} is invalid; use NAME or NAME=SHARE.") from None
    return tuple(found)


@click.command()
@click.argument("url")
@click.option("--rate", type=click.FloatRange(0, min_open=True), metavar="R", help="Mean arrivals per second.")
@click.option(
    "--streams",
    "num_streams",
    default=16,
    show_default=True,
    type=click.IntRange(1),
    help="Number of concurrent streams; used without --rate.",
)
@click.option("--arrivals", default="poisson", show_default=True, type=click.Choice(["poisson", "constant", "bursty"]))
@click.option(
    "--duration", default=30.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Duration in seconds."
)
@click.option(
    "--tiers", default="default", show_default=True, help="Tiers to request, with their shares: economy=1,max=3"
)
@click.option(
    "--budget-ms",
    "budgets",
    multiple=True,
    type=float,
    help="Time budget in milliseconds; repeat it to choose one at random per request.",
)
@click.option("--on-deadline", default="degrade", show_default=True, type=click.Choice(["degrade", "truncate", "fail"]))
@click.option(
    "--decoding", type=click.Choice(DECODINGS), help="How to compute tokens; by default each tier's decoding."
)
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--prompt-words", default=12, show_default=True, type=click.IntRange(1))
@click.option(
    "--whole", is_flag=True, help="Request whole answers, which report members per token, instead of streams."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench(url: str, budgets: tuple[float, ...], as_json: bool, **options: Any) -> None:
    """Put load on the gateway at URL and print attainment, goodput and percentiles.

    An API key is taken from CHORUS_API_KEY.
    """
    import asyncio

    from chorus.serve.loadtest.load import Plan, run
    from chorus.serve.loadtest.summary import summarise

    plan = Plan(
        url=url.rstrip("/").removesuffix("/v1"),
        arrivals=options["arrivals"],
        rate_per_s=options["rate"],
        num_streams=options["num_streams"],
        duration_s=options["duration"],
        tiers=_parse_tiers(options["tiers"]),
        budgets_ms=budgets or (None,),
        on_deadline=options["on_deadline"],
        decoding=options["decoding"],
        max_tokens=options["max_tokens"],
        prompt_words=options["prompt_words"],
        streams=not options["whole"],
        seed=options["seed"],
        key=os.environ.get("CHORUS_API_KEY"),
    )
    cards = asyncio.run(_cards(plan.url, plan.key))
    figures = summarise(asyncio.run(run(plan)), cards, plan.duration_s)
    if as_json:
        click.echo(json.dumps(figures, indent=2))
    else:
        _show(figures)


async def _cards(url: str, key: str | None) -> dict[str, dict[str, Any]]:
    import aiohttp

    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        timeout = aiohttp.ClientTimeout(total=10)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"{url}/v1/models", headers=headers) as answer,
        ):
            body = await answer.json()
            if answer.status != 200:
                raise ChorusError(f"{url} returned status {answer.status}: {body['error']['message']}")
            cards = [card["population"] for card in body["data"]]
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError) as error:
        raise ChorusError(f"no Chorus gateway answers at {url} ({type(error).__name__}); check the URL.") from None
    return {card["tier"]: card for card in cards}


def _show(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column("what", style="dim", no_wrap=True)
    table.add_column("value", justify="right")
    for name, value in figures.items():
        if isinstance(value, dict):
            shown = "   ".join(f"{key} {part}" for key, part in value.items()) or "-"
        elif isinstance(value, float):
            shown = f"{value:.4g}"
        else:
            shown = "-" if value is None else str(value)
        table.add_row(name.replace("_", " "), shown)
    Console(soft_wrap=True).print(table)
