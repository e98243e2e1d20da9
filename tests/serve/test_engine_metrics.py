"""The engine's own metrics, read where Prometheus reads them: at the live engine's `/metrics`."""

import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from chorus.population import manifest
from chorus.serve.gateway.engines.costs import read_costs
from tests.live import wait_for

BODY = {"prompt": [5, 6, 7, 8, 9, 10, 11, 12, 13, 14], "max_tokens": 9, "ignore_eos": True, "temperature": 0}
STEPS = ("chorus_engine_steps_total", "")
ROWS = 10 + 9 - 1  # the last token is never computed


def samples(engine_url: str, prefix: str = "chorus_engine_") -> dict[tuple[str, str], float]:
    """Values by (metric, its member or reason) of the engine's metrics of that prefix."""
    families = text_string_to_metric_families(httpx.get(f"{engine_url}/metrics").text)
    return {
        (sample.name, sample.labels.get("member", sample.labels.get("reason", ""))): sample.value
        for family in families
        if family.name.startswith(prefix)
        for sample in family.samples
    }


def ask(engine_url: str, tier: str, *, temperature: float = 0, **arguments: object) -> None:
    model = httpx.get(f"{engine_url}/v1/models").json()["data"][0]["id"]
    fields = {"model": model, "temperature": temperature, "vllm_xargs": {"chorus_tier": tier, **arguments}}
    assert httpx.post(f"{engine_url}/v1/completions", json=BODY | fields, timeout=60).status_code == 200


def is_idle(engine_url: str) -> bool:
    """Whether it runs no step for a while."""
    before = samples(engine_url)
    time.sleep(1)
    return bool(before) and samples(engine_url)[STEPS] == before[STEPS]


def test_rows_and_seconds_are_counted_for_the_members_that_ran(engine_url: str, tiny_population: Path) -> None:
    population = manifest.load(tiny_population)
    ask(engine_url, "max")
    wait_for("the gateway to have done with calibrating", lambda: is_idle(engine_url), timeout_s=60)
    for tier in population.tiers:
        before = samples(engine_url)
        ask(engine_url, tier.name, chorus_decoding="plain")
        wait_for("the totals", lambda done=before[STEPS] + 9: samples(engine_url)[STEPS] >= done, timeout_s=20)
        after = samples(engine_url)
        for member in population.members:
            rows = ("chorus_engine_member_rows_total", member.name)
            passes = ("chorus_engine_member_passes_total", member.name)
            seconds = ("chorus_engine_member_seconds_total", member.name)
            assert after[rows] - before[rows] == (ROWS if member.name in tier.members else 0)
            assert after[passes] - before[passes] == (9 if member.name in tier.members else 0)
            assert (after[seconds] > before[seconds]) == (member.name in tier.members)
    assert after["chorus_engine_mixing_seconds_total", ""] > 0
    assert after["chorus_engine_active_sets", ""] == 0
    assert after["chorus_engine_prior_version", ""] == population.prior_version


def test_the_engine_says_what_a_step_costs_and_the_gateway_reads_it(engine_url: str) -> None:
    for tier in ("max", "economy") * 40:
        ask(engine_url, tier)
        found = read_costs(httpx.get(f"{engine_url}/metrics").content)
        if found is not None and found.member > 0:
            break
    assert found is not None
    assert 0 < found.step < 1
    assert 0 < found.member < 1
    assert min(found.request, found.row, found.context) >= 0


def test_passes_and_late_rows_of_other_ways_are_counted(engine_url: str, tiny_population: Path) -> None:
    wait_for("the gateway to have done with calibrating", lambda: is_idle(engine_url), timeout_s=60)
    names = [member.name for member in manifest.load(tiny_population).members]

    def counts() -> tuple[float, float]:
        found = samples(engine_url)
        passes = sum(found["chorus_engine_member_passes_total", name] for name in names)
        return passes, found["chorus_engine_caught_up_rows_total", ""]

    before = counts()
    ask(engine_url, "max", chorus_decoding="sampled", temperature=1)
    wait_for("the totals", lambda: counts()[0] >= before[0] + 4 + 8, timeout_s=20)
    assert counts()[0] == before[0] + 4 + 8
    before = counts()
    ask(engine_url, "max", chorus_decoding="speculative")
    wait_for("the totals", lambda: counts()[0] > before[0] and is_idle(engine_url), timeout_s=20)
    assert counts()[1] == before[1]
    assert samples(engine_url, "vllm:spec_decode_num_draft_tokens")["vllm:spec_decode_num_draft_tokens_total", ""] > 0


def test_dropped_members_are_counted_by_reason(engine_url: str) -> None:
    ask(engine_url, "max")

    def drops() -> float:
        return sum(value for (name, _), value in samples(engine_url).items() if name == "chorus_engine_drops_total")

    before = drops()
    ask(engine_url, "max", chorus_time_budget_ms=1)
    wait_for("three members to have left", lambda: drops() == before + 3, timeout_s=20)
