"""Decoding: `plain` runs all members per token, `sampled` one drawn member, `speculative` verifies drafts of the heaviest member.

`sampled` draws member m with probability w_m, then a token from p_m. A linear mixture at temperature 1 has exactly that law,
sum_m w_m p_m. Other members catch up when they are drawn. The idea: Mixture-model-like Ensemble (arXiv 2605.00419).

`speculative` is exact for any mixture and sampling parameters (Leviathan et al., arXiv 2211.17192). If each draft is accepted
with probability a, a step that verifies k drafts yields (1 - a^(k+1)) / (1 - a) tokens on average.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from chorus.population.manifest import Decoding
from chorus.serve.engine.mixture import Mixture

MAX_DRAFTS = 6
"""Maximum drafts per request and step."""

_GREEDY_BELOW = 1e-5
"""vLLM decodes greedily below this temperature."""
_DECAY, _PRIOR_DRAFTS = 0.98, 4.0
"""Of `Acceptance`: decay of its counts per step, and weight of the prior, in drafts."""
MIN_GAIN = 1.1
"""Minimum expected gain over plain steps. Smaller gains are within noise, and switching has a cost of its own."""


def why_not_sampled(parameters: Any, mixture: Mixture) -> str | None:
    """Why sampling members would not be exact for a request with these `SamplingParams`; None if it is.

    Parameters that reshape or report the distribution need the whole mixture: members' distributions, reshaped one by one, do not
    sum to the reshaped mixture.
    """
    reasons = {
        "the tier uses a log pool": mixture.pool == "log" and len(mixture.members) > 1,
        f"the tier's temperature is {mixture.temperature:g}, not 1": mixture.temperature != 1,
        f"temperature is {parameters.temperature:g}, not 1": parameters.temperature != 1,
        f"top_p is {parameters.top_p:g}, not 1": parameters.top_p != 1,
        f"top_k is {parameters.top_k}": parameters.top_k not in (0, -1),
        f"min_p is {parameters.min_p:g}": parameters.min_p != 0,
        "penalties need the whole mixture": parameters.presence_penalty != 0
        or parameters.frequency_penalty != 0
        or parameters.repetition_penalty != 1,
        "logprobs need the whole mixture": parameters.logprobs is not None,
        "logit_bias needs the whole mixture": bool(parameters.logit_bias),
        "bad_words, allowed_token_ids and min_tokens need the whole mixture": bool(
            parameters.bad_words or parameters.allowed_token_ids or parameters.min_tokens
        ),
        "structured output needs the whole mixture": parameters.structured_outputs is not None,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def why_not_speculative(parameters: Any) -> str | None:
    """Why speculation would not be exact for a request with these `SamplingParams`; None if it is."""
    is_greedy = parameters.temperature < _GREEDY_BELOW
    reasons = {
        f"min_p is {parameters.min_p:g}, and vLLM does not apply it to drafts": parameters.min_p != 0,
        "vLLM does not apply logit_bias to drafts": bool(parameters.logit_bias),
        "vLLM cannot report logprob_token_ids beside drafts": bool(getattr(parameters, "logprob_token_ids", None)),
        "the grammar of structured output cuts drafts off, which changes their distribution": (
            parameters.structured_outputs is not None and not is_greedy
        ),
        "a seed must give the same tokens at any load, but the number of drafts depends on the load": (
            parameters.seed is not None and not is_greedy
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def decoding_of(requested: Decoding | None, parameters: Any, mixture: Mixture) -> Decoding:
    """The decoding of a request: the one `requested`, else its tier's, or `auto` where the tier's would not be exact."""
    if requested is not None:
        return requested
    reasons = {"sampled": why_not_sampled(parameters, mixture), "speculative": why_not_speculative(parameters)}
    return "auto" if reasons.get(mixture.decoding) else mixture.decoding


class MemberDraws:
    """Draws the member that runs for each token of one request."""

    def __init__(self, seed: int | None) -> None:
        """With a seed, a draw depends only on the seed and the token's index."""
        self._seed = seed
        self._random = random.Random()

    def draw(self, mixture: Mixture, token_idx: int) -> Mixture:
        """The one-member mixture for the token at `token_idx`."""
        if self._seed is not None:
            self._random.seed(f"{self._seed}/{token_idx}")
        (member,) = self._random.choices(mixture.members, mixture.weights)
        return _single_member(mixture, member)


