"""Bound requested structured output before an engine gets it: large schemas and grammars take an engine seconds to compile.

The bounds are near OpenAI's where it has one. No bound on size predicts how long a grammar takes, so engines first try what passes
here in a separate process (`serve/engine/grammars.py`).
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from chorus.serve.gateway.request.errors import ApiError, bad_request

MAX_CHARACTERS = {"regex": 4_096, "grammar": 32_768}
MAX_RULES = 500
"""Most rules in a grammar."""
MAX_REPETITIONS = 2_000
"""Most repetitions of any part of a regular expression or grammar; in a regular expression, nested groups multiply."""
SCHEMA_LIMITS = {"properties": 2_000, "values": 5_000, "characters": 120_000, "nodes": 20_000}
"""Totals over all schemas in a field. Values are those of `enum`s, characters those of names, values and patterns."""
_REMOVED_FIELDS = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}
"""Fields that vLLM now ignores, and their names in `structured_outputs`."""
_ANNOTATIONS = ("title", "description", "$comment", "examples", "default")
_RULE = re.compile(r"::=|^\s*[?!]?[a-zA-Z_]\w*\s*:", re.MULTILINE)
_QUANTIFIER = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")


def check_constraints(fields: Mapping[str, Any], *, is_allowed: bool) -> bool:
    """Whether the answer must follow a schema or a grammar.

    Raises:
        ApiError: 400 if that is malformed, too large, or in a field that vLLM ignores; 403 if it is not allowed.
    """
    for name, kind in _REMOVED_FIELDS.items():
        if fields.get(name) is not None:
            raise bad_request(
                f"{name} is no longer supported; use structured_outputs: {{{kind!r}: ...}}.",
                code="unsupported_field",
                param=name,
            )
    is_constrained = False
    for param, kind, value in _constraints(fields):
        if not is_allowed:
            raise ApiError(
                403,
                f"this API key may not use structured output; leave out {param}.",
                code="structured_output_not_allowed",
                param=param,
            )
        is_constrained = True
        _check(param, kind, value)
    for name in ("tools", "functions"):
        if fields.get(name):
            _check_schema(name, fields[name])
    return is_constrained


def _constraints(fields: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """The field, kind and value of each constraint."""
    text, config = fields.get("text"), fields.get("output_config")
    forms = {
        "response_format": fields.get("response_format"),
        "text": text.get("format") if isinstance(text, dict) else None,
        "output_config": config.get("format") if isinstance(config, dict) else None,
    }
    for param, form in forms.items():
        if isinstance(form, dict) and form.get("type") not in (None, "text"):
            yield param, "json", form
    requested = fields.get("structured_outputs")
    if isinstance(requested, dict):
        for kind, value in requested.items():
            if value is not None and value is not False:
                yield "structured_outputs", kind, value
    choice = fields.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") in ("none", "auto"):
        return  # the form of Anthropic's API
    if fields.get("tools") and choice not in (None, "none", "auto"):
        yield "tool_choice", "tool", None  # its schemas are those of the tools, which are checked separately


def _check(param: str, kind: str, value: Any) -> None:
    match kind, value:
        case "regex" | "whitespace_pattern", str():
            _check_regex(param, value)
        case "grammar", str():
            _check_grammar(param, value)
        case "choice", list():
            _check_schema(param, {"enum": value})
        case "json" | "structural_tag", str():
            _check_length(param, "schema", value, 2 * SCHEMA_LIMITS["characters"])
            try:
                _check_schema(param, json.loads(value))
            except (ValueError, RecursionError) as error:
                raise bad_request(f"{param} is not valid JSON: {error}.", code="invalid_value", param=param) from None
        case _:
            _check_schema(param, value)


def _check_schema(param: str, schema: Any) -> None:
    """Bound a JSON schema, or a value that contains schemas."""
    counts = dict.fromkeys(SCHEMA_LIMITS, 0)
    for name, value in _nodes(schema):
        counts["nodes"] += 1
        if isinstance(value, str) and name not in _ANNOTATIONS:
            counts["characters"] += len(value)
        match name, value:
            case "properties" | "patternProperties" | "$defs" | "definitions", dict():
                counts["properties"] += len(value)
                counts["characters"] += sum(map(len, value))
                if name == "patternProperties":
                    for pattern in value:
                        _check_regex(param, pattern)
            case "enum", list():
                counts["values"] += len(value)
            case "pattern", str():
                _check_regex(param, value)
            case "grammar", str():
                _check_grammar(param, value)
        for what, limit in SCHEMA_LIMITS.items():
            if counts[what] > limit:
                raise _too_large(param, f"its schemas have more than {limit:,} {what}")


def _nodes(schema: Any) -> Iterator[tuple[str, Any]]:
    """Every value in `schema`, with the name of its field."""
    pending = [("", schema)]
    while pending:
        name, value = pending.pop()
        yield name, value
        if isinstance(value, dict):
            pending.extend(value.items())
        elif isinstance(value, list):
            pending.extend((name if isinstance(part, str) else "", part) for part in value)


def _check_regex(param: str, pattern: str) -> None:
    _check_length(param, "regular expression", pattern, MAX_CHARACTERS["regex"])
    if (found := repetitions(pattern)) > MAX_REPETITIONS:
        raise _too_large(
            param,
            f"the regular expression {pattern[:60]!r} repeats a part {found:,} times; at most {MAX_REPETITIONS:,}",
        )


def _check_grammar(param: str, grammar: str) -> None:
    _check_length(param, "grammar", grammar, MAX_CHARACTERS["grammar"])
    if (found := len(_RULE.findall(grammar))) > MAX_RULES:
        raise _too_large(param, f"the grammar has {found:,} rules; at most {MAX_RULES:,}")
    for match in _QUANTIFIER.finditer(grammar):
        if (found := _max_count(match)) > MAX_REPETITIONS:
            raise _too_large(param, f"the grammar repeats a part {found:,} times; at most {MAX_REPETITIONS:,}")


def _check_length(param: str, what: str, text: str, limit: int) -> None:
    if len(text) > limit:
        raise _too_large(param, f"the {what} has {len(text):,} characters; at most {limit:,}")


def repetitions(pattern: str) -> int:
    """The most often that any part of a regular expression may repeat, by its counted quantifiers.

    A group's quantifier multiplies those of its parts; `*` and `+`, which have no bound, count once.
    """
    inner, outer = 1, list[int]()  # most repetitions in the current group, and in those around it
    last = 1
    at, in_class = 0, False
    while at < len(pattern):
        sign = pattern[at]
        if sign == "\\":
            at, last = at + 2, 1
            continue
        if in_class:
            in_class = sign != "]"
            last = 1
        elif sign == "[":
            in_class = True
        elif sign == "(":
            outer.append(inner)
            inner = last = 1
        elif sign == ")":
            last = inner
            inner = max(outer.pop() if outer else 1, inner)
        elif sign == "{" and (match := _QUANTIFIER.match(pattern, at)):
            last *= max(1, _max_count(match))
            inner = max(inner, last)
            at = match.end()
            continue
        else:
            last = 1
        at += 1
    return max([inner, *outer])


def _max_count(match: re.Match[str]) -> int:
    return max(int(number[:12]) for number in (match[1] or "0", match[2] or "0"))


def _too_large(param: str, message: str) -> ApiError:
    return bad_request(f"{param} is too large: {message}.", code="constraint_too_large", param=param)
