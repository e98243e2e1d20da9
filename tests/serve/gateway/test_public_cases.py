"""What went wrong elsewhere, and the right value here: each case is a public report on a comparable server (repository, number)."""

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.serve.gateway.conftest import Pair
from tests.serve.gateway.scripted import DONE, event

PROMPT = "def main(argv):\n    return "
MESSAGES = [{"role": "user", "content": PROMPT}]
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True, kw_only=True)
class Server:
    """A gateway before a real engine, as clients use it."""

    url: str

    def post(self, path: str, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{path}", json=body, headers=headers, timeout=120)

    def complete(self, **fields: Any) -> dict[str, Any]:
        return self._whole("completions", {"prompt": PROMPT, **GREEDY, **fields})

    def chat(self, **fields: Any) -> dict[str, Any]:
        return self._whole("chat/completions", {"messages": MESSAGES, **GREEDY, **fields})

    def stream(self, path: str = "completions", **fields: Any) -> list[dict[str, Any]]:
        """The events' objects, without the last `[DONE]`."""
        lines = self.lines(path, **fields)
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def lines(self, path: str, **fields: Any) -> list[str]:
        body = {"prompt": PROMPT, **GREEDY} if path == "completions" else {"messages": MESSAGES, **GREEDY}
        answer = self.post(path, **{**body, "stream": True, **fields})
        assert answer.status_code == 200, answer.text
        return [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]

    def _whole(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.post(path, **body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


Check = Callable[[Server], None]
_CASES: list[Any] = []


def reported(repository: str, number: int) -> Callable[[Check], Check]:
    """A case from issue or pull request `number` of `repository`."""

    def add(check: Check) -> Check:
        _CASES.append(pytest.param(check, id=f"{repository}#{number}-{check.__name__}"))
        return check

    return add


def choices(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for each in events:
        yield from each["choices"]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for choice in choices(events))


@reported("vllm-project/vllm", 6371)
def usage_comes_in_a_last_chunk_of_its_own(server: Server) -> None:
    *parts, last = server.stream("chat/completions", stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12
    assert all(each["choices"] for each in parts)


@reported("vllm-project/vllm", 7262)
def usage_is_in_no_other_chunk(server: Server) -> None:
    *parts, _ = server.stream(stream_options={"include_usage": True})
    assert all(each.get("usage") is None for each in parts)


@reported("vllm-project/vllm", 36379)
def empty_stream_options_ask_for_no_usage(server: Server) -> None:
    assert all(each["choices"] and not each.get("usage") for each in server.stream(stream_options={}))


@reported("huggingface/text-generation-inference", 3155)
def null_fields_are_as_good_as_absent(server: Server) -> None:
    nothing = dict.fromkeys(("stream_options", "function_call", "functions", "tools", "stop", "seed", "top_p"))
    assert server.chat(**nothing, stream=False, tool_choice="none")["choices"]
    assert server.stream("chat/completions", **nothing, tool_choice="none")


@reported("ollama/ollama", 4357)
def finish_reason_is_null_until_the_end(server: Server) -> None:
    reasons = [choice["finish_reason"] for choice in choices(server.stream("chat/completions"))]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]


@reported("abetlen/llama-cpp-python", 735)
def the_last_chunk_has_a_finish_reason(server: Server) -> None:
    assert server.stream()[-1]["choices"][0]["finish_reason"] == "length"


@reported("BerriAI/litellm", 11158)
def the_last_chunk_of_a_completion_has_its_text_field(server: Server) -> None:
    assert all(isinstance(choice["text"], str) for choice in choices(server.stream()))


@reported("ikawrakow/ik_llama.cpp", 467)
def a_stream_ends_with_done_once(server: Server) -> None:
    lines = server.lines("chat/completions")
    assert (lines[-1], lines.count("[DONE]")) == ("[DONE]", 1)


@reported("huggingface/text-generation-inference", 1648)
def the_index_is_that_of_the_choice_and_not_of_the_token(server: Server) -> None:
    assert {choice["index"] for choice in choices(server.stream("chat/completions"))} == {0}


@reported("BerriAI/litellm", 3276)
def chunks_of_several_choices_say_which_they_belong_to(server: Server) -> None:
    found = list(choices(server.stream("chat/completions", n=2, temperature=1.9, seed=4242)))
    assert {choice["index"] for choice in found} == {0, 1}


@reported("ggml-org/llama.cpp", 20226)
def each_choice_of_a_stream_finishes_under_its_own_index(server: Server) -> None:
    found = choices(server.stream("chat/completions", n=3, temperature=1))
    assert sorted(choice["index"] for choice in found if choice["finish_reason"]) == [0, 1, 2]


@reported("sgl-project/sglang", 2912)
def the_texts_of_several_choices_are_not_mixed(server: Server) -> None:
    asked = {"n": 2, "temperature": 1.0, "seed": 7}
    whole = {choice["index"]: choice["text"] for choice in server.complete(**asked)["choices"]}
    streamed = dict.fromkeys(whole, "")
    for choice in choices(server.stream(**asked)):
        streamed[choice["index"]] += choice["text"]
    assert streamed == whole


@reported("vllm-project/vllm", 6521)
def a_prompt_can_be_scored_without_generating(server: Server) -> None:
    found = server.complete(echo=True, max_tokens=0, logprobs=1)
    assert found["choices"][0]["text"].endswith(PROMPT)
    assert len(found["choices"][0]["logprobs"]["token_logprobs"]) == found["usage"]["prompt_tokens"]
    assert server.complete()["choices"], "and the server lives"


@reported("vllm-project/vllm", 2995)
def a_prompt_comes_back_without_logprobs_too(server: Server) -> None:
    assert PROMPT in server.complete(echo=True)["choices"][0]["text"]


@reported("ggml-org/llama.cpp", 27174)
def an_echo_has_a_log_probability_for_each_token_of_the_prompt_but_the_first(server: Server) -> None:
    found = server.complete(echo=True, max_tokens=1, logprobs=1)
    first, *rest = found["choices"][0]["logprobs"]["token_logprobs"]
    assert first is None
    assert len(rest) == found["usage"]["prompt_tokens"]
    assert all(math.isfinite(value) and value <= 0 for value in rest)


@reported("ollama/ollama", 6646)
def an_unknown_model_is_404_in_openais_words(server: Server) -> None:
    answer = server.post("chat/completions", model="gpt-none", messages=MESSAGES)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert answer.json()["error"]["type"] == "invalid_request_error"


@reported("runpod-workers/worker-vllm", 57)
def an_unknown_model_is_no_200_in_a_stream_either(server: Server) -> None:
    answer = server.post("chat/completions", model="gpt-none", messages=MESSAGES, stream=True)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"


@reported("ollama/ollama", 16530)
def an_unknown_model_of_responses_is_named_with_those_there_are(server: Server) -> None:
    answer = server.post("responses", model="gpt-none", input="hi")
    assert answer.status_code == 404
    assert "gpt-none" in answer.json()["error"]["message"]
    assert "tiny:max" in answer.json()["error"]["message"]


@reported("vllm-project/vllm", 7283)
def an_empty_prompt_is_refused_and_ends_nothing(server: Server) -> None:
    for prompt in ("", [""], [[]], [], ["a", ""], None):
        assert server.post("completions", prompt=prompt, **GREEDY).status_code == 400
    assert server.complete()["choices"]


@reported("ggml-org/llama.cpp", 8367)
def content_in_parts_is_as_good_as_a_string(server: Server) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    assert server.chat(messages=parts)["choices"] == server.chat()["choices"]


@reported("abetlen/llama-cpp-python", 1907)
def max_completion_tokens_is_heeded(server: Server) -> None:
    found = server.chat(max_tokens=None, max_completion_tokens=3)
    assert found["usage"]["completion_tokens"] == 3
    assert found["choices"][0]["finish_reason"] == "length"


def _stop_in(server: Server) -> tuple[str, str]:
    """What is generated without a stop, and a text of several tokens from its middle."""
    text = server.complete(max_tokens=24)["choices"][0]["text"]
    middle = len(text) // 2
    return text, text[middle : middle + 5]


@reported("ggml-org/llama.cpp", 11538)
def a_stop_text_of_several_tokens_ends_the_answer(server: Server) -> None:
    text, stop = _stop_in(server)
    choice = server.complete(max_tokens=24, stop=[stop])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")


@reported("vllm-project/vllm", 3572)
def a_stop_text_is_found_within_a_token(server: Server) -> None:
    text, stop = _stop_in(server)
    inside = stop[1:3]
    assert server.complete(max_tokens=24, stop=inside)["choices"][0]["text"] == text[: text.index(inside)]


@reported("vllm-project/vllm", 3574)
def nothing_of_a_stop_text_is_streamed(server: Server) -> None:
    text, stop = _stop_in(server)
    assert text_of(server.stream(max_tokens=24, stop=[stop], stream_interval=1)) == text[: text.index(stop)]


@reported("huggingface/text-generation-inference", 1724)
def the_stop_text_is_not_in_the_answer_given_as_text_or_list(server: Server) -> None:
    text, stop = _stop_in(server)
    lists: list[Any] = [stop, [stop], [stop, "\0never", "\0nor", "\0that"]]
    assert {server.complete(max_tokens=24, stop=each)["choices"][0]["text"] for each in lists} == {
        text[: text.index(stop)]
    }


@reported("vllm-project/vllm", 21310)
def a_seed_makes_sampling_repeatable(server: Server) -> None:
    def sample(seed: int) -> str:
        text: str = server.complete(temperature=1.0, seed=seed, max_tokens=24)["choices"][0]["text"]
        return text

    assert sample(123) == sample(123)
    assert len({sample(seed) for seed in range(4)}) > 1


@reported("vllm-project/vllm", 9426)
def tool_choice_none_needs_no_tools(server: Server) -> None:
    assert server.chat(tool_choice="none")["choices"][0]["message"].get("tool_calls") in (None, [])


@reported("vllm-project/vllm", 10583)
def two_requests_may_have_one_id(server: Server) -> None:
    def post(idx: int) -> httpx.Response:
        given = {"request_id": "same"} if idx % 2 else {}
        return server.post("completions", {"x-request-id": "same"}, prompt=PROMPT, **{**GREEDY, **given})

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(post, range(8)))
    assert [answer.status_code for answer in found] == [200] * 8
    assert {answer.headers["x-request-id"] for answer in found} == {"same"}
    assert len({answer.json()["choices"][0]["text"] for answer in found}) == 1


@reported("sgl-project/sglang", 2301)
def logprobs_0_gives_those_of_the_chosen_tokens(server: Server) -> None:
    found = server.complete(logprobs=0)["choices"][0]["logprobs"]
    assert len(found["token_logprobs"]) == 12
    assert all(len(top) <= 1 for top in found["top_logprobs"])


@reported("EricLBuehler/mistral.rs", 1876)
def logprobs_of_completions_have_their_four_lists(server: Server) -> None:
    found = server.complete(logprobs=2)["choices"][0]["logprobs"]
    lists = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    assert [len(found[name]) for name in lists] == [12] * 4


@reported("vllm-project/vllm", 5008)
def logprobs_of_chats_are_a_list_of_tokens(server: Server) -> None:
    found = server.chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert len(found) == 12
    for each in found:
        assert {"token", "logprob", "bytes", "top_logprobs"} <= each.keys()
        assert len(each["top_logprobs"]) == 2


@reported("vllm-project/vllm", 47838)
def top_logprobs_null_does_not_switch_logprobs_off(server: Server) -> None:
    found = server.chat(logprobs=True, top_logprobs=None)["choices"][0]["logprobs"]
    assert len(found["content"]) == 12


@reported("ggml-org/llama.cpp", 14566)
def a_prompt_that_is_too_long_is_400_in_a_stream_too(server: Server) -> None:
    answer = server.post("chat/completions", messages=[{"role": "user", "content": "word " * 2000}], stream=True)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@reported("ollama/ollama-js", 255)
def a_stream_is_the_same_text_as_the_whole_answer(server: Server) -> None:
    prompt = "# использовать 你好 🌍\n"
    whole = server.complete(prompt=prompt, echo=True)["choices"][0]["text"]
    assert prompt in whole
    assert text_of(server.stream(prompt=prompt, echo=True, stream_interval=1)) == whole


def named(answer: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    """Events that have names."""
    assert answer.status_code == 200, answer.text
    pairs = (part.split("\n") for part in answer.text.split("\n\n")[:-1])
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


@reported("vllm-project/vllm", 45367)
def a_message_starts_with_its_type_and_role(server: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    found = named(server.post("messages", model="tiny:standard", stream=True, **body))
    name, first = found[0]
    assert name == "message_start"
    assert (first["message"]["type"], first["message"]["role"]) == ("message", "assistant")
    assert first["message"]["population"]["tier"] == "standard"
    assert found[-1][0] == "message_stop"
    whole = server.post("messages", model="tiny:standard", **body).json()
    deltas = [fields["delta"].get("text", "") for name, fields in found if name == "content_block_delta"]
    assert "".join(deltas) == whole["content"][0]["text"]


@reported("sgl-project/sglang", 17853)
def the_input_of_a_response_may_be_a_list_of_items(server: Server) -> None:
    asked = {"max_output_tokens": 8, "temperature": 0, "budget": "economy"}
    content = [{"type": "input_text", "text": PROMPT}]
    texts = []
    for given in (
        PROMPT,
        [{"role": "user", "content": content}],
        [{"type": "message", "role": "user", "content": content}],
    ):
        answer = server.post("responses", input=given, **asked)
        assert answer.status_code == 200, answer.text
        assert answer.json()["population"]["tier"] == "economy"
        texts.append(answer.json()["output"][0]["content"][0]["text"])
    assert len(set(texts)) == 1


@pytest.mark.parametrize("check", _CASES)
def test_a_public_case_has_the_right_value_here(gateway_url: str, check: Check) -> None:
    check(Server(url=gateway_url))


@pytest.mark.parametrize(
    ("code", "status"),
    [(400, 400), (None, 500), ("x", 500)],
    ids=["BerriAI/litellm#18757", "BerriAI/litellm#22793", "code"],
)
def test_an_error_in_the_first_chunk_of_an_upstream_is_a_status(pair: Pair, code: Any, status: int) -> None:
    error = {"message": "The model is not multimodal.", "type": "BadRequestError", "param": None, "code": code}
    pair.engine.steps = [b"data: " + json.dumps({"error": error}).encode() + b"\n\n", DONE]
    answer = httpx.post(f"{pair.url}/v1/completions", json={"prompt": "a", "stream": True})
    assert answer.status_code == status
    expected = (
        error["message"] if status == 400 else "the engine failed on this request."
    )  # a 5xx keeps its words to itself
    assert answer.json()["error"]["message"] == expected


@pytest.mark.parametrize(
    "steps", [[30.0], [event("a"), 30.0]], ids=["lemonade-sdk/lemonade#3133", "sgl-project/sglang#36552"]
)
def test_an_upstream_is_told_at_once_when_the_client_leaves(pair: Pair, steps: list[Any]) -> None:
    """Also before its first byte: in a long prefill."""
    pair.engine.steps = steps
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{pair.url}/v1/completions", json={"prompt": "a", "stream": True}, timeout=httpx.Timeout(5, read=0.5)
        )
    assert pair.engine.client_left.wait(5)
