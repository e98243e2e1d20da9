"""`chorus bench`: arrivals as chosen, and figures that are what was measured."""

import json
import random
import statistics
from itertools import pairwise
from typing import Any

import pytest
from click.testing import CliRunner

from chorus.population.manifest import Population
from chorus.serve.loadtest.command import bench
from chorus.serve.loadtest.load import Arrivals, Sent, arrivals
from chorus.serve.loadtest.summary import summarise
from tests.serve.gateway.conftest import Pair, gateway_before
from tests.serve.gateway.scripted import DONE, USAGE, WHOLE, ScriptedEngine, event


@pytest.mark.parametrize(("kind", "variation"), [("constant", 0.0), ("poisson", 1.0), ("bursty", 15**0.5)])
def test_arrivals_have_the_rate_and_the_variation_of_their_kind(kind: Arrivals, variation: float) -> None:
    times = list(arrivals(kind, 10.0, 2000.0, random.Random(1)))
    gaps = [b - a for a, b in pairwise(times)]
    assert len(times) / 2000 == pytest.approx(10.0, rel=0.1)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(variation, abs=0.4)
    assert times == sorted(times)


CARDS = {
    name: {"tier": name, "budget": size, "test_loss": {"nats": nats}}
    for name, size, nats in (("economy", 1, 4.0), ("max", 5, 3.0))
}


def test_the_figures_count_what_was_served_in_time_and_weigh_it_by_its_loss() -> None:
    sent = [
        Sent(at_s=0, budget_s=1, tier_asked=None, status=200, tier_served="max", total_s=0.5, tokens=10),
        Sent(at_s=0, budget_s=1, tier_asked=None, status=200, tier_served="max", total_s=0.9, tokens=10,
             members_per_token=[(5, 5), (3, 5)]),
        Sent(at_s=0, budget_s=1, tier_asked=None, status=200, tier_served="economy", total_s=1.5, tokens=10),
        Sent(at_s=0, budget_s=1, tier_asked=None, status=429, retry_after_s=1),
        Sent(at_s=0, budget_s=1, tier_asked=None, status=504),
    ]  # fmt: skip
    found = summarise(sent, CARDS, duration_s=2.0)
    assert (found["sent"], found["admitted"], found["served"], found["in_time"]) == (5, 4, 3, 2)
    assert (found["refused_429"], found["failed_5xx"]) == (1, 1)
    assert found["attainment"] == 0.5
    assert found["goodput_tokens_per_s"] == 10
    assert found["mean_members"] == pytest.approx((15 * 5 + 5 * 3) / 20)
    assert found["expected_loss_nats"] == pytest.approx((15 * 3.0 + 5 * 3.5) / 20)
    assert found["quality_weighted_tokens_per_s"] == pytest.approx((15 + 5 * 2.718281828**-0.5) / 2)


def run(pair: Pair, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(bench, [pair.url, "--json", *options])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert isinstance(found, dict)
    return found


def test_a_run_against_a_gateway(tiny: Population) -> None:
    with gateway_before(ScriptedEngine([event("a"), 0.02, USAGE, DONE]), tiny) as pair:
        options = ("--duration", "1", "--tiers", "economy=1,default=1", "--budget-ms", "60000", "--max-tokens", "9")
        found = run(pair, "--rate", "20", "--arrivals", "constant", *options)
        assert found["sent"] == found["in_time"] == 19
        assert set(found["tiers_served"]) == {"economy", "max"}
        assert found["first_token_ms"]["p50"] <= found["total_ms"]["p99"]
        bodies = [body for body in pair.engine.bodies if "prompt" in body]
        assert {body["max_tokens"] for body in bodies} == {9}
        closed = run(pair, "--streams", "2", "--duration", "0.5")
        assert closed["sent"] == closed["served"] >= 2


def test_whole_answers_bring_their_members_per_token(tiny: Population) -> None:
    report = {"members_per_token": [[4, 2], [2, 1]], "drops": []}
    engine = ScriptedEngine([json.dumps({**json.loads(WHOLE), "kv_transfer_params": report}).encode()])
    engine.content_type = "application/json"
    with gateway_before(engine, tiny) as pair:
        found = run(pair, "--rate", "9", "--arrivals", "constant", "--duration", "1", "--whole", "--budget-ms", "9000")
        assert found["mean_members"] == pytest.approx(10 / 3)


def test_where_no_gateway_is_one_sentence_says_so() -> None:
    result = CliRunner().invoke(bench, ["http://127.0.0.1:9"])
    assert "no Chorus gateway" in str(result.exception)
