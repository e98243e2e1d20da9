"""Structured output at the gateway: what is too large is refused, and so is what a key may not use."""

import json
from typing import Any

import pytest

from chorus.population.manifest import Population
from chorus.serve.gateway.request.constraints import check_constraints, repetitions
from chorus.serve.gateway.request.errors import ApiError
from tests.serve.gateway.conftest import gateway_before
from tests.serve.gateway.scripted import ScriptedEngine
from tests.serve.gateway.test_keys import ALICE, entry, guarded, post


def form(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def tools(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}], **fields}


def outputs(**fields: Any) -> dict[str, Any]:
    return {"structured_outputs": fields}


def pattern(text: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"type": "string", "pattern": text}}}


DOUBLING = "\n".join(["root ::= a0", *(f"a{idx} ::= a{idx + 1} a{idx + 1} | a{idx + 1}" for idx in range(2000))])
WIDE = {"type": "object", "properties": {f"p{idx}": {} for idx in range(2_001)}}
VALUES = [f"v{idx}" for idx in range(5_001)]
REPEATED = "(a|b){1,5000}"
NESTED = "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"
TAG = {"type": "structural_tag", "format": {"type": "regex", "pattern": REPEATED}}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        (outputs(grammar=DOUBLING), "structured_outputs", "characters"),
        (outputs(grammar="\n".join(f"a{idx} ::= b" for idx in range(501))), "structured_outputs", "501 rules"),
        (outputs(grammar='root ::= "a"{1,5000}'), "structured_outputs", "5,000 times"),
        (outputs(regex=REPEATED), "structured_outputs", "5,000 times"),
        (outputs(regex=NESTED), "structured_outputs", "10,000,000,000 times"),
        (outputs(regex="a" * 5_000), "structured_outputs", "5,000 characters"),
        (outputs(choice=VALUES), "structured_outputs", "5,000 values"),
        (outputs(json=WIDE), "structured_outputs", "2,000 properties"),
        (outputs(json=json.dumps(WIDE)), "structured_outputs", "2,000 properties"),
        (outputs(json=json.dumps({"enum": ["a" * 130_000]})), "structured_outputs", "120,000 characters"),
        (outputs(structural_tag=json.dumps(TAG)), "structured_outputs", "5,000 times"),
        (outputs(json=[[]] * 30_000), "structured_outputs", "20,000 nodes"),
        (form({"enum": VALUES}), "response_format", "5,000 values"),
        (form(pattern(REPEATED)), "response_format", "5,000 times"),
        (form({"type": "object", "patternProperties": {REPEATED: {}}}), "response_format", "5,000 times"),
        ({"response_format": TAG}, "response_format", "5,000 times"),
        ({"text": {"format": {"type": "json_schema", "schema": pattern(REPEATED)}}}, "text", "5,000 times"),
        ({"output_config": {"format": {"type": "json_schema", "schema": WIDE}}}, "output_config", "2,000 properties"),
        (tools(pattern(REPEATED)), "tools", "5,000 times"),
        (tools(WIDE, tool_choice="required"), "tools", "2,000 properties"),
    ],
)
def test_what_is_too_large_is_refused_and_named(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(ApiError, match=says) as error:
        check_constraints(fields, is_allowed=True)
    assert (error.value.status, error.value.code, error.value.param) == (400, "constraint_too_large", param)


@pytest.mark.parametrize(
    ("fields", "is_constrained"),
    [
        ({"prompt": "a"}, False),
        ({"response_format": {"type": "text"}}, False),
        ({"response_format": None, "structured_outputs": None, "tools": None, "guided_json": None}, False),
        (tools(pattern("[a-z]{1,10}")), False),
        (tools({}, tool_choice="auto"), False),
        (tools({}, tool_choice={"type": "auto"}), False),
        (tools({}, tool_choice={"type": "any"}), True),
        (tools({}, tool_choice="required"), True),
        (tools({}, tool_choice={"type": "function", "function": {"name": "f"}}), True),
        ({"response_format": {"type": "json_object"}}, True),
        (outputs(json_object=True), True),
        (outputs(regex=r"\d{4}-\d{2}"), True),
        (outputs(choice=["yes", "no"]), True),
        (form({"type": "object", "properties": {"pattern": {"type": "string", "maxLength": 100_000}}}), True),
        (form({"description": "long " * 100_000}), True),
        (form({"properties": {"enum": {"enum": [1, None, "a"]}, "grammar": {"$ref": "#"}}}), True),
    ],
)
def test_what_is_usual_passes(fields: dict[str, Any], is_constrained: bool) -> None:
    assert check_constraints(fields, is_allowed=True) is is_constrained
    if is_constrained:
        with pytest.raises(ApiError) as error:
            check_constraints(fields, is_allowed=False)
        assert (error.value.status, error.value.code) == (403, "structured_output_not_allowed")
    else:
        check_constraints(fields, is_allowed=False)


@pytest.mark.parametrize("kind", ["json", "regex", "choice", "grammar"])
def test_fields_that_vllm_no_longer_heeds_are_refused_rather_than_ignored(kind: str) -> None:
    with pytest.raises(ApiError, match=f"use structured_outputs: {{'{kind}'") as error:
        check_constraints({f"guided_{kind}": "a"}, is_allowed=True)
    assert error.value.status == 400


@pytest.mark.parametrize(
    ("regex", "most"),
    [
        ("abc", 1),
        (r"\d{4}-\d{2}", 4),
        ("a{3}{4}", 12),
        ("a{2}(b{3}c){4}", 12),
        ("((a)b{2}){3}d{4}", 6),
        ("x{,7}", 7),
        ("x{7,}", 7),
        (r"\{50\}[{]{2}", 2),
        (r"[^\]{9}]{5}", 5),
        (")){3}((", 3),
        ("a{" + "9" * 5000 + "}", 999_999_999_999),
        ("{", 1),
    ],
)
def test_repetitions_in_groups_multiply(regex: str, most: int) -> None:
    assert repetitions(regex) == most


def test_a_key_may_be_kept_from_structured_output(tiny: Population) -> None:
    with guarded(tiny, entry("alice", ALICE, structured_outputs=False)) as pair:
        refused = post(pair, **outputs(regex="a"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "structured_output_not_allowed")
        assert not pair.engine.bodies
        assert post(pair).status_code == 200


def test_an_engine_that_is_well_is_not_held_to_fail_on_grammars(tiny: Population) -> None:
    engine = ScriptedEngine([b'{"error":{"message":"FSM at /usr/lib","code":500}}'])
    engine.status, engine.content_type = 500, "application/json"
    with gateway_before(engine, tiny) as pair:
        for stream in (True, False) * 3:
            answer = post(pair, None, stream=stream, **outputs(regex="a"))
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "structured_output_failed")
        engine.steps, engine.status = [b'data: {"error":{"message":"FSM","code":500}}\n\ndata: [DONE]\n\n'], 200
        engine.content_type = "text/event-stream"
        assert post(pair, None, stream=True, **outputs(regex="a")).status_code == 400
        assert pair.gateway.pool.engines[0].breaker.is_closed
        engine.status, engine.content_type = 500, "text/html"
        for _ in range(3):
            assert post(pair, None).status_code == 500
        assert not pair.gateway.pool.engines[0].breaker.is_closed


def test_a_grammar_that_fails_on_the_way_costs_what_was_asked_for(tiny: Population) -> None:
    with guarded(tiny, entry("alice", ALICE, tokens_per_min=100)) as pair:
        pair.engine.steps, pair.engine.status = [b'{"error":{"message":"FSM","code":500}}'], 500
        assert post(pair, max_tokens=90).status_code == 500
        assert post(pair, max_tokens=90, **outputs(regex="a")).json()["error"]["code"] == "structured_output_failed"
        assert post(pair, max_tokens=90, **outputs(regex="a")).status_code == 429
