"""How a request's tokens are drawn from its mixture: with all members at every token, or with one member, drawn by its weight.

A linear mixture at temperature 1 is sampled by drawing member m with probability w_m, then a token from p_m: the token's law is
sum_m w_m p_m, the mixture's own. So one member runs at each token, and the others catch up when they are drawn. Mixture-model-like
Ensemble (arXiv 2605.00419) describes the idea.
"""

import random
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal

from chorus.serve.engine.mixture import Mixture

DECODING_ARGUMENT = "chorus_decoding"
"""Key of a request's `vllm_xargs`: one of `DECODINGS`, the first by default."""
Decoding = Literal["auto", "plain", "sampled"]
DECODINGS: tuple[Decoding, ...] = ("auto", "plain", "sampled")

_WORTH_IT = 0.75
"""`auto` samples members where a step is expected to run at most this part of those that a plain step would run."""


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
        return _alone(mixture, member)


@lru_cache(maxsize=1024)
def _alone(mixture: Mixture, member: int) -> Mixture:
    return Mixture(tier=mixture.tier, members=(member,), weights=(1.0,), pool="linear", temperature=1.0)


def is_worth_sampling(sampled: Sequence[Mixture], others: Iterable[Sequence[int]]) -> bool:
    """Whether a step runs enough fewer members if these requests draw one each, beside `others`, which run all of their members.

    Decided before anything is drawn: a decision that looked at the draws would change their law.
    """
    certain = {member for members in others for member in members}
    plain = certain.union(*(mixture.members for mixture in sampled))
    left_out = dict.fromkeys(plain - certain, 1.0)
    for mixture in sampled:
        for member, weight in zip(mixture.members, mixture.weights, strict=True):
            if member in left_out:
                left_out[member] *= 1 - weight
    return len(plain) - sum(left_out.values()) <= _WORTH_IT * len(plain)
