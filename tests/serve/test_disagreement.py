"""How much members disagree: on a live engine against Hugging Face, and by the formula."""

import math
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.population import manifest
from chorus.serve.gateway.api.disagreement import jensen_gaps
from tests.reference import member_log_probs, mixture_log_probs

TOKENS = list(range(5, 45))


def ask(url: str, **fields: object) -> httpx.Response:
    return httpx.post(f"{url}/v1/population/disagreement", json=fields, timeout=60)


@pytest.mark.parametrize("tier", ["standard", "max"])
def test_the_gap_is_what_mixing_gains_over_its_members(gateway_url: str, tiny_population: Path, tier: str) -> None:
    found = ask(gateway_url, prompt=TOKENS, budget=tier).json()
    expected = manifest.load(tiny_population).tier(tier)
    assert (found["tier"], found["members"]) == (tier, list(expected.members))
    members = [member_log_probs(tiny_population, name, TOKENS) for name in expected.members]
    mixture = mixture_log_probs(tiny_population, tier, TOKENS)
    assert found["disagreement_nats"][0] is None
    for position in range(1, len(TOKENS)):
        log_p_M = [log_p_TV[position - 1, TOKENS[position]].item() for log_p_TV in members]
        assert [row[position] for row in found["logprobs"]] == pytest.approx(log_p_M, abs=1e-4)
        mean = sum(weight * log_p for weight, log_p in zip(expected.weights, log_p_M, strict=True))
        gap = mixture[position - 1, TOKENS[position]].item() - mean
        assert found["disagreement_nats"][position] == pytest.approx(gap, abs=2e-4)


def test_one_member_never_disagrees_and_text_is_refused(gateway_url: str) -> None:
    assert set(ask(gateway_url, prompt=TOKENS, budget="economy").json()["disagreement_nats"][1:]) == {0.0}
    for prompt in ("text", [5], ["a", "b"], [[1, 2], [3, 4]]):
        refused = ask(gateway_url, prompt=prompt)
        assert refused.status_code == 400
        assert "token ids" in refused.json()["error"]["message"]


@given(st.lists(st.tuples(st.floats(-1e4, 0), st.floats(0.01, 1)), min_size=1, max_size=6))
def test_gaps_are_never_below_zero_and_vanish_where_members_agree(pairs: list[tuple[float, float]]) -> None:
    total = math.fsum(weight for _, weight in pairs)
    weights = [weight / total for _, weight in pairs]
    (gap,) = jensen_gaps([[log_p] for log_p, _ in pairs], weights)
    assert 0 <= gap <= max(log_p for log_p, _ in pairs) - min(log_p for log_p, _ in pairs) + 1e-9
    assert jensen_gaps([[pairs[0][0]] for _ in pairs], weights)[0] == pytest.approx(0, abs=1e-9)