@lru_cache(maxsize=1024)
def _single_member(mixture: Mixture, member: int) -> Mixture:
    return Mixture(tier=mixture.tier, members=(member,), weights=(1.0,), pool="linear", temperature=1.0)


def expected_num_members(sampled: Sequence[Mixture], others: Iterable[Sequence[int]]) -> tuple[float, int]:
    """How many members a step is expected to run if the `sampled` requests draw one member each, and how many if they do not.

    `others` are the members of the other requests, which all run. An expectation, because a choice that depended on the actual
    draws would change the law of the tokens.
    """
    certain = {member for members in others for member in members}
    all_members = certain.union(*(mixture.members for mixture in sampled))
    p_idle = dict.fromkeys(all_members - certain, 1.0)
    for mixture in sampled:
        for member, weight in zip(mixture.members, mixture.weights, strict=True):
            if member in p_idle:
                p_idle[member] *= 1 - weight
    return len(all_members) - sum(p_idle.values()), len(all_members)


@lru_cache(maxsize=1024)
def heaviest(mixture: Mixture) -> Mixture:
    """The mixture of only the heaviest member of `mixture`, which drafts for it."""
    member = max(zip(mixture.weights, mixture.members, strict=True))[1]
    return replace(mixture, members=(member,), weights=(1.0,), pool="linear")


@dataclass(slots=True)
class Acceptance:
    """Decayed counts of accepted and rejected drafts. Drafts after the first rejection of a step count as neither."""

    accepted: float = 0.0
    rejected: float = 0.0

    def observe(self, drafted: int, accepted: int) -> None:
        """Count a step that verified `drafted` drafts and accepted the first `accepted` of them."""
        self.accepted = self.accepted * _DECAY + accepted
        self.rejected = self.rejected * _DECAY + (accepted < drafted)

    def rate(self, prior: float) -> float:
        """The probability that the next draft is accepted, where `prior` weighs as much as `_PRIOR_DRAFTS` observed drafts."""
        return (self.accepted + _PRIOR_DRAFTS * prior) / (self.accepted + self.rejected + _PRIOR_DRAFTS)


@dataclass(slots=True)
class Work:
    """What was computed for a request's generated tokens. Of its prompt only the step that gave the first token counts."""

    tokens: int = 0
    passes: int = 0
    """Forward passes of its members, drafting included."""
    drafts: int = 0
    """Verified drafts, whether a member drafted them or they were looked up."""
    accepted: int = 0
    caught_up_rows: int = 0
    """Catch-up rows of its members."""

    def report(self) -> dict[str, float | int]:
        """The `decoding` part of the report in a response."""
        passes_per_token = round(self.passes / max(1, self.tokens), 3)
        return {
            "passes_per_token": passes_per_token,
            "drafts": self.drafts,
            "accepted": self.accepted,
            "caught_up_rows": self.caught_up_rows,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingChoice:
    """How `auto` requests are decoded now."""

    samples: bool = False
    """Whether requests that can be sampled draw one member per token."""
    drafts: int = 0
    """Drafts per step for each other request."""
    gain: float = 1.0
    """Expected tokens per second, relative to plain steps."""


def tokens_per_step(rate: float, drafts: int) -> float:
    """Expected tokens of a step that verifies `drafts` drafts: sum of rate^j for j from 0 to `drafts`. The rate is below 1."""
    return (1 - rate ** (drafts + 1)) / (1 - rate)


def best_draft_length(rates: Sequence[float], others: int, step_s: Callable[[int], float]) -> tuple[int, float]:
    """The number of drafts per request that yields most tokens per second, and that speed.

    The number is 0 unless drafting gains at least `MIN_GAIN`.

    Args:
        rates: acceptance rate of each request that may draft.
        others: number of other requests, which get one token each.
        step_s: seconds of a step with a given number of drafts per request, drafting included.
    """

    def speed(drafts: int) -> float:
        return (others + sum(tokens_per_step(rate, drafts) for rate in rates)) / step_s(drafts)

    best = max(range(MAX_DRAFTS + 1), key=speed)
    return (best, speed(best)) if speed(best) >= MIN_GAIN * speed(0) else (0, speed(0))
