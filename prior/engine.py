"""Losses from a running server: echoed prompt log-probabilities through its OpenAI API, one window of tokens per request.

Works with `chorus serve` (a gateway: the model name selects the tier) and with `chorus engine serve` or `vllm serve` (an engine:
`vllm_xargs` selects a tier or a member). A gateway offers tiers only: clients must not choose members.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from pydantic import JsonValue

from chorus.population.errors import ChorusError
from chorus.population.manifest import Population
from chorus.prior.quadratic import FloatArray
from chorus.prior.splits import ScoredSplit

_MAX_IN_FLIGHT = 8  # enough to fill an engine's batches, few enough to leave room for other clients
_TIMEOUT_S = 600.0
_UNKNOWN_TIER = "chorus.no-such-tier"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A server of a population: an engine, or a gateway in front of one."""

    url: str
    model: str
    is_gateway: bool

    def request(self, tier: str) -> dict[str, JsonValue]:
        """The request fields that select a tier."""
        if self.is_gateway:
            return {"model": f"{self.model}:{tier}"}
        return {"model": self.model, "vllm_xargs": {"chorus_tier": tier}}

    def request_member(self, member: str) -> dict[str, JsonValue]:
        """The request fields that select one member.

        Raises:
            ChorusError: the server is a gateway.
        """
        if self.is_gateway:
            raise ChorusError(
                f"{self.url} is a gateway, which offers tiers only. Give the address of an engine: the one that the gateway "
                "prints when it starts, or that of `chorus engine serve`."
            )
        return {"model": self.model, "vllm_xargs": {"chorus_member": member}}


def connect(url: str, population: Population) -> Engine:
    """Detect what runs at `url` (with or without `/v1`): a gateway or an engine.

    Raises:
        ChorusError: the server is unreachable or does not serve this population's tiers.
    """
    url = url.rstrip("/").removesuffix("/v1")
    if urlsplit(url).scheme not in ("http", "https"):
        raise ChorusError(f"{url!r} is not the address of an engine: expected a form like http://127.0.0.1:8000.")
    models = [str(card["id"]) for card in _call(url, "models")["data"]]
    if population.name in models and all(f"{population.name}:{tier.name}" in models for tier in population.tiers):
        return Engine(url=url, model=population.name, is_gateway=True)
    if any(":" in model for model in models):
        tiers = ", ".join(tier.name for tier in population.tiers)
        raise ChorusError(
            f"{url} serves {', '.join(models)}; expected {population.name!r} and its tiers {tiers}. "
            "Serve this directory there, or pass the directory that is being served."
        )
    engine = Engine(url=url, model=models[0], is_gateway=False)
    try:  # only a population's engine rejects an unknown tier; any other server ignores the field and answers
        _call(url, "completions", {**engine.request(_UNKNOWN_TIER), "prompt": [0, 0], "max_tokens": 1})
    except ChorusError as error:
        if _UNKNOWN_TIER in str(error):
            return engine
        raise
    raise ChorusError(f"{url} serves {engine.model!r}, which is not a population. Give the address of `chorus serve`.")


def engine_losses(
    engine: Engine,
    selector: dict[str, JsonValue],
    split: ScoredSplit,
    *,
    progress: Callable[[int], None] | None = None,
) -> FloatArray:
    """-log p of every scored token of `split` (N), in nats, in the order of a row of likelihoods.

    `selector` holds the request fields from `Engine.request` or `Engine.request_member`. `progress` is called with the number of
    tokens scored by each answer.

    A prompt must be shorter than the engine's context. So the last token of a window is generated instead of echoed: it is the only
    token allowed, and its reported log-probability is that of the mixture before this restriction.

    Raises:
        ChorusError: the engine rejects a request, or answers with other tokens than requested.
    """
    losses_N = np.full(split.num_scored, np.nan)

    def score(window: tuple[int, int]) -> int:
        start, stop = window
        log_p = np.array(_window_log_p(engine, selector, split.split.tokens[start:stop].tolist()))
        columns = split.columns[start + 1 : stop]
        losses_N[columns[columns >= 0]] = -log_p[columns >= 0]
        return int((columns >= 0).sum())

    with ThreadPoolExecutor(_MAX_IN_FLIGHT) as pool:
        for count in pool.map(score, split.windows):
            if progress is not None:
                progress(count)
    return losses_N


def _window_log_p(engine: Engine, selector: dict[str, JsonValue], tokens: list[int]) -> list[float]:
    """Log-probabilities of all tokens but the first."""
    answer = _call(
        engine.url,
        "completions",
        {
            **selector,
            "prompt": list(tokens[:-1]),
            "echo": True,
            "max_tokens": 1,
            "logprobs": 0,
            "temperature": 0,
            "allowed_token_ids": [tokens[-1]],
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    choice = answer["choices"][0]
    log_p: list[float] = choice["logprobs"]["token_logprobs"][1:]
    if choice.get("token_ids", [tokens[-1]])[-1] != tokens[-1] or len(log_p) != len(tokens) - 1:
        raise ChorusError(
            f"{engine.url} returned {len(log_p)} log-probabilities for {len(tokens) - 1} tokens, or generated a token other than "
            "the only one allowed: it cannot be used to compute losses."
        )
    return log_p


def generate(engine: Engine, tier: str, prompt: list[int], num_tokens: int) -> None:
    """Generate exactly `num_tokens` after a prompt and wait for them.

    Raises:
        ChorusError: the engine rejects the request, or generates another number of tokens.
    """
    body: dict[str, JsonValue] = {
        "prompt": list(prompt),
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    num_generated = _call(engine.url, "completions", {**engine.request(tier), **body})["usage"]["completion_tokens"]
    if num_generated != num_tokens:
        raise ChorusError(f"{engine.url} generated {num_generated} tokens instead of the requested {num_tokens}.")


def _call(url: str, path: str, body: dict[str, JsonValue] | None = None) -> Any:
    headers = {"content-type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(
        f"{url}/v1/{path}", None if body is None else json.dumps(body).encode(), headers=headers
    )
    is_local = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")  # reached directly, without a proxy
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_local else []))
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ChorusError(f"{url} answered with status {error.code}: {_message(error.read())}") from None
    except (OSError, json.JSONDecodeError) as error:
        raise ChorusError(f"{url} does not answer like an OpenAI API ({error}). Is an engine running there?") from None


def _message(body: bytes) -> str:
    try:
        parsed = json.loads(body)
        return str(parsed["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500]
