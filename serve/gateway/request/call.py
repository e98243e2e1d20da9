"""Turn the bytes of a client's request into a call for an engine: read, check and remove the gateway's own fields."""

import json
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)

from chorus.population.manifest import Decoding, Population, Tier
from chorus.population.wire import (
    BUDGET_ARGUMENT,
    DECODING_ARGUMENT,
    EXPECTED_TOKENS_ARGUMENT,
    FLOOR_ARGUMENT,
    MAX_MEMBERS_ARGUMENT,
    REPORT_ARGUMENT,
    RESERVED_PREFIX,
    TIER_ARGUMENT,
)
from chorus.serve.gateway.request.constraints import check_constraints
from chorus.serve.gateway.request.errors import ApiError, bad_request
from chorus.serve.gateway.request.prefix import Prefix
from chorus.serve.gateway.request.size import Size, read_size, read_text_size
from chorus.serve.gateway.request.tiers import Choice, at_least, choose

OnDeadline = Literal["degrade", "truncate", "fail"]
"""At the deadline: finish late with fewer members, return what there is, or answer 504."""


@dataclass(frozen=True, kw_only=True)
class TimeBudget:
    """The time budget of one request, and what happens when it is over."""

    budget_s: float | None = None
    """Seconds from the request's arrival within which the answer should be complete; None for no limit."""
    on_deadline: OnDeadline = "degrade"

    @property
    def stops_at_deadline(self) -> bool:
        """Whether generation stops at the deadline."""
        return self.budget_s is not None and self.on_deadline != "degrade"


Kind = Literal["completion", "chat", "responses", "messages", "tokens"]
"""What the engine does: complete, chat (in one of three APIs), or turn text into tokens or back, which needs no member."""
INPUTS: dict[Kind, str] = {"completion": "prompt", "chat": "messages", "responses": "input", "messages": "messages"}
"""The field that holds the members' input."""
MAX_TOKENS_PER_EVENT = 64
"""Limit for `stream_interval`: with many more, a stream is silent for so long that its engine seems to hang."""
_EVENT_INTERVAL_S = 1 / 30
"""Longest time for which a token is held back if the gateway chooses the event size."""
_MAX_AUTO_TOKENS_PER_EVENT = 16
"""Most tokens in one event if the gateway chooses."""
MAX_NESTING = 100
"""Deepest nesting of objects and lists: many recursive functions walk a body, here and in the engine."""
MIN_BUDGET_MS, MAX_BUDGET_MS = 1, 24 * 3600 * 1000
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_GATEWAY_FIELDS = ("budget", "latency_budget_ms", "on_deadline", "min_budget", "decoding")
_MAX_COUNT = 2**31 - 1
"""Largest count that a request may give."""
_LONG_INTEGER = re.compile(rb"[0-9]{19}")
"""Enough digits for an integer beyond 64 bits."""


