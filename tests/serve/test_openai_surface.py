"""What the OpenAI API has beside plain text, asked of the mixture: structured output, tools, several answers."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

WEATHER = {
    "type": "object",
    "properties": {"unit": {"enum": ["celsius", "fahrenheit"]}, "day": {"enum": ["today", "tomorrow"]}},
    "required": ["unit", "day"],
    "additionalProperties": False,
}
MESSAGES: Any = [{"role": "user", "content": "What will the weather be?"}]


@pytest.fixture
def client(gateway_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway_url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def no_blanks(tiny_population: Path) -> dict[str, float]:
    """A bias against white space: JSON allows it anywhere, and random members would write nothing else."""
    tokenizer = Tokenizer.from_file(str(tiny_population / "tokenizer.json"))
    texts = {idx: tokenizer.decode([idx], skip_special_tokens=False) for idx in range(tokenizer.get_vocab_size())}
    return {str(idx): -100.0 for idx, text in texts.items() if any(character.isspace() for character in text)}


def check(arguments: str | None) -> None:
    found = json.loads(arguments or "")
    assert set(found) == {"unit", "day"}
    assert found["unit"] in WEATHER["properties"]["unit"]["enum"]  # type: ignore[index]
    assert found["day"] in WEATHER["properties"]["day"]["enum"]  # type: ignore[index]


@pytest.mark.parametrize("tier", ["economy", "max"])
def test_an_answer_follows_a_json_schema(client: openai.OpenAI, tier: str, no_blanks: Any) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    answer = client.chat.completions.create(
        model=f"tiny:{tier}",
        messages=MESSAGES,
        response_format=form,
        max_tokens=120,
        temperature=0,
        logit_bias=no_blanks,
    )
    check(answer.choices[0].message.content)


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_called_with_arguments_of_its_schema(
    client: openai.OpenAI, stream: bool, no_blanks: Any
) -> None:
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}}]
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    settings: Any = {"model": "tiny:standard", "messages": MESSAGES, "tools": tools, "tool_choice": choice}
    settings |= {"max_tokens": 120, "temperature": 0, "logit_bias": no_blanks}
    if stream:
        calls = [
            call.function
            for chunk in client.chat.completions.create(**settings, stream=True)
            for choice in chunk.choices
            for call in choice.delta.tool_calls or ()
        ]
        assert calls[0].name == "weather"
        check("".join(call.arguments or "" for call in calls))
    else:
        message = client.chat.completions.create(**settings).choices[0].message
        assert message.tool_calls is not None
        assert message.tool_calls[0].function.name == "weather"
        check(message.tool_calls[0].function.arguments)


def test_a_regular_expression_bounds_a_completion(client: openai.OpenAI) -> None:
    extra = {"structured_outputs": {"regex": "(yes|no), [0-9]{2}"}}
    answer = client.completions.create(model="tiny:max", prompt="Is it?", max_tokens=20, extra_body=extra)
    assert answer.choices[0].text.split(", ")[0] in ("yes", "no")


@pytest.mark.parametrize("regex", [r"\p{L}+", "[ab]+"])
def test_each_regular_expression_is_followed_by_a_backend_that_can(client: openai.OpenAI, regex: str) -> None:
    extra = {"structured_outputs": {"regex": regex}}
    answer = client.completions.create(model="tiny:economy", prompt="a", max_tokens=4, extra_body=extra)
    assert answer.choices[0].text.isalpha()


def test_a_grammar_that_takes_too_much_is_refused_while_others_are_served(client: openai.OpenAI) -> None:
    rules = (f"a{idx} ::= a{idx + 1} a{idx + 1} | a{idx + 1}" for idx in range(300))
    extra = {"structured_outputs": {"grammar": "\n".join(["root ::= a0", *rules, 'a300 ::= "x"'])}}

    def ask(**fields: Any) -> Any:
        return client.completions.create(model="tiny:economy", prompt="a", max_tokens=4, timeout=60, **fields)

    with ThreadPoolExecutor() as pool:
        refused = pool.submit(ask, extra_body=extra)
        for _ in range(3):
            assert ask().choices
        with pytest.raises(openai.BadRequestError, match="make it simpler"):
            refused.result()


def test_several_answers_to_several_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=["one", "two"], n=3, max_tokens=4, seed=1, temperature=1)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 24


def test_a_stream_is_the_same_whatever_number_of_tokens_comes_in_an_event(client: openai.OpenAI) -> None:
    settings: Any = {"model": "tiny:standard", "prompt": "Once upon", "max_tokens": 30, "temperature": 0, "logprobs": 2}

    def read(tokens_per_event: int) -> tuple[str, list[float], list[str], int]:
        text, log_p, tokens, num_events = "", list[float](), list[str](), 0
        stream = client.completions.create(
            **settings, stream=True, extra_body={"stream_interval": tokens_per_event, "ignore_eos": True}
        )
        for choice in (choice for chunk in stream for choice in chunk.choices):
            num_events += 1
            text += choice.text
            if choice.logprobs is not None:
                log_p += [value for value in choice.logprobs.token_logprobs or () if value is not None]
                tokens += choice.logprobs.tokens or ()
        return text, log_p, tokens, num_events

    one_by_one, joined = read(1), read(7)
    assert joined[0] == one_by_one[0]
    assert joined[1] == pytest.approx(one_by_one[1], abs=1e-4)
    assert joined[2] == one_by_one[2]
    assert len(joined[1]) == 30
    assert joined[3] <= 1 + -(-29 // 7) < one_by_one[3]
