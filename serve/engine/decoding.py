"""How a request's tokens are drawn from its mixture: with all members at every token, with one member, drawn by its weight, or
with drafts of its heaviest member, which all members verify together.

A linear mixture at temperature 1 is sampled by drawing member m with probability w_m, then a token from p_m: the token's law is
sum_m w_m p_m, the mixture's own. So one member runs at each token, and the others catch up when they are drawn. Mixture-model-like
Ensemble (arXiv 2605.00419) describes the idea.

Speculation works for any mixture and any way to sample from it (Leviathan et al., arXiv 2211.17192). Where drafts are accepted with
probability a each, k drafts give (1 - a^(k+1)) / (1 - a) tokens for each step that verifies them.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from chorus.population.manifest import Decoding
from chorus.serve.engine.mixture import Mixture

DECODING_ARGUMENT = "chorus_decoding"
"""Key of a request's `vllm_xargs`: one of `manifest.DECODINGS`, its tier's by default."""
MAX_DRAFTS = 6
"""Tokens that are drafted for one step at most."""

_GREEDY_BELOW = 1e-5
"""vLLM decodes greedily below this temperature."""
_DECAY, _PRIOR_DRAFTS = 0.98, 4.0
MIN_GAIN = 1.1
"""Another way than plain steps must promise this much: below it, noise would choose, and changing costs something, too."""


def why_not_sampled(parameters: Any, mixture: Mixture) -> str | None:
    """Why a request with these `SamplingParams` cannot be answered by sampled members exactly; None if it can.

    Whatever reshapes or reports the mixture's distribution needs all of it: the members' own distributions, reshaped one by one,
    do not add up to the mixture's.
    """
    reasons = {
        "the tier pools log-probabilities": mixture.pool == "log" and len(mixture.members) > 1,
        f"the tier's temperature is {mixture.temperature:g}, not 1": mixture.temperature != 1,
        f"temperature is {parameters.temperature:g}, not 1": parameters.temperature != 1,
        f"top_p is {parameters.top_p:g}, not 1": parameters.top_p != 1,
        f"top_k is {parameters.top_k}": parameters.top_k not in (0, -1),
        f"min_p is {parameters.min_p:g}": parameters.min_p != 0,
        "penalties act on the mixture": parameters.presence_penalty != 0
        or parameters.frequency_penalty != 0
        or parameters.repetition_penalty != 1,
        "logprobs are the mixture's": parameters.logprobs is not None,
        "logit_bias acts on the mixture": bool(parameters.logit_bias),
        "bad_words, allowed_token_ids and min_tokens mask the mixture": bool(
            parameters.bad_words or parameters.allowed_token_ids or parameters.min_tokens
        ),
        "a grammar masks the mixture": parameters.structured_outputs is not None,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def why_not_speculative(parameters: Any) -> str | None:
    """Why a request with these `SamplingParams` cannot be answered with drafts exactly; None if it can."""
    is_greedy = parameters.temperature < _GREEDY_BELOW
    reasons = {
        f"min_p is {parameters.min_p:g}, and vLLM does not apply it to drafts": parameters.min_p != 0,
        "vLLM does not apply logit_bias to drafts": bool(parameters.logit_bias),
        "vLLM cannot report logprob_token_ids beside drafts": bool(getattr(parameters, "logprob_token_ids", None)),
        "drafts that a grammar cuts off are no longer drawn from a known distribution": parameters.structured_outputs
        is not None
        and not is_greedy,
        "a seed stands for the same tokens whatever runs beside them, and the number of drafts does not": parameters.seed
        is not None
        and not is_greedy,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def decoding_of(requested: Decoding | None, parameters: Any, mixture: Mixture) -> Decoding:
    """How a request with these `SamplingParams` is decoded: as it asks, else as its tier prefers, where that is exact for it."""
    if requested is not None:
        return requested
    reasons = {"sampled": why_not_sampled(parameters, mixture), "speculative": why_not_speculative(parameters)}
    return "auto" if reasons.get(mixture.decoding) else mixture.decoding


class MemberDraws:
    """Draws the member that answers each token of one request."""

    def __init__(self, seed: int | None) -> None:
        """With a seed, the draw at a token depends on the seed and the token's index alone."""
        self._seed = seed
        self._random = random.Random()

    def draw(self, mixture: Mixture, token_idx: int) -> Mixture:
        """The one-member mixture that answers the token of that index."""
        if self._seed is not None:
            self._random.seed(f"{self._seed}/{token_idx}")
        (member,) = self._random.choices(mixture.members, mixture.weights)
        return _single_member(mixture, member)


