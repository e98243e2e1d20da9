"""From what a client sent to what the engine gets."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chorus.population.manifest import Population
from chorus.serve.gateway.request.call import CallFields, Kind, read_call
from chorus.serve.gateway.request.errors import ApiError
from chorus.serve.gateway.request.tiers import default_tier


def read(population: Population, body: bytes | dict[str, Any], kind: Kind = "completion") -> dict[str, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    forwarded = json.loads(read_call(raw, kind, population, default_tier(population)).body())
    assert isinstance(forwarded, dict)
    return forwarded


def test_our_fields_are_taken_out_and_the_tier_put_in(tiny: Population) -> None:
    forwarded = read(tiny, {"prompt": "a", "budget": 2, "model": "tiny:standard", "temperature": 0.5, "new_field": [1]})
    assert forwarded == {
        "prompt": "a",
        "model": "tiny",
        "temperature": 0.5,
        "new_field": [1],
        "vllm_xargs": {"chorus_tier": "standard"},
    }


def test_other_extra_arguments_pass(tiny: Population) -> None:
    forwarded = read(tiny, {"prompt": "a", "vllm_xargs": {"session_id": "s", "k": [1, 2.5]}})
    assert forwarded["vllm_xargs"] == {"session_id": "s", "k": [1, 2.5], "chorus_tier": "max"}


def test_decoding_goes_to_the_engine_as_an_extra_argument(tiny: Population) -> None:
    forwarded = read(tiny, {"prompt": "a", "decoding": "sampled", "vllm_xargs": {"k": 1}})
    assert forwarded["vllm_xargs"] == {"k": 1, "chorus_decoding": "sampled", "chorus_tier": "max"}
    assert "decoding" not in forwarded
    with pytest.raises(ApiError, match="decoding"):
        read(tiny, {"prompt": "a", "decoding": "lazy"})


@pytest.mark.parametrize("name", CallFields.model_fields)
def test_every_field_of_the_wrong_type_is_refused_by_name(tiny: Population, name: str) -> None:
    with pytest.raises(ApiError) as refused:
        read(tiny, {"prompt": "a", name: {"no": 1} if name in ("messages", "tools") else [["no"]]})
    assert (refused.value.status, refused.value.param) == (400, name)


@pytest.mark.parametrize("content", ["hi", [{"type": "text", "text": "hi"}, {"type": "text", "text": "é"}]])
def test_content_of_messages_passes_unchanged(tiny: Population, content: Any) -> None:
    messages = [{"role": "user", "content": content, "name": "x"}]
    assert read(tiny, {"messages": messages}, "chat")["messages"] == messages


def test_usage_is_always_asked_for_in_streams_and_whether_the_client_did_is_noted(tiny: Population) -> None:
    def call(**fields: Any) -> Any:
        return read_call(json.dumps({"prompt": "a", **fields}).encode(), "completion", tiny, default_tier(tiny))

    streaming = call(stream=True)
    counted = {"include_usage": True, "continuous_usage_stats": True}
    assert json.loads(streaming.body())["stream_options"] == counted
    assert not streaming.has_running_usage
    assert not streaming.has_usage
    asked = call(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert json.loads(asked.body())["stream_options"] == counted
    assert asked.has_usage
    assert asked.has_running_usage
    assert "stream_options" not in json.loads(call(stream=False).body())


@pytest.mark.parametrize(
    ("body", "kind", "status", "code", "param"),
    [
        (b"", "completion", 422, "malformed_json", None),
        (b"{", "completion", 422, "malformed_json", None),
        (b"\xff\xfe", "completion", 422, "malformed_json", None),
        (b'{"prompt": NaN}', "completion", 422, "malformed_json", None),
        (b'{"prompt": "a", "temperature": 1e999}', "completion", 422, "malformed_json", None),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "completion", 422, "malformed_json", None),
        (b'{"a":' * 100_000, "completion", 422, "malformed_json", None),
        (b"[]", "completion", 400, "body_not_an_object", None),
        (b'"x"', "completion", 400, "body_not_an_object", None),
        (b"null", "chat", 400, "body_not_an_object", None),
        (b"{}", "completion", 400, "empty", "prompt"),
        (b'{"prompt": ""}', "completion", 400, "empty", "prompt"),
        (b'{"prompt": null}', "completion", 400, "empty", "prompt"),
        (b'{"prompt": []}', "completion", 400, "empty", "prompt"),
        (b'{"prompt": ["a", ""]}', "completion", 400, "empty", "prompt"),
        (b'{"prompt": [[1], []]}', "completion", 400, "empty", "prompt"),
        (b"{}", "chat", 400, "empty", "messages"),
        (b'{"messages": []}', "chat", 400, "empty", "messages"),
        (b'{"prompt": "a", "budget": true}', "completion", 400, "invalid_value", "budget"),
        (b'{"prompt": "a", "budget": 2.0}', "completion", 400, "invalid_value", "budget"),
        (b'{"prompt": "a", "budget": [2]}', "completion", 400, "invalid_value", "budget"),
        (b'{"prompt": "a", "model": 7}', "completion", 400, "invalid_value", "model"),
        (b'{"prompt": "a", "stream": "yes"}', "completion", 400, "invalid_value", "stream"),
        (b'{"prompt": "a", "stream_options": 1}', "completion", 400, "invalid_value", "stream_options"),
        (b'{"prompt": "a", "vllm_xargs": "x"}', "completion", 400, "invalid_value", "vllm_xargs"),
        (b'{"prompt": "\\ud800"}', "completion", 400, "invalid_value", None),
    ],
)
def test_bad_bodies_are_refused(
    tiny: Population, body: bytes, kind: Kind, status: int, code: str, param: str | None
) -> None:
    with pytest.raises(ApiError) as error:
        read(tiny, body, kind)
    assert (error.value.status, error.value.code, error.value.param) == (status, code, param)


@pytest.mark.parametrize("key", ["chorus_tier", "chorus_members", "chorus_weights", "chorus_", "CHORUS_TIER"])
@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_members_and_weights_cannot_be_smuggled_past_the_gateway(tiny: Population, key: str, kind: Kind) -> None:
    body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "vllm_xargs": {key: [1], "session_id": "s"}}
    with pytest.raises(ApiError, match=key) as error:
        read(tiny, body, kind)
    assert error.value.status == 400


def test_a_field_given_twice_cannot_hide_one_from_the_check(tiny: Population) -> None:
    hidden = b'{"prompt": "a", "vllm_xargs": {"chorus_tier": "max"}, "vllm_xargs": {"a": 1}, "budget": 1}'
    assert read(tiny, hidden)["vllm_xargs"] == {"a": 1, "chorus_tier": "economy"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    *("prompt", "messages", "model", "budget", "stream", "stream_options", "vllm_xargs", "n", "max_tokens"),
    *("latency_budget_ms", "on_deadline", "min_budget", "max_completion_tokens"),
]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # which a loaded machine is
@given(st.dictionaries(st.sampled_from(FIELDS), json_values), st.sampled_from(["completion", "chat"]))
def test_any_body_is_either_refused_or_reaches_the_engine_with_the_gateways_tier(
    tiny: Population, body: dict[str, Any], kind: Kind
) -> None:
    status = None
    try:
        forwarded = read(tiny, body, kind)
    except ApiError as error:
        status = error.status
    if status is not None:
        assert status in {400, 404, 422}
        return
    assert forwarded["vllm_xargs"]["chorus_tier"] in {"economy", "standard", "max"}
    assert forwarded["model"] == "tiny"
    assert not {"budget", "latency_budget_ms", "on_deadline", "min_budget"} & forwarded.keys()
