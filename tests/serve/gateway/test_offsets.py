"""Where tokens begin in the text of an answer."""

import json
from typing import Any

import pytest

from chorus.serve.gateway.relay.offsets import Offsets
from tests.serve.gateway.conftest import Pair
from tests.serve.gateway.scripted import DONE, USAGE, event
from tests.serve.gateway.test_deadlines import events, post


def choice(text: str, tokens: list[str], *, start: int = 0, index: int = 0) -> dict[str, Any]:
    """As vLLM writes it: offsets are sums of the tokens' lengths."""
    offsets = [start + sum(map(len, tokens[:idx])) for idx in range(len(tokens))]
    logprobs = {"text_offset": offsets, "token_logprobs": [None, *[-1.5] * (len(tokens) - 1)], "tokens": tokens}
    return {"index": index, "text": text, "logprobs": {**logprobs, "top_logprobs": None}, "finish_reason": None}


@pytest.mark.parametrize(
    ("text", "tokens", "offsets"),
    [
        ("def f(x", ["<|bos|>", "def", " f", "(", "x"], [0, 0, 3, 5, 6]),
        ("def f", ["def", " f"], [0, 3]),
        ("<|bos|>a", ["<|bos|>", "a"], [0, 7]),  # token ids, which become text with it
        ("[INST]a", ["<s>", "[INST]", "a"], [0, 0, 6]),
        ("é!", ["\ufffd", "\ufffd", "!"], [0, 1, 2]),  # nothing is hidden: as it came
        ("ab", ["token_id:1", "token_id:2"], [0, 10]),
        ("", ["<|eos|>"], [0]),
    ],
)
def test_offsets_point_into_the_text(text: str, tokens: list[str], offsets: list[int]) -> None:
    body = json.dumps({"choices": [choice(text, tokens)]}).encode()
    (found,) = json.loads(Offsets().correct(body))["choices"]
    assert found["logprobs"]["text_offset"] == offsets
    assert found | {"logprobs": None} == choice(text, tokens) | {"logprobs": None}


@pytest.mark.parametrize("stream", [True, False])
def test_an_echoed_prompt_has_its_offsets_in_streams_too(pair: Pair, stream: bool) -> None:
    first = choice("def f(", ["<|bos|>", "def", " f", "("])
    more = choice("x)", ["x", ")"], start=13)
    other = choice("y)", ["y", ")"], index=1)
    if stream:
        pair.engine.steps = [*(event("", choices=[each]) for each in (first, more, other)), USAGE, DONE]
    else:
        whole = choice("def f(x)", ["<|bos|>", "def", " f", "(", "x", ")"])
        pair.engine.steps = [json.dumps({"choices": [whole], "model": "tiny"}).encode()]
        pair.engine.content_type = "application/json"
    answer = post(pair, stream=stream, echo=True, logprobs=1)
    found = [each["choices"][0]["logprobs"]["text_offset"] for each in (events(answer) if stream else [answer.json()])]
    assert found == ([[0, 0, 3, 5], [6, 7], [0, 1]] if stream else [[0, 0, 3, 5, 6, 7]])


def test_without_an_echo_nothing_is_parsed(pair: Pair) -> None:
    sent = event("", choices=[choice("x", ["<|bos|>", "x"])])
    pair.engine.steps = [event("a"), sent, USAGE, DONE]
    assert sent.decode() in post(pair, stream=True, logprobs=1).text
