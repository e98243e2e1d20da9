"""Losses as a running engine gives them: echoed prompt log-probabilities through its OpenAI API, a window of tokens at a time.

It speaks to `chorus serve` (the gateway, a tier by its model name) and to `chorus engine serve` or `vllm serve` of a population (a
tier or a member in `vllm_xargs`). A gateway answers with tiers only: which members run is not its clients' choice.
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

_IN_FLIGHT = 8  # requests at once: enough to fill an engine's batches, few enough to be a polite guest
_TIMEOUT_S = 600.0
_NO_TIER = "chorus.no-such-tier"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A server that answers for a population's tiers."""

    url: str
    model: str
    is_gateway: bool

    def request(self, tier: str) -> dict[str, JsonValue]:
        """The part of a request that names the tier."""
        if self.is_gateway:
            return {"model": f"{self.model}:{tier}"}
        return {"model": self.model, "vllm_xargs": {"chorus_tier": tier}}

    def request_member(self, member: str) -> dict[str, JsonValue]:
        """The part of a request that names one member.

        Raises:
            ChorusError: this is a gateway.
        """
        if self.is_gateway:
            raise ChorusError(
                f"{self.url} is a gateway, which answers with tiers only. Give the address of an engine: the one that the gateway "
                "names when it starts, or that of `chorus engine serve`."
            )
        return {"model": self.model, "vllm_xargs": {"chorus_member": member}}


def connect(url: str, population: Population) -> Engine:
    """Find out what listens at `url`, with or without `/v1`.

    Raises:
        ChorusError: nobody answers, or what answers does not serve this population's tiers.
    """
    url = url.rstrip("/").removesuffix("/v1")
    if urlsplit(url).scheme not in ("http", "https"):
        raise ChorusError(f"{url!r} is not the address of an engine: give it like http://127.0.0.1:8000.")
    models = [str(card["id"]) for card in _call(url, "models")["data"]]
    if population.name in models and all(f"{population.name}:{tier.name}" in models for tier in population.tiers):
        return Engine(url=url, model=population.name, is_gateway=True)
    if any(":" in model for model in models):
        tiers = ", ".join(tier.name for tier in population.tiers)
        raise ChorusError(
            f"{url} serves {', '.join(models)}; expected were {population.name!r} and its tiers {tiers}. "
            "Serve this directory there, or give the directory that is served."
        )
    engine = Engine(url=url, model=models[0], is_gateway=False)
    try:  # a server that does not know tiers would ignore the name and answer with something else
        _call(url, "completions", {**engine.request(_NO_TIER), "prompt": [0, 0], "max_tokens": 1})
    except ChorusError as error:
        if _NO_TIER in str(error):
            return engine
        raise
    raise ChorusError(f"{url} serves {engine.model!r}, which is not a population. Give the address of `chorus serve`.")


def engine_losses(
    engine: Engine,
    who: dict[str, JsonValue],
    split: ScoredSplit,
    *,
    progress: Callable[[int], None] | None = None,
) -> FloatArray:
    """-log p of every scored token of `split` (N), nats, in the order of a row of likelihoods.

    `who` answers is the part of a request that `Engine.request` or `Engine.request_member` gives.

    An engine takes prompts shorter than its context only. So the last token of a window is not echoed but generated: it is the only
    one that may be drawn, and its log-probability is that of the mixture before this restriction. `progress` is called with the
    number of tokens that each answer scores.

    Raises:
        ChorusError: the engine refuses, or answers with other tokens than it was asked for.
    """
    losses_N = np.full(split.num_scored, np.nan)

    def score(window: tuple[int, int]) -> int:
        start, stop = window
        log_p = np.array(_ask(engine, who, split.split.tokens[start:stop].tolist()))
        columns = split.columns[start + 1 : stop]
        losses_N[columns[columns >= 0]] = -log_p[columns >= 0]
        return int((columns >= 0).sum())

    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        for count in pool.map(score, split.windows):
            if progress is not None:
                progress(count)
    return losses_N


def _ask(engine: Engine, who: dict[str, JsonValue], tokens: list[int]) -> list[float]:
    """Log-probabilities of all tokens but the first."""
    answer = _call(
        engine.url,
        "completions",
        {
            **who,
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
            f"{engine.url} answered {len(log_p)} log-probabilities for {len(tokens) - 1} tokens, or generated another token than "
            "the one it was allowed: it cannot be used to count losses."
        )
    return log_p


def generate(engine: Engine, tier: str, prompt: list[int], num_tokens: int) -> None:
    """Have the engine generate exactly `num_tokens` after a prompt, and wait for them.

    Raises:
        ChorusError: the engine refuses, or generates another number of tokens.
    """
    body: dict[str, JsonValue] = {
        "prompt": list(prompt),
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    made = _call(engine.url, "completions", {**engine.request(tier), **body})["usage"]["completion_tokens"]
    if made != num_tokens:
        raise ChorusError(f"{engine.url} generated {made} tokens where {num_tokens} were asked for.")


def _call(url: str, path: str, body: dict[str, JsonValue] | None = None) -> Any:
    headers = {"content-type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(
        f"{url}/v1/{path}", None if body is None else json.dumps(body).encode(), headers=headers
    )
    is_here = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")  # no proxy stands between us and ourselves
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_here else []))
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ChorusError(f"{url} refuses with status {error.code}: {_message(error.read())}") from None
    except (OSError, json.JSONDecodeError) as error:
        raise ChorusError(f"{url} does not answer as an OpenAI API ({error}). Is an engine running there?") from None


def _message(body: bytes) -> str:
    try:
        found = json.loads(body)
        return str(found["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500]