def _to_integer(value: object) -> object:
    """JSON has one number type, so 16.0 counts as the integer 16."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[StrictInt, BeforeValidator(_to_integer)]


_COUNT_FIELDS = ("n", "best_of", "max_tokens", "max_completion_tokens", "max_output_tokens")


class CallFields(BaseModel):
    """The fields of a request that the gateway reads. All others go to the engine unchanged.

    A field that is null counts as absent.
    """

    model_config = ConfigDict(extra="allow")

    model: StrictStr | None = Field(None, description="The population's name, or `NAME:TIER`.")
    budget: StrictStr | StrictInt | None = Field(
        None, description="A tier's name, or the maximum number of members per token."
    )
    latency_budget_ms: float | None = Field(
        None,
        ge=MIN_BUDGET_MS,
        le=MAX_BUDGET_MS,
        strict=True,
        description="Milliseconds from the request's arrival to the end of its answer. The largest tier expected to meet it "
        "answers, up to the requested one.",
    )
    on_deadline: OnDeadline | None = Field(
        None,
        description="What to do at the deadline: `degrade` finishes late with fewer members, `truncate` returns the partial "
        "answer with finish_reason `length`, `fail` answers 504.",
    )
    min_budget: StrictStr | StrictInt | None = Field(
        None,
        description="The smallest tier (or number of members) to which a deadline or a full queue may reduce this request.",
    )
    decoding: Decoding | None = Field(
        None,
        description="How tokens are computed; the distribution is the same. `plain`: all members at every token. `sampled`: one "
        "member per token, drawn by weight, at temperature 1 only. `speculative`: one member drafts, all verify. `auto`: the "
        "fastest of these. A method that would not be exact is refused. Default: the tier's, else `auto`.",
    )
    stream: StrictBool | None = None
    stream_options: dict[str, JsonValue] | None = None
    stream_interval: StrictInt | None = Field(
        None,
        ge=1,
        description=f"Tokens in each event of a stream, at most {MAX_TOKENS_PER_EVENT}; by default as many as are generated in a "
        "thirtieth of a second. The first and last events are never delayed.",
    )
    n: Count | None = Field(None, ge=1, le=_MAX_COUNT, description="Number of choices.")
    best_of: Count | None = Field(
        None, ge=1, le=_MAX_COUNT, description="Number of sequences to generate, if larger than `n`."
    )
    max_tokens: Count | None = Field(None, ge=0, le=_MAX_COUNT, description="Maximum number of tokens of each choice.")
    max_completion_tokens: Count | None = Field(
        None, ge=0, le=_MAX_COUNT, description="Like `max_tokens`, and takes precedence over it."
    )
    max_output_tokens: Count | None = Field(None, ge=0, le=_MAX_COUNT, description="Like `max_tokens`, for Responses.")
    messages: list[Any] | None = None
    tools: list[Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    vllm_xargs: dict[str, JsonValue] | None = Field(
        None,
        description=f"Extra arguments for the engine. Keys that begin with `{RESERVED_PREFIX}` are reserved and refused.",
    )


@dataclass(frozen=True, kw_only=True)
class Call:
    """A checked request, and what to send to an engine for it."""

    kind: Kind = "completion"
    choice: Choice
    floor: Tier
    """The smallest tier that may serve it."""
    time_budget: TimeBudget = field(default_factory=TimeBudget)
    size: Size = field(default_factory=Size)
    fields: bytes
    """The engine's fields as a JSON object, without `vllm_xargs`."""
    extra: dict[str, JsonValue]
    """The client's `vllm_xargs`, and its choice of decoding."""
    is_served_by_a_tier: bool = True
    is_constrained: bool = False
    """Whether the answer must follow a schema or a grammar, which may be what an engine fails on."""
    streams: bool = False
    """Whether the client gets a stream."""
    streams_from_engine: bool = False
    """Whether the engine streams: also for a whole answer that may end at a deadline, to have what was generated by then."""
    tokens_per_event: int | None = 1
    """Tokens in each event of a stream; None if the gateway chooses."""
    has_usage: bool = True
    """False if the client streams without requesting usage: the gateway then keeps the usage event to itself."""
    has_running_usage: bool = False
    """Whether each event of the client's stream carries the usage so far."""
    has_offsets: bool = False
    """Whether the answer echoes the prompt and gives the offsets of its tokens."""
    prefix: Prefix = field(default_factory=Prefix, compare=False)

    def event_size(self, token_s: float) -> int:
        """Tokens in each event of its stream, if one token is expected to take `token_s` seconds (0 if unknown).

        More than one only if tokens come faster than a reader can follow: each event costs processor time in the engine's server,
        in the gateway and at the client (bench/LOG.md). vLLM's `stream_interval` never holds back the first and the last tokens.
        """
        if self.tokens_per_event is not None:
            return self.tokens_per_event
        return max(1, min(_MAX_AUTO_TOKENS_PER_EVENT, int(_EVENT_INTERVAL_S / token_s))) if token_s > 0 else 1

    def body(
        self,
        tier: Tier | None = None,
        *,
        budget_s: float | None = None,
        floor: Tier | None = None,
        max_members: int | None = None,
        expected_tokens: int | None = None,
        tokens_per_event: int = 1,
        report_prefix: str | None = None,
    ) -> bytes:
        """The engine's request: `tier` answers within `budget_s` of its arrival there, with no fewer members than `floor`.

        With a budget, it begins with at most `max_members` of the tier's members, and the engine expects `expected_tokens` if the
        request names no length. `report_prefix` requests a report; a stream's stop reason begins with it.
        """
        if not self.is_served_by_a_tier:
            return self.fields
        extra = {**self.extra, TIER_ARGUMENT: (tier or self.choice.tier).name}
        if budget_s is not None:
            extra[BUDGET_ARGUMENT] = max(1, round(1000 * budget_s))
            extra[FLOOR_ARGUMENT] = (floor or self.floor).name
            if max_members is not None:
                extra[MAX_MEMBERS_ARGUMENT] = max_members
            if expected_tokens is not None and self.size.is_open:
                extra[EXPECTED_TOKENS_ARGUMENT] = expected_tokens
        if report_prefix is not None:
            extra[REPORT_ARGUMENT] = report_prefix
        added: dict[str, JsonValue] = {"vllm_xargs": extra}
        if tokens_per_event > 1:
            added["stream_interval"] = tokens_per_event
        return _to_json(added)[:-1] + b"," + self.fields[1:]


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        ApiError: 422 if the body is not JSON (NaN and Infinity are not), 400 if it is not an object, nests too deeply, or holds
            unpaired surrogates.
    """
    try:
        parse_int = _parse_int if _LONG_INTEGER.search(body) else None
        text = body.decode(json.detect_encoding(body))
        parsed = json.loads(text, parse_constant=_refuse_constant, parse_int=parse_int)
    except (ValueError, RecursionError) as error:
        raise ApiError(422, f"the body is not valid JSON: {error}.", code="malformed_json") from None
    if not isinstance(parsed, dict):
        raise bad_request(
            f"the body is a JSON {_json_type(parsed)}; send an object with the request's fields.",
            code="body_not_an_object",
        )
    if text.count("[") + text.count("{") > MAX_NESTING and _nests_deeper(parsed, MAX_NESTING):
        raise bad_request(
            f"the body nests objects and lists more than {MAX_NESTING} deep; flatten it.", code="nested_too_deeply"
        )
    if _SURROGATE.search(text):
        _to_json(parsed)
    return parsed


def _nests_deeper(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inside = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [part for parts in inside for part in parts if isinstance(part, dict | list)]
    return bool(level)


def read_call(
    body: bytes,
    kind: Kind,
    population: Population,
    default: Tier,
    tenant_floor: str | None = None,
    *,
    allow_constraints: bool = True,
    session: str | None = None,
) -> Call:
    """Check a request's body and turn it into a call.

    `tenant_floor` is the smallest tier to which its key's requests may fall; `allow_constraints` allows answers that must follow a
    schema or a grammar. `session` is the client's name for a series of requests with a common prefix.

    Raises:
        ApiError: 400, 403, 404 or 422, with what the client must change.
    """
    fields = {key: value for key, value in parse(body).items() if value is not None}
    is_constrained = check_constraints(fields, is_allowed=allow_constraints)
    if kind != "tokens":
        _check_input(fields, kind)
    checked = _validate(fields)
    choice = choose(population, default, model=checked.model, budget=checked.budget)
    _check_extra_arguments(checked.vllm_xargs)

    for key in (*_GATEWAY_FIELDS, "vllm_xargs", "stream_interval"):
        fields.pop(key, None)
    fields |= {
        key: getattr(checked, key) for key in _COUNT_FIELDS if key in fields
    }  # the engine gets the validated counts
    fields["model"] = population.name
    if kind == "tokens":
        extra: dict[str, JsonValue] = {}
        return Call(
            kind=kind,
            choice=choice,
            floor=choice.tier,
            size=read_text_size(fields),
            fields=_to_json(fields),
            extra=extra,
            is_served_by_a_tier=False,
        )
    time_budget = _read_time_budget(checked)
    streams = bool(checked.stream)
    has_tools = bool(fields.get("tools") or fields.get("functions"))
    # vLLM cannot stream beam search. It parses streamed tool calls less well, and `fail` needs no partial answer: no stream then.
    is_cut = time_budget.stops_at_deadline and not fields.get("use_beam_search")
    if streams_from_engine := streams or (is_cut and (time_budget.on_deadline == "truncate" or not has_tools)):
        fields["stream"] = True
    splices = kind in ("completion", "chat")
    if streams_from_engine and splices:
        # An answer that is cut short or abandoned has no last event, so its usage is counted on the way.
        fields["stream_options"] = {
            **{key: value for key, value in (checked.stream_options or {}).items() if value is not None},
            "include_usage": True,
            "continuous_usage_stats": True,
        }
    has_usage = not streams or not splices or bool((checked.stream_options or {}).get("include_usage"))
    has_running_usage = has_usage and bool((checked.stream_options or {}).get("continuous_usage_stats"))
    return Call(
        kind=kind,
        choice=choice,
        floor=_choose_floor(population, choice, checked, tenant_floor),
        time_budget=time_budget,
        size=read_size(fields, kind, population.context_length),
        fields=_to_json(fields),
        extra={**(checked.vllm_xargs or {}), **({DECODING_ARGUMENT: checked.decoding} if checked.decoding else {})},
        is_constrained=is_constrained,
        streams=streams,
        streams_from_engine=streams_from_engine,
        tokens_per_event=_tokens_per_event(checked, time_budget, joins=not has_tools) if splices else 1,
        has_usage=has_usage,
        has_running_usage=has_running_usage,
        has_offsets=kind == "completion" and bool(fields.get("echo")) and "logprobs" in fields,
        prefix=_prefix(fields, kind, session),
    )


def _read_time_budget(checked: CallFields) -> TimeBudget:
    if checked.latency_budget_ms is None:
        if checked.on_deadline is not None:
            raise bad_request(
                f"on_deadline is {checked.on_deadline!r} but there is no deadline; set latency_budget_ms too.",
                code="invalid_value",
                param="on_deadline",
            )
        return TimeBudget()
    return TimeBudget(budget_s=checked.latency_budget_ms / 1000, on_deadline=checked.on_deadline or "degrade")


def _choose_floor(population: Population, choice: Choice, checked: CallFields, tenant_floor: str | None) -> Tier:
    """The smallest tier that may serve it. A requested tier is kept, unless the request also has a time budget or `min_budget`."""
    named = choice.requested != "default"
    if checked.min_budget is not None:
        floor = at_least(population, checked.min_budget)
        if floor.budget > choice.tier.budget:
            raise bad_request(
                f"min_budget {checked.min_budget!r} means tier {floor.name!r}, which is larger than the requested "
                f"tier {choice.tier.name!r}; lower it or raise budget.",
                code="contradictory_budget",
                param="min_budget",
            )
    elif named and checked.latency_budget_ms is None:
        return choice.tier
    else:
        floor = min(population.tiers, key=lambda tier: tier.budget)
    limit = next((tier for tier in population.tiers if tier.name == tenant_floor), floor)
    floor = max(floor, limit, key=lambda tier: tier.budget)
    return min(floor, choice.tier, key=lambda tier: tier.budget)


def _validate(fields: dict[str, Any]) -> CallFields:
    try:
        return CallFields.model_validate({key: fields[key] for key in CallFields.model_fields if key in fields})
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0])
        expected = {
            "model": "a string",
            "budget": "a tier's name or a whole number of members, at least 1",
            "latency_budget_ms": f"a number of milliseconds from {MIN_BUDGET_MS} to {MAX_BUDGET_MS}",
            "on_deadline": "degrade, truncate or fail",
            "min_budget": "a tier's name or a whole number of members, at least 1",
            "decoding": "auto, plain, sampled or speculative",
            "stream": "true or false",
            "stream_options": "an object",
            "stream_interval": "a whole number of tokens, at least 1",
            "vllm_xargs": "an object",
            "messages": "a list",
            "tools": "a list",
            "structured_outputs": "an object",
            "n": f"a whole number of choices, from 1 to {_MAX_COUNT}",
            "best_of": f"a whole number of sequences, from 1 to {_MAX_COUNT}",
            "max_tokens": f"a whole number of tokens, from 0 to {_MAX_COUNT}",
            "max_completion_tokens": f"a whole number of tokens, from 0 to {_MAX_COUNT}",
            "max_output_tokens": f"a whole number of tokens, from 0 to {_MAX_COUNT}",
        }[param]
        raise bad_request(
            f"{param} is {_shorten(fields[param])}; expected {expected}.", code="invalid_value", param=param
        ) from None


def _check_input(fields: dict[str, Any], kind: Kind) -> None:
    if kind in ("chat", "messages"):
        if not fields.get("messages"):
            raise bad_request("messages is empty; send at least one message.", code="empty", param="messages")
        return
    if kind == "responses":
        _check_response(fields)
        return
    if fields.get("prompt_embeds") is not None:
        return  # another form of the prompt, which the engine checks
    prompt = fields.get("prompt")
    parts = prompt if isinstance(prompt, list) and prompt else [prompt]
    are_token_ids = isinstance(parts[0], int)
    if not are_token_ids and any(part is None or part in ("", []) for part in parts):
        raise bad_request(
            "prompt is empty; send a string, a list of strings, or token ids.", code="empty", param="prompt"
        )


def _check_response(fields: dict[str, Any]) -> None:
    if not fields.get("input"):
        raise bad_request("input is empty; send a string or a list of items.", code="empty", param="input")
    for name in ("previous_response_id", "conversation", "background"):
        if fields.get(name):
            raise bad_request(
                f"{name} is {_shorten(fields[name])}, but answers are neither stored nor generated in the background. Send the "
                "whole conversation as input and wait for the answer.",
                code="not_stored",
                param=name,
            )


def _check_extra_arguments(extra: dict[str, JsonValue] | None) -> None:
    if reserved := sorted(key for key in extra or {} if key.lower().startswith(RESERVED_PREFIX)):
        raise bad_request(
            f"vllm_xargs holds {', '.join(reserved)}: keys that begin with {RESERVED_PREFIX!r} are reserved. "
            "Choose the tier with budget and the time with latency_budget_ms.",
            code="reserved_argument",
            param="vllm_xargs",
        )


def _tokens_per_event(checked: CallFields, time_budget: TimeBudget, *, joins: bool) -> int | None:
    """The client's choice if it made one; None if the gateway may choose.

    1 where joining tokens would lose something: text at a deadline, and parts of a tool's arguments, which some of vLLM's parsers
    miss in large pieces (vllm issue 31501).
    """
    if checked.stream and checked.stream_interval is not None:
        return min(checked.stream_interval, MAX_TOKENS_PER_EVENT)
    return None if checked.stream and joins and not time_budget.stops_at_deadline else 1


def _prefix(fields: dict[str, Any], kind: Kind, session: str | None) -> Prefix:
    keys = [session, *(fields.get(name) for name in ("cache_salt", "prompt_cache_key", "user"))]
    before = [fields[name] for name in ("tools", "system", "instructions") if fields.get(name)]
    found = fields.get(INPUTS[kind])
    if isinstance(found, list) and found and not isinstance(found[0], int):
        parts = found[:1] if kind == "completion" else found  # of several prompts the first
    else:
        parts = [found]
    return Prefix(keys=tuple(key for key in keys if isinstance(key, str) and key), parts=(*before, *parts))


def _to_json(fields: dict[str, Any]) -> bytes:
    try:
        return json.dumps(fields, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise bad_request(
            "a string contains an unpaired surrogate; send valid Unicode.", code="invalid_value"
        ) from None
    except ValueError:
        raise ApiError(
            422, "the body is not valid JSON: it contains a number out of range.", code="malformed_json"
        ) from None


def _parse_int(digits: str) -> int:
    if abs(value := int(digits)) >= 2**64:
        raise ValueError(f"a number of {len(digits)} digits is out of range")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _json_type(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]


def _shorten(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
