"""The splicer against the slow way: parse every event, change it, write it again; whatever the cuts between pieces."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.serve.gateway.relay.splice import Additions, EventSplicer, read_usage
from chorus.serve.gateway.request.size import Usage
from tests.serve.gateway.scripted import DONE, USAGE, WHOLE, event

POPULATION = {"tier": "max", "members": ["a", "b"], "weights": [0.25, 0.75], "prior_version": 3}
# Text that looks like what the splicer searches for; JSON escapes its quotes and line ends.
tricky = st.sampled_from(
    ['"model":"x"', "data: [DONE]\n\n", '"choices":[]', '"usage":{"prompt_tokens":9}', "\n\n{", "é"]
)
texts = st.lists(st.one_of(st.text(max_size=5), tricky), min_size=1, max_size=6)


def additions(model: str | None) -> Additions:
    return Additions(population=json.dumps(POPULATION).encode(), model=model)


def run(splicer: EventSplicer, pieces: list[bytes]) -> bytes:
    return b"".join(splicer.feed(piece) for piece in pieces)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:stop] for start, stop in pairwise(bounds)]


def objects(stream: bytes) -> list[dict[str, Any]]:
    events = stream.split(b"\n\n")
    assert events[-1] == b""
    return [json.loads(each[6:]) for each in events if each.startswith(b"data: {")]


@given(texts, st.lists(st.integers(0, 10_000), max_size=40), st.sampled_from([None, "tiny:max"]), st.booleans())
def test_splicing_equals_parsing_for_any_chunk_boundaries(
    words: list[str], places: list[int], model: str | None, keep_usage: bool
) -> None:
    events = [event(word) for word in words]
    stream = b": keep-alive\n\n" + b"".join(events) + USAGE + DONE
    splicer = EventSplicer(additions(model), keep_usage=keep_usage)

    out = run(splicer, cut(stream, places))

    expected = objects(b"".join(events) + (USAGE if keep_usage else b""))
    expected[0]["population"] = POPULATION
    for body in expected:
        body["model"] = model or "tiny"
    assert objects(out) == expected
    assert out.endswith(DONE)
    assert splicer.done
    assert splicer.usage == Usage(prompt_tokens=4, completion_tokens=3)


@given(texts, st.lists(st.integers(0, 10_000), max_size=40), st.integers(0, 10_000))
def test_a_stream_that_breaks_off_anywhere_leaves_only_whole_events(
    words: list[str], places: list[int], end: int
) -> None:
    stream = b"".join(event(word) for word in words) + USAGE + DONE
    broken = stream[: end % len(stream)]
    splicer = EventSplicer(additions("tiny:max"), keep_usage=True)

    out = run(splicer, cut(broken, places))

    assert len(objects(out)) == broken.replace(DONE, b"").count(b"\n\n")
    assert not splicer.done


def test_an_event_that_needs_nothing_passes_as_the_same_bytes() -> None:
    splicer = EventSplicer(additions(None), keep_usage=False)
    splicer.feed(event("a"))
    second = event("b")
    assert splicer.feed(second) is second


def test_a_whole_answer_gets_the_population_and_the_name_that_was_asked_for() -> None:
    spliced = json.loads(additions("tiny:max").splice(WHOLE))
    assert spliced == {**json.loads(WHOLE), "population": POPULATION, "model": "tiny:max"}
    assert read_usage(WHOLE) == Usage(prompt_tokens=4, completion_tokens=3)


@pytest.mark.parametrize("body", [b'{"a":1}', b'{"usage":null}', b'{"text":"\\"usage\\":{\\"prompt_tokens\\":5}"}'])
def test_no_usage_is_read_where_there_is_none(body: bytes) -> None:
    assert read_usage(body) is None


def test_an_empty_object_stays_json() -> None:
    assert json.loads(additions(None).splice(b"{}")) == {"population": POPULATION}


@pytest.mark.parametrize("text", ['","usage":{"prompt_tokens":9,"completion_tokens":9}', "a", "{}", "}\\"])
def test_counts_are_taken_out_of_events_and_never_out_of_text(text: str) -> None:
    usage = {
        "prompt_tokens": 4,
        "total_tokens": 5,
        "completion_tokens": 1,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    splicer = EventSplicer(additions(None), keep_usage=False, has_running_usage=True)
    found = objects(splicer.feed(event(text, usage=usage)))
    assert [each["choices"][0]["text"] for each in found] == [text]
    assert "usage" not in found[0]
    assert splicer.usage_so_far(1) == Usage(prompt_tokens=4, completion_tokens=1)
