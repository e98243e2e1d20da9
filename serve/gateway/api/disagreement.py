"""How much the members of a tier disagree about each token of a text.

One request per member returns its log-probabilities of the text as an echoed prompt. If the tier has just generated the text, most
of it is in the members' caches.

M members, N tokens
"""

import asyncio
import json
import math
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from chorus.population.wire import MEMBER_ARGUMENT
from chorus.serve.gateway.admission.quotas import Bill
from chorus.serve.gateway.engines import upstream
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.relay.context import RequestContext
from chorus.serve.gateway.request.call import Call
from chorus.serve.gateway.request.errors import ApiError, bad_gateway, bad_request
from chorus.serve.gateway.request.size import NO_USAGE, Size, Usage
from chorus.serve.gateway.transport.disconnects import cancel

T = TypeVar("T")

_MIN_LOG_P = -1e4
"""Stands for log 0, which JSON cannot represent."""


def jensen_gaps(log_p_MN: list[list[float]], weights_M: list[float]) -> list[float]:
    """log sum_m w_m p_m - sum_m w_m log p_m of each token (N), in nats, at least 0: the gain of mixing at that token.

    Zero where all members assign the token the same probability. Its mean over a text is the members' mean loss minus the loss of
    their linear pool (the ambiguity of Krogh and Vedelsby 1995, for the log loss).
    """
    gaps = []
    for log_p_M in zip(*log_p_MN, strict=True):
        top = max(log_p_M)
        mixed = top + math.log(
            sum(weight * math.exp(log_p - top) for weight, log_p in zip(weights_M, log_p_M, strict=True))
        )
        mean = sum(weight * log_p for weight, log_p in zip(weights_M, log_p_M, strict=True))
        gaps.append(max(0.0, mixed - mean))
    return gaps


def size_of(call: Call) -> Size:
    """The size of a call that runs its prompt once for each member of its tier.

    Raises:
        ApiError: the prompt is not a list of token ids.
    """
    num_members = len(call.choice.tier.members)
    return Size(
        num_sequences=num_members,
        num_prompts=num_members,
        prompt_tokens=len(_token_ids(call)) * num_members,
        max_tokens=1,
    )


async def measure(call: Call, context: RequestContext, bill: Bill) -> dict[str, Any]:
    """The gaps of a prompt of token ids, at the call's tier; None for the first token.

    Admitted like other requests, and charged as one prompt per member of the tier.

    Raises:
        ApiError: the prompt is not a list of token ids, or as `Relay`.
    """
    tokens, tier = _token_ids(call), call.choice.tier
    size = size_of(call)
    max_sequences = context.admission.limits.max_sequences
    call = replace(call, size=replace(size, num_sequences=min(size.num_sequences, max_sequences)))
    async with context.admission.admitted(call, context.tenant, [tier], arrived_at=context.record.began_at) as grant:
        bill.used = None
        try:
            log_p_MN = await _gather_or_cancel(
                [_log_probabilities(context, grant.engine, member, tokens) for member in tier.members]
            )
        except ApiError:
            bill.used = NO_USAGE
            raise
        bill.used = Usage(prompt_tokens=size.prompt_tokens, completion_tokens=len(tier.members))
    return {
        "tier": tier.name,
        "members": tier.members,
        "weights": tier.weights,
        "disagreement_nats": [None, *jensen_gaps(log_p_MN, list(tier.weights))],
        "logprobs": [[None, *log_p_N] for log_p_N in log_p_MN],
    }


async def _gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; if one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            await cancel(task)


def _token_ids(call: Call) -> list[int]:
    prompt = json.loads(call.fields)["prompt"]
    if isinstance(prompt, list) and len(prompt) >= 2 and all(type(token) is int for token in prompt):
        return prompt
    raise bad_request(
        "`prompt` must be a list of two or more token ids: get them from /tokenize, or from an answer to a request with "
        "`return_token_ids`.",
        code="invalid_value",
        param="prompt",
    )


async def _log_probabilities(context: RequestContext, engine: Engine, member: str, tokens: list[int]) -> list[float]:
    """A member's log-probabilities of all tokens but the first.

    The last token is generated, as the only one allowed, rather than echoed: a prompt must be shorter than the engine's context.
    """
    body = {
        "model": context.offer.population.name,
        "prompt": tokens[:-1],
        "echo": True,
        "logprobs": 0,
        "max_tokens": 1,
        "allowed_token_ids": tokens[-1:],
        "ignore_eos": True,
        "temperature": 0,
        "vllm_xargs": {MEMBER_ARGUMENT: member},
    }
    data, path = json.dumps(body).encode(), "/v1/completions"
    answer = await upstream.fetch(context.session, engine, path, data, context.headers, limit_s=context.stall_timeout_s)
    try:
        found = json.loads(answer)["choices"][0]["logprobs"]["token_logprobs"][1:]
        if len(found) != len(tokens) - 1:
            raise ValueError(f"{len(found)} log-probabilities")
        return [min(0.0, max(_MIN_LOG_P, float(log_p))) for log_p in found]
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        message = f"the engine did not return the log-probabilities of {len(tokens) - 1} tokens ({error})."
        raise bad_gateway(message) from None