@lru_cache(maxsize=1024)
def _single_member(mixture: Mixture, member: int) -> Mixture:
    return Mixture(tier=mixture.tier, members=(member,), weights=(1.0,), pool="linear", temperature=1.0)


def expected_num_members(sampled: Sequence[Mixture], others: Iterable[Sequence[int]]) -> tuple[float, int]:
    """How many members a step is expected to run if these requests draw one each, and how many if they run all of theirs.

    `others`: the members of the requests beside them, which all run. Looking at the draws first would change their law.
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
    """The member of `mixture` that drafts for it, alone."""
    member = max(zip(mixture.weights, mixture.members, strict=True))[1]
    return replace(mixture, members=(member,), weights=(1.0,), pool="linear")


@dataclass(slots=True)
class Acceptance:
    """How often a draft is accepted, as far as it was seen: the first rejection of a step hides what would follow."""

    accepted: float = 0.0
    rejected: float = 0.0

    def observe(self, drafted: int, accepted: int) -> None:
        """A step verified that many drafts and accepted the first of them."""
        self.accepted = self.accepted * _DECAY + accepted
        self.rejected = self.rejected * _DECAY + (accepted < drafted)

    def rate(self, prior: float) -> float:
        """The probability that the next draft is accepted; `prior` counts as much as a few that were seen."""
        return (self.accepted + _PRIOR_DRAFTS * prior) / (self.accepted + self.rejected + _PRIOR_DRAFTS)


@dataclass(slots=True)
class Work:
    """What was computed for a request's own tokens; not for its prompt, but for the first token."""

    tokens: int = 0
    passes: int = 0
    """Forwards of its members, drafts included."""
    drafts: int = 0
    """Tokens that were verified, drafted by a member or looked up."""
    accepted: int = 0
    caught_up_rows: int = 0
    """Rows that a drawn member ran for tokens of steps that had left it out."""

    def report(self) -> dict[str, float | int]:
        """For an answer."""
        passes_per_token = round(self.passes / max(1, self.tokens), 3)
        return {
            "passes_per_token": passes_per_token,
            "drafts": self.drafts,
            "accepted": self.accepted,
            "caught_up_rows": self.caught_up_rows,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingChoice:
    """How the requests that leave it open are decoded now."""

    samples: bool = False
    """Whether those that can be sampled draw one member for each token."""
    drafts: int = 0
    """Tokens that are drafted for each step of the others."""
    gain: float = 1.0
    """Expected tokens per second, as a multiple of those of plain steps."""


def tokens_per_step(rate: float, drafts: int) -> float:
    """Expected tokens of a step that verifies so many drafts: sum of rate^j for j from 0 to `drafts`. The rate is below 1."""
    return (1 - rate ** (drafts + 1)) / (1 - rate)


def best_draft_length(rates: Sequence[float], others: int, step_s: Callable[[int], float]) -> tuple[int, float]:
    """The number of drafts per request with which steps yield most tokens per second, and how many; 0 where none clearly pay.

    Args:
        rates: of the requests that may draft, how often their drafts are accepted.
        others: requests that run beside them and get one token each.
        step_s: seconds of a step with so many drafts, drafting included.
    """

    def speed(drafts: int) -> float:
        return (others + sum(tokens_per_step(rate, drafts) for rate in rates)) / step_s(drafts)

    best = max(range(MAX_DRAFTS + 1), key=speed)
    return (best, speed(best)) if speed(best) >= MIN_GAIN * speed(0) else (0, speed(0))
