"""Text in, a mixture out: a population trained by `chorus train`, served by `chorus serve`, against Hugging Face."""

import asyncio
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import AsyncOpenAI, NotFoundError

from chorus.population import manifest
from chorus.population.manifest import Tier
from chorus.population.tokens import TokenSplit, split_path
from tests.live import ENGINE_ARGUMENTS, ChorusServe, chorus_serve, wait_for
from tests.reference import mixture_log_probs

TIERS = ("economy", "standard", "max")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def server(trained_population: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChorusServe]:
    with chorus_serve(
        trained_population, tmp_path_factory.mktemp("serve") / "output.txt", "--", *ENGINE_ARGUMENTS
    ) as running:
        running.wait_until_ready()
        yield running


def ask(url: str, requests: list[dict[str, Any]]) -> list[Any]:
    """Send all requests at once, so that they share the engine's batches."""

    async def send() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return list(await asyncio.gather(*(client.completions.create(**request) for request in requests)))

    return asyncio.run(send())


def prompts(directory: Path, count: int) -> list[list[int]]:
    """Beginnings of held-out documents, as tokens."""
    split = TokenSplit.load(split_path(directory, "test"))
    return [split.tokens[start : start + 70].tolist() for start in split.offsets[: min(count, split.num_documents)]]


@pytest.mark.parametrize("through", ["gateway", "engine"])
def test_mixed_tiers_agree_with_hugging_face(server: ChorusServe, trained_population: Path, through: str) -> None:
    name = manifest.load(trained_population).name
    texts = [prompt for prompt in prompts(trained_population, 3) for _ in TIERS]
    tiers = [TIERS[idx % 3] for idx in range(len(texts))]
    requests = []
    for prompt, tier in zip(texts, tiers, strict=True):
        request: dict[str, Any] = {"model": name, "prompt": prompt, "temperature": 0, "max_tokens": 16, "logprobs": 1}
        if through == "gateway":
            requests.append(request | {"extra_body": {"budget": tier, "return_token_ids": True}})
        else:
            requests.append(request | {"extra_body": {"vllm_xargs": {"chorus_tier": tier}, "return_token_ids": True}})
    answers = ask(server.url if through == "gateway" else server.engine_url, requests)
    for prompt, tier, answer in zip(texts, tiers, answers, strict=True):
        choice = answer.choices[0]
        generated = choice.model_extra["token_ids"]
        log_p_TV = mixture_log_probs(trained_population, tier, prompt + generated)[len(prompt) - 1 : -1]
        assert generated == log_p_TV.argmax(-1).tolist()
        expected = [log_p_TV[step, token].item() for step, token in enumerate(generated)]
        assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_echoed_prompts_carry_the_mixtures_log_probabilities(server: ChorusServe, trained_population: Path) -> None:
    name = manifest.load(trained_population).name
    prompt = prompts(trained_population, 1)[0]
    requests = [
        {"model": f"{name}:{tier}", "prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
        for tier in TIERS
    ]
    for tier, answer in zip(TIERS, ask(server.url, requests), strict=True):
        log_p_TV = mixture_log_probs(trained_population, tier, prompt)
        expected = [log_p_TV[position - 1, token].item() for position, token in enumerate(prompt) if position]
        assert answer.choices[0].logprobs.token_logprobs[1 : len(prompt)] == pytest.approx(expected, abs=TOLERANCE)
        assert answer.model_extra["population"]["tier"] == tier


def test_a_prior_fitted_again_is_served_without_a_restart(server: ChorusServe, trained_population: Path) -> None:
    before = manifest.load(trained_population)
    names = tuple(member.name for member in before.members)
    weights = (0.1, 0.2, 0.7)
    tier = Tier(name="trio", members=names[1:4], weights=weights, relative_cost=3)
    prompt = prompts(trained_population, 1)[0]
    request = {"model": f"{before.name}:trio", "prompt": prompt, "temperature": 0, "max_tokens": 8, "logprobs": 1}
    try:
        manifest.save(
            before.model_copy(update={"tiers": (*before.tiers, tier), "prior_version": 7}), trained_population
        )
        (answer,) = ask(server.url, [request | {"extra_body": {"return_token_ids": True}}])
        served = dict(answer.model_extra["population"])
        assert served.pop("decoding")["passes_per_token"] > 0
        assert served == {
            "tier": "trio", "members": list(tier.members), "weights": list(weights), "prior_version": 7
        }  # fmt: skip
        generated = answer.choices[0].model_extra["token_ids"]
        log_p_TV = mixture_log_probs(trained_population, "trio", prompt + generated)[len(prompt) - 1 : -1]
        assert generated == log_p_TV.argmax(-1).tolist()
    finally:
        manifest.save(before, trained_population)
    with pytest.raises(NotFoundError, match="trio"):
        ask(server.url, [request])


def test_a_killed_engine_core_breaks_its_requests_at_once_and_leaves_its_log(server: ChorusServe) -> None:
    """The last test of this server, which it ends."""
    core = next(
        each for each in psutil.Process(server.process.pid).children(recursive=True) if "EngineCore" in each.name()
    )
    first, begun = server.engine_url, 0

    def send(idx: int) -> str:
        nonlocal begun
        begun += 1
        body = {"prompt": "def", "max_tokens": 110, "ignore_eos": True, "stream": idx % 2 == 0, "n": 8}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        if "error" in answer.text:
            return "broken"
        is_whole = answer.status_code == 200 and (idx % 2 or "[DONE]" in answer.text)
        return "whole" if is_whole else answer.text

    def running() -> float:
        metrics = httpx.get(f"{first}/metrics", timeout=30).text
        return sum(
            float(found) for found in re.findall(r"^vllm:num_requests_running\{.*\} (.+)$", metrics, re.MULTILINE)
        )

    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(send, idx) for idx in range(8)]
        wait_for("requests that run", lambda: begun == 8 and running() > 8, timeout_s=60)
        core.send_signal(signal.SIGKILL)
    outcomes = {answer.result() for answer in answers}
    assert {"broken"} <= outcomes <= {"broken", "whole"}, outcomes  # some may have ended just before
    wait_for("another engine", lambda: server.engine_url != first, timeout_s=120)
    server.wait_until_ready()
    restart = httpx.post(f"{server.url}/v1/completions", json={"prompt": "def", "max_tokens": 3}, timeout=60)
    assert restart.status_code == 200
    server.stop()
    log = Path(re.findall(r"its log is kept: (\S+)", server.output)[0])
    assert "EngineDeadError" in log.read_text()
    log.unlink()
