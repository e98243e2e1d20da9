"""Predict an engine's times from its own answers: linear functions of the load, and the spread of the residuals.

Pure arithmetic: `traffic` provides the load, `admission` uses the predictions. The first token waits for the running step, then
for the prefill of its prompt by each member; each further token is one step. A step's cost is linear in the number of running
members and in the member rows (measured: docs/engine.md).
"""

import itertools
from dataclasses import dataclass
from typing import Any

from chorus.serve.gateway.engines.residuals import Residuals
from chorus.serve.least_squares import LeastSquares

_MIN_LEVEL, _MAX_LEVEL = 0.6, 0.995
_ADAPTATION_RATE = 0.2
_MAX_S = 1e6
_INITIAL_SHIFT = -0.3
"""Initial shift. Negative, as the engine's drops rescue late requests; the first broken promises show how many they cannot."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What an engine computes at each step."""

    members: float = 0.0
    """Distinct members that run."""
    rows: float = 0.0
    """Member rows: sequences, each counted once per member that runs it."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one request adds to the load."""

    members: int
    prompt_tokens: float
    max_tokens: int
    """Per sequence."""


class LatencyModel:
    """Predicts one engine's time to first token and time per token."""

    def __init__(self) -> None:
        self._first_s = LeastSquares((1.0, 16.0, 16.0, 1024.0), forgetting=0.97)
        self._token_s = LeastSquares((1.0, 4.0, 16.0), forgetting=0.98)
        self._tokens_per_character = 0.5
        self.num_prompts = 0
        """Observed text prompts with their length in tokens."""
        self._residuals = Residuals()
        self._shift = _INITIAL_SHIFT
        """Added to a promised probability to get the quantile that keeps it; adapted to kept and broken promises."""

    @property
    def is_seeded(self) -> bool:
        """Whether there are enough observations to predict anything."""
        return self._token_s.count >= 4 and self._first_s.count >= 4

    @property
    def count(self) -> int:
        """Number of observations: first tokens and times per token."""
        return self._first_s.count + self._token_s.count

    def prompt_tokens(self, *, tokens: int, characters: int) -> float:
        """Expected length in tokens of a prompt of `tokens` token ids and `characters` of text."""
        return tokens + characters * self._tokens_per_character

    def first_s(self, load: Load, work: Work) -> float:
        """Expected seconds to the first token of `work`, admitted beside `load`."""
        return self._first_s.predict(self._first_features(load, work))

    def token_s(self, load: Load) -> float:
        """Expected seconds per token under `load`, which includes this request."""
        return self._token_s.predict((1.0, load.members, load.rows))

    def total_s(self, before: Load, during: Load, work: Work) -> float:
        """Expected seconds to the last token of `work`, admitted beside `before` and running as part of `during`."""
        return self.first_s(before, work) + max(0, work.max_tokens - 1) * self.token_s(during)

    def margin(self, probability: float, expected_s: float, *, can_shrink: bool = True) -> float:
        """The factor on `expected_s` with which a promise is kept with `probability`: a quantile of recent residuals.

        The quantile's level adapts to kept and broken promises (adaptive conformal inference, Gibbs and Candès 2021): the engine's
        drops rescue many requests that would be late, and a plain quantile would refuse or shrink more than needed. Drops cannot
        rescue a request at its floor (`can_shrink` false), so its level is never lowered.
        """
        shift = self._shift if can_shrink else max(0.0, self._shift)
        level = min(_MAX_LEVEL, max(_MIN_LEVEL, probability + shift))
        return self._residuals.factor(level, expected_s)

    def observe_promise(self, *, kept: bool, probability: float) -> None:
        """Adapt the level to an answer that was promised in time with `probability`."""
        shift = self._shift + _ADAPTATION_RATE * (float(not kept) - (1.0 - probability))
        self._shift = min(_MAX_LEVEL - probability, max(_MIN_LEVEL - probability, shift))

    def observe_first(self, load: Load, work: Work, seconds: float) -> None:
        """Fit the time to first token to one observation."""
        self._first_s.observe(self._first_features(load, work), seconds)

    def observe_tokens(self, load: Load, seconds_per_token: float) -> None:
        """Fit the time per token to an answer's mean; `load` is the mean load meanwhile."""
        self._token_s.observe((1.0, load.members, load.rows), seconds_per_token)

    def observe_whole(self, before: Load, during: Load, work: Work, tokens: float, seconds: float) -> None:
        """Fit both times to an answer whose first token was not seen, as if all its parts deviated by the same factor."""
        first_s, token_s = self.first_s(before, work), self.token_s(during)
        expected_s = first_s + (tokens - 1) * token_s
        if expected_s <= 0:
            first_s = token_s = expected_s = seconds / tokens
            expected_s *= tokens
        self.observe_first(before, work, first_s * seconds / expected_s)
        if tokens >= 4:
            self.observe_tokens(during, token_s * seconds / expected_s)

    def observe_total(self, *, expected_s: float, seconds: float) -> None:
        """Record a residual: `expected_s` is what was expected at admission for the answer's actual number of tokens."""
        if expected_s > 0:
            self._residuals.observe(expected_s, seconds)

    def observe_prompt(self, *, characters: int, tokens: int) -> None:
        """Fit the tokens per character to a text prompt."""
        if characters >= 8 and tokens > 0:
            self.num_prompts += 1
            self._tokens_per_character += 0.05 * (tokens / characters - self._tokens_per_character)

    def state(self) -> dict[str, Any]:
        """The fit and the residuals as JSON, for another gateway to `restore`."""
        return {
            "first": self._first_s.state(),
            "token": self._token_s.state(),
            "tokens_per_character": self._tokens_per_character,
            "surprises": [[round(value, 5) for value in pair] for pair in self._residuals.pairs()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the `state` of another model.

        Raises:
            KeyError, TypeError, ValueError: `state` is malformed; the model is then unchanged.
        """
        restored = LatencyModel()
        restored._first_s.restore(state["first"])
        restored._token_s.restore(state["token"])
        tokens_per_character = float(state["tokens_per_character"])
        pairs = [(float(expected_s), float(seconds)) for expected_s, seconds in state["surprises"]]
        if not all(0 <= value < _MAX_S for value in (tokens_per_character, *itertools.chain(*pairs))):
            raise ValueError("a time or a ratio is negative or too large")
        self._first_s, self._token_s = restored._first_s, restored._token_s
        self._tokens_per_character = tokens_per_character
        self._residuals = Residuals(pairs)

    def _first_features(self, load: Load, work: Work) -> tuple[float, ...]:
        return 1.0, load.rows, float(work.members), work.members * work.prompt_tokens
