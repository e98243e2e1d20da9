"""`chorus serve` as users meet it: the real engine, the real client, and every bad input of a bad day."""

import concurrent.futures
import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.live import ChorusServe, wait_for

TIERS = {"economy": ["t0-c00"], "standard": ["t0-c00", "t0-c01"], "max": ["t0-c00", "t0-c01", "t0-c02", "t0-c03"]}
PROMPT = "def read(path):\n    with open(path"
GREEDY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}


@pytest.fixture
def client(gateway_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway_url}/v1", api_key="none", max_retries=0)


def post(url: str, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
    return httpx.post(url + path, json=fields, timeout=60)


def metrics(url: str) -> str:
    return httpx.get(f"{url}/metrics").text


def test_the_openai_client_lists_the_population_and_its_tiers(client: openai.OpenAI) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == ["tiny", "tiny:economy", "tiny:standard", "tiny:max"]
    standard = client.models.retrieve("tiny:standard").model_dump()["population"]
    assert standard["budget"] == 2
    assert standard["members"] == TIERS["standard"]
    assert standard["weights"] == pytest.approx([1 / 3, 2 / 3])
    assert standard["relative_cost"] == 2.0
    assert "test_loss" in standard


@pytest.mark.parametrize("tier", TIERS)
def test_the_openai_client_completes_at_every_tier(client: openai.OpenAI, tier: str) -> None:
    completion = client.completions.create(model=f"tiny:{tier}", **GREEDY)
    assert completion.model == f"tiny:{tier}"
    assert completion.choices[0].text
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 8
    by_name = client.completions.create(model="tiny", extra_body={"budget": tier}, **GREEDY)
    assert by_name.choices[0].text == completion.choices[0].text
    assert by_name.model_dump()["population"]["members"] == TIERS[tier]


def test_the_openai_client_streams_what_it_would_get_whole(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny:standard", **GREEDY)
    options: Any = {"include_usage": True}
    chunks = list(client.completions.create(model="tiny:standard", stream=True, stream_options=options, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[0].model_dump()["population"]["tier"] == "standard"
    assert {chunk.model for chunk in chunks} == {"tiny:standard"}
    assert chunks[-1].usage == whole.usage


@pytest.mark.parametrize("content", ["Say hi.", [{"type": "text", "text": "Say hi."}]])
def test_the_openai_client_chats_with_strings_and_lists(client: openai.OpenAI, content: Any) -> None:
    messages: Any = [{"role": "user", "content": content}]
    settings: Any = {"model": "tiny", "messages": messages, "max_tokens": 5, "temperature": 0}
    answer = client.chat.completions.create(extra_body={"budget": 2}, **settings)
    assert answer.model_dump()["population"]["tier"] == "standard"
    assert answer.choices[0].message.role == "assistant"
    streamed = client.chat.completions.create(stream=True, extra_body={"budget": 2}, **settings)
    deltas = [chunk.choices[0].delta.content or "" for chunk in streamed]
    assert "".join(deltas) == answer.choices[0].message.content


def test_tiers_asked_for_at_once_are_each_exact_down_to_the_log_probabilities(
    gateway_url: str, tiny_population: Path
) -> None:
    from tests.reference import mixture_log_probs

    def complete(tier: str) -> dict[str, Any]:
        answer = post(gateway_url, **GREEDY, budget=tier, logprobs=1, echo=True, return_token_ids=True)
        choice = answer.json()["choices"][0]
        assert isinstance(choice, dict)
        return choice

    tiers = [*TIERS, *TIERS]
    with concurrent.futures.ThreadPoolExecutor(len(tiers)) as pool:
        choices = list(pool.map(complete, tiers))
    for tier, choice in zip(tiers, choices, strict=True):
        ids = choice["prompt_token_ids"] + choice["token_ids"][-GREEDY["max_tokens"] :]
        log_p_TV = mixture_log_probs(tiny_population, tier, ids)
        expected = [log_p_TV[position - 1, ids[position]].item() for position in range(1, len(ids))]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
        generated = ids[len(choice["prompt_token_ids"]) :]
        assert generated == log_p_TV[len(choice["prompt_token_ids"]) - 1 : -1].argmax(-1).tolist()


def test_chat_log_probabilities_are_read_by_the_openai_client(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(
        model="tiny:max", messages=messages, max_tokens=3, logprobs=True, top_logprobs=2, temperature=0
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 3
    assert all(token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob for token in content)


def test_text_becomes_tokens_and_text_again(gateway_url: str) -> None:
    tokens = post(gateway_url, "/tokenize", model="tiny:economy", prompt=PROMPT).json()["tokens"]
    back = post(gateway_url, "/detokenize", model="tiny", tokens=tokens).json()["prompt"]
    assert back.endswith(PROMPT)


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"budget": "gold"}, 404, "economy, standard, max"),
        ({"model": "other"}, 404, "tiny:economy"),
        ({"budget": 0}, 400, "from 1 to 4"),
        ({"budget": 5}, 400, "from 1 to 4"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": "word " * 400}, 400, "256"),
        ({"prompt": [7] * 300}, 400, "256"),
        ({"prompt": [100_000]}, 400, "vocabulary"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"vllm_xargs": {"chorus_tier": "max"}}, 400, "chorus_tier"),
    ],
)
def test_bad_input_gets_a_clear_error_and_the_server_goes_on(
    gateway_url: str, fields: dict[str, Any], status: int, says: str
) -> None:
    for stream in (False, True):
        answer = post(gateway_url, **{**GREEDY, "stream": stream, **fields})
        assert answer.status_code == status
        assert says in answer.json()["error"]["message"]
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert post(gateway_url, **GREEDY).status_code == 200


def test_malformed_json_is_422(gateway_url: str) -> None:
    assert httpx.post(f"{gateway_url}/v1/completions", content=b'{"prompt": ').status_code == 422


def test_a_client_that_leaves_frees_the_engine(gateway_url: str, engine_url: str) -> None:
    """Long before the work would have been done; how soon depends on how busy the machine is."""

    def generated() -> float:
        lines = httpx.get(f"{engine_url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))

    def stands_still() -> bool:
        seen = generated()
        time.sleep(0.5)
        return generated() == seen

    before = generated()
    # As many as run at once, for as long as the context lasts.
    num_sequences = 16
    fields = {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "n": num_sequences, "stream": True}
    body = json.dumps(fields).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", httpx.URL(gateway_url).port or 0), timeout=60) as leaving:
        leaving.sendall(head + body)
        heard = b""
        while b"data:" not in heard:
            part = leaving.recv(4096)
            assert part, heard
            heard += part
    wait_for("the engine to be idle", stands_still, timeout_s=60)
    assert generated() - before < num_sequences * 250 * 0.9


def test_tokens_and_times_are_counted_by_tier(gateway_url: str) -> None:
    def count(sample: str) -> float:
        return sum(float(line.split()[-1]) for line in metrics(gateway_url).splitlines() if line.startswith(sample))

    served = '{tier_served="standard"}'
    before = count(f"chorus_gateway_completion_tokens_total{served}")
    assert post(gateway_url, **GREEDY, budget=2, stream=True).status_code == 200
    assert count(f"chorus_gateway_completion_tokens_total{served}") == before + 8
    assert count("chorus_gateway_engine_up") == 1
    assert count(f"chorus_gateway_time_to_first_token_seconds_count{served}") >= 1


def test_the_gateway_process_loads_no_torch(chorus_server: ChorusServe) -> None:
    libraries = Path(f"/proc/{chorus_server.process.pid}/maps").read_text()
    assert "python" in libraries
    assert "torch" not in libraries
    assert "vllm" not in libraries


def test_an_engine_that_is_killed_is_answered_for_and_comes_back(
    chorus_server: ChorusServe, client: openai.OpenAI
) -> None:
    processes = psutil.Process(chorus_server.process.pid).children(recursive=True)
    core = next(process for process in processes if "EngineCore" in " ".join([process.name(), *process.cmdline()]))
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, stream=True, max_tokens=200, n=16, extra_body={"ignore_eos": True}
    )
    next(stream)
    core.kill()
    with pytest.raises(openai.APIError):
        list(stream)

    wait_for("red", lambda: not chorus_server.is_ready(), timeout_s=3)
    refused = post(chorus_server.url, **GREEDY)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    chorus_server.wait_until_ready(timeout_s=300)
    assert post(chorus_server.url, **GREEDY).status_code == 200
    wait_for("the dead to be gone", lambda: not any(process.is_running() for process in processes), timeout_s=10)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_answer_reports_the_passes_that_it_took(gateway_url: str, path: str) -> None:
    asked = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    fields = {**asked, "max_tokens": 20, "temperature": 1, "ignore_eos": True, "decoding": "sampled"}
    whole = post(gateway_url, path, **fields).json()
    assert whole["population"]["decoding"]["passes_per_token"] == pytest.approx((4 + 19) / 20)
    streamed = post(gateway_url, path, **fields, stream=True).text
    last = next(json.loads(part[6:]) for part in streamed.split("\n\n") if '"finish_reason":"length"' in part)
    assert last["population"]["decoding"]["passes_per_token"] == pytest.approx((4 + 19) / 20)
    assert last["choices"][0]["stop_reason"] is None


def test_a_time_budget_is_kept_by_the_live_engine_and_reported(gateway_url: str) -> None:
    fields = {**GREEDY, "max_tokens": 40, "ignore_eos": True}
    free = post(gateway_url, **fields, latency_budget_ms=120_000).json()
    assert free["population"]["tier"] == "max"
    assert free["population"]["deadline"] == "met"
    assert sum(tokens for _, tokens in free["population"]["members_per_token"]) == 40
    streamed = post(gateway_url, **fields, latency_budget_ms=120_000, stream=True).text
    last = next(json.loads(part[6:]) for part in streamed.split("\n\n") if '"finish_reason":"length"' in part)
    assert sum(tokens for _, tokens in last["population"]["members_per_token"]) == 40
    assert last["choices"][0]["stop_reason"] is None
    cut = post(gateway_url, **fields, latency_budget_ms=30, on_deadline="truncate").json()
    assert cut["population"]["truncated"] is True
    assert cut["choices"][0]["finish_reason"] == "length"
    assert free["choices"][0]["text"].startswith(cut["choices"][0]["text"]) or cut["population"]["tier"] != "max"
    failed = post(gateway_url, **fields, latency_budget_ms=1, on_deadline="fail")
    assert failed.status_code == 504
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0}
    whole = post(gateway_url, "/v1/chat/completions", **chat).json()
    assembled = post(
        gateway_url, "/v1/chat/completions", **chat, latency_budget_ms=120_000, on_deadline="truncate"
    ).json()
    assert assembled["choices"][0]["message"]["content"] == whole["choices"][0]["message"]["content"]
    assert assembled["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert assembled["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_the_engine_was_calibrated_when_it_began_to_answer(gateway_url: str) -> None:
    lines = metrics(gateway_url).splitlines()
    expected_s = next(
        float(line.split()[-1]) for line in lines if line.startswith("chorus_gateway_engine_token_seconds{")
    )
    assert expected_s > 0
