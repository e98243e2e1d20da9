"""How long an engine takes: learned from its own answers, as linear functions of the load, with the spread of what came out.

Pure arithmetic. `traffic` says what runs, `admission` asks what fits.

The first token waits for the step that runs, then for the prefill of its prompt by each member; each further token is one step of
the engine. A step's cost is linear in the members that run at all and in the rows that they compute (measured: docs/engine.md).
"""

import itertools
from dataclasses import dataclass
from typing import Any

from chorus.serve.gateway.engines.residuals import Residuals
from chorus.serve.least_squares import LeastSquares

_LOWEST, _HIGHEST = 0.6, 0.995
_RATE = 0.2
_LONGEST_S = 1e6
_FIRST_SHIFT = -0.3
"""Promises begin with trust in the engine's drops: what it cannot rescue is learned from the first that are broken."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What an engine computes at each step."""

    members: float = 0.0
    """Different members that run."""
    rows: float = 0.0
    """Sequences, counted once for each member that computes them."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one request adds."""

    members: int
    prompt_tokens: float
    max_tokens: int
    """Of each sequence."""


class LatencyModel:
    """Time to first token and time per token of one engine."""

    def __init__(self) -> None:
        self._first_s = LeastSquares((1.0, 16.0, 16.0, 1024.0), forgetting=0.97)
        self._token_s = LeastSquares((1.0, 4.0, 16.0), forgetting=0.98)
        self._tokens_per_character = 0.5
        self.num_prompts = 0
        """Texts whose length in tokens was seen."""
        self._residuals = Residuals()
        self._shift = _FIRST_SHIFT
        """What is added to a probability to get the quantile that keeps it, as promises turn out."""

    @property
    def is_seeded(self) -> bool:
        """Whether enough was seen to predict anything."""
        return self._token_s.count >= 4 and self._first_s.count >= 4

    @property
    def count(self) -> int:
        """Answers that were learned from."""
        return self._first_s.count + self._token_s.count

    def prompt_tokens(self, *, tokens: int, characters: int) -> float:
        """Expected length of a prompt that is partly known as tokens and partly as text."""
        return tokens + characters * self._tokens_per_character

    def first_s(self, load: Load, work: Work) -> float:
        """Expected seconds to the first token, beside `load`."""
        return self._first_s.predict(self._first_features(load, work))

    def token_s(self, load: Load) -> float:
        """Expected seconds per token while `load` runs, this request included."""
        return self._token_s.predict((1.0, load.members, load.rows))

    def total_s(self, before: Load, during: Load, work: Work) -> float:
        """Expected seconds to the last token, admitted beside `before`, running as part of `during`."""
        return self.first_s(before, work) + max(0, work.max_tokens - 1) * self.token_s(during)

    def margin(self, probability: float, expected_s: float, *, can_shrink: bool = True) -> float:
        """The factor on `expected_s` with which a promise is kept with `probability`: a quantile of how answers came out lately.

        Which quantile is itself learned from the promises (adaptive conformal inference, Gibbs and Candès 2021): the engine's drops
        rescue many that would have been late, and a plain quantile would refuse or shrink more than needed. Who is at its floor
        cannot be rescued.
        """
        shift = self._shift if can_shrink else max(0.0, self._shift)
        level = min(_HIGHEST, max(_LOWEST, probability + shift))
        return self._residuals.factor(level, expected_s)

    def observe_promise(self, *, kept: bool, probability: float) -> None:
        """Learn from an answer that was promised in time with `probability`."""
        shift = self._shift + _RATE * (float(not kept) - (1.0 - probability))
        self._shift = min(_HIGHEST - probability, max(_LOWEST - probability, shift))

    def observe_first(self, load: Load, work: Work, seconds: float) -> None:
        """Learn from a first token."""
        self._first_s.observe(self._first_features(load, work), seconds)

    def observe_tokens(self, load: Load, seconds_per_token: float) -> None:
        """Learn from tokens generated as part of `load`, on average."""
        self._token_s.observe((1.0, load.members, load.rows), seconds_per_token)

    def observe_whole(self, before: Load, during: Load, work: Work, tokens: float, seconds: float) -> None:
        """Learn from an answer whose first token was not seen: it was slower or faster than expected in all its parts alike."""
        first_s, token_s = self.first_s(before, work), self.token_s(during)
        expected_s = first_s + (tokens - 1) * token_s
        if expected_s <= 0:
            first_s = token_s = expected_s = seconds / tokens
            expected_s *= tokens
        self.observe_first(before, work, first_s * seconds / expected_s)
        if tokens >= 4:
            self.observe_tokens(during, token_s * seconds / expected_s)

    def observe_total(self, *, expected_s: float, seconds: float) -> None:
        """Learn how far an answer was from what was expected for its number of tokens when it was admitted."""
        if expected_s > 0:
            self._residuals.observe(expected_s, seconds)

    def observe_prompt(self, *, characters: int, tokens: int) -> None:
        """Learn how many tokens a text becomes."""
        if characters >= 8 and tokens > 0:
            self.num_prompts += 1
            self._tokens_per_character += 0.05 * (tokens / characters - self._tokens_per_character)

    def state(self) -> dict[str, Any]:
        """What was learned, for JSON: another gateway can begin with it."""
        return {
            "first": self._first_s.state(),
            "token": self._token_s.state(),
            "tokens_per_character": self._tokens_per_character,
            "surprises": [[round(value, 5) for value in pair] for pair in self._residuals.pairs()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Begin with what another model learned.

        Raises:
            KeyError, TypeError, ValueError: `state` is not of this form; the model is then as before.
        """
        restored = LatencyModel()
        restored._first_s.restore(state["first"])
        restored._token_s.restore(state["token"])
        tokens_per_character = float(state["tokens_per_character"])
        pairs = [(float(expected_s), float(seconds)) for expected_s, seconds in state["surprises"]]
        if not all(0 <= value < _LONGEST_S for value in (tokens_per_character, *itertools.chain(*pairs))):
            raise ValueError("a time or a ratio is negative or too large")
        self._first_s, self._token_s = restored._first_s, restored._token_s
        self._tokens_per_character = tokens_per_character
        self._residuals = Residuals(pairs)

    def _first_features(self, load: Load, work: Work) -> tuple[float, ...]:
        return 1.0, load.rows, float(work.members), work.members * work.prompt_tokens
