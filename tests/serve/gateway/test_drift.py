"""The drift signal: the loss of clients' prompts at the tier that served them, measured in quiet moments."""

import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest

from chorus.population import manifest
from chorus.population.manifest import Population
from chorus.serve.gateway.app import create_app
from chorus.serve.gateway.gateway import Gateway
from chorus.serve.gateway.observe.drift import mean_loss
from chorus.serve.gateway.settings import Settings
from tests.live import serving, wait_for
from tests.serve.gateway.conftest import gateway_before
from tests.serve.gateway.scripted import WHOLE, ScriptedEngine

PROMPT = "def read(path):\n    with open(path"
NAME = "chorus_gateway_echo_loss_nats"


def losses(url: str) -> dict[str, tuple[float, float]]:
    """Count and sum of the losses by tier."""
    found: dict[str, dict[str, float]] = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        for part in ("count", "sum"):
            if line.startswith(f"{NAME}_{part}{{"):
                tier = line.split('"')[1]
                found.setdefault(tier, {})[part] = float(line.split()[-1])
    return {tier: (parts["count"], parts["sum"]) for tier, parts in found.items()}


def engine_with(loss_nats: float) -> ScriptedEngine:
    entries = [None, *({str(token): {"logprob": -loss_nats, "rank": 1}} for token in range(5))]
    body = json.loads(WHOLE)
    body["choices"][0]["prompt_logprobs"] = entries
    engine = ScriptedEngine([json.dumps(body).encode()])
    engine.content_type = "application/json"
    return engine


def test_a_prompt_is_asked_for_again_without_what_concerns_its_answer(tiny: Population) -> None:
    with gateway_before(engine_with(2.5), tiny, echo_part=1.0) as pair:
        fields = {"prompt": "a secret", "budget": 2, "max_tokens": 9, "stop": ["x"], "temperature": 1.5, "user": "eve"}
        assert httpx.post(f"{pair.url}/v1/completions", json=fields).status_code == 200
        wait_for("the loss", lambda: losses(pair.url), timeout_s=10)
        asked = pair.engine.bodies[-1]
        assert asked["prompt"] == "a secret"
        assert (asked["max_tokens"], asked["prompt_logprobs"]) == (1, 0)
        assert asked["vllm_xargs"] == {"chorus_tier": "standard"}
        assert not {"stop", "user", "stream"} & asked.keys()
        assert losses(pair.url) == {"standard": (1.0, 2.5)}
        assert len(pair.engine.bodies) == 2


def test_by_default_no_prompt_is_asked_for_again(tiny: Population) -> None:
    with gateway_before(engine_with(2.5), tiny) as pair:
        for _ in range(5):
            httpx.post(f"{pair.url}/v1/completions", json={"prompt": "a"})
        assert len(pair.engine.bodies) == 5


def test_prompts_wait_until_the_engine_is_idle_and_only_a_few_do(tiny: Population) -> None:
    with gateway_before(engine_with(1.0), tiny, echo_part=1.0) as pair:
        answer = pair.engine.steps
        pair.engine.steps = [2.0, *answer]
        with httpx.Client(base_url=pair.url, timeout=20) as client:
            import concurrent.futures

            with concurrent.futures.ThreadPoolExecutor(24) as threads:
                sent = [threads.submit(client.post, "/v1/completions", json={"prompt": str(i)}) for i in range(20)]
                assert {each.result().status_code for each in sent} == {200}
        assert len(pair.engine.bodies) - 20 <= 1  # at most one, sent when all were answered
        pair.engine.steps = answer
        wait_for("the drift", lambda: losses(pair.url).get("max", (0, 0))[0] >= 1, timeout_s=20)
        assert len(pair.engine.bodies) <= 20 + 9


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_the_live_engine_gives_the_mixtures_loss_of_the_prompt(
    engine_url: str, tiny_population: Path, kind: str
) -> None:
    from tests.reference import mixture_log_probs

    settings = Settings(population=manifest.load(tiny_population), engine=engine_url, calibrates=False, echo_part=1.0)
    gateway = Gateway(settings)
    body: dict[str, Any] = {"max_tokens": 2, "budget": "standard"}
    asks = {"prompt": PROMPT} if kind == "completion" else {"messages": [{"role": "user", "content": PROMPT}]}
    path = "/v1/completions" if kind == "completion" else "/v1/chat/completions"
    with serving(create_app(gateway)) as server:
        wait_for("the engine", lambda: gateway.pool.is_ready, timeout_s=30)
        ids = httpx.post(f"{server.url}/tokenize", json=asks, timeout=60).json()["tokens"]
        assert httpx.post(f"{server.url}{path}", json={**asks, **body}, timeout=60).status_code == 200
        wait_for("the loss", lambda: losses(server.url), timeout_s=60)
        ((tier, (count, nats)),) = losses(server.url).items()
    log_p_TV = mixture_log_probs(tiny_population, "standard", ids)
    expected = -sum(log_p_TV[at - 1, ids[at]].item() for at in range(1, len(ids))) / (len(ids) - 1)
    assert (tier, count) == ("standard", 1.0)
    assert nats == pytest.approx(expected, abs=1e-3)


def test_a_prompt_of_one_token_has_no_loss() -> None:
    assert mean_loss({"choices": [{"prompt_logprobs": [None]}]}) is None
    assert mean_loss({"prompt_logprobs": [None, {"1": {"logprob": math.log(0.5)}}]}) == pytest.approx(math.log(2))
